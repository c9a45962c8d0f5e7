"""HTML pages as Jinja templates; one style for all of them."""

from __future__ import annotations

import jinja2


def template(name: str) -> jinja2.Template:
    """The template of that file name. Autoescape is what keeps a model's output from becoming markup."""
    loader = jinja2.PackageLoader("holdfast.reports")
    return jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    ).get_template(name)
