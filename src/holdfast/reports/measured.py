"""How wrong a judge was on public replies that people labelled: what stands beside a figure that nobody corrected.

The figures are those of `judges/measured.json`, written by a benchmark and by nothing else
(`benchmarks/label_coverage.py --measured`). They are another model's replies: they say how far a judge can be off, and
are never used to correct a rate.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from holdfast.errors import DataError

FORMAT = "holdfast.measured/1"


@cache
def table() -> Mapping[str, Any]:
    """The whole table: {"set", "source", "date", "judges": {name: {...}}}, rates 0..1.

    Raises: DataError: the table is of another format.
    """
    text = resources.files("holdfast.judges").joinpath("measured.json").read_text(encoding="utf-8")
    data = json.loads(text)
    if data.get("format") != FORMAT:
        raise DataError(f"judges/measured.json has format {data.get('format')!r}; expected {FORMAT!r}.")
    return dict(data)


def sentence(judge: str) -> str:
    """What is known of a judge's error, in words."""
    found = table()["judges"].get(judge)
    if found is None:
        return f"the error of the judge {judge!r} has not been measured on a public set."
    models = len(found["compliance_error"])
    return (
        f"measured on {table()['set']} ({table()['date']}; {found['replies']:,} replies of {models} other models), the "
        f"judge {judge!r} misses {_percent(found['missed_refusal'])} % of the refusals and calls "
        f"{_percent(found['false_refusal'])} % of the compliances refusals; per model its compliance rate is "
        f"{_range(found['compliance_error'])} points off what people say, its over-refusal "
        f"{_range(found['over_refusal_error'])}."
    )


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}"


def _range(errors: Mapping[str, float]) -> str:
    low, high = (f"{100 * v:+.1f}".replace("-", "−") for v in (min(errors.values()), max(errors.values())))
    return f"{low} to {high}"
