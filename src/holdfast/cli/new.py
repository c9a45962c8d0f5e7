"""`holdfast new KIND NAME`: a file with a method, rule, judge, scorer or reader of one's own, and its test."""

from __future__ import annotations

import keyword
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Kind(StrEnum):
    """What can be made."""

    METHOD = "method"
    RULE = "rule"
    JUDGE = "judge"
    SCORER = "scorer"
    READER = "reader"


def command(
    kind: Annotated[Kind, typer.Argument(help="What to make.")],
    name: Annotated[str, typer.Argument(help="Its name: small letters, digits and '_'; the file is NAME.py.")],
    out: Annotated[Path, typer.Option(help="Folder to write into.")] = Path(),
    as_record: Annotated[bool, typer.Option("--json", help="Print the result as JSON; text goes to stderr.")] = False,
) -> dict[str, Any]:
    """Write a method, judge, scorer, ... of your own and its test, which pass as written; change them as you need."""
    from string import Template

    from holdfast.errors import ConfigError, StorageError
    from holdfast.files import atomic_path
    from holdfast.registry import refuse_hiding

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ConfigError(f"name {name!r} cannot be a Python module; use small letters, digits and '_', as in my_edit.")
    cls = "".join(part.capitalize() for part in name.split("_"))
    paths = {out / f"{name}.py": f"{kind.value}.txt", out / f"test_{name}.py": f"{kind.value}_test.txt"}
    for path in paths:
        if path.exists():
            raise StorageError(f"{path} exists already; choose another name or --out.")
    refuse_hiding((out / f"{name}.py").absolute())
    folder = Path(__file__).parent / "templates"
    out.mkdir(parents=True, exist_ok=True)
    for path, template in paths.items():
        text = Template((folder / template).read_text(encoding="utf-8")).substitute(name=name, cls=cls)
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        typer.echo(f"wrote {path}")
    typer.echo(f"try   python -m pytest {out / f'test_{name}.py'}")
    typer.echo(f"use   {name}:{'read' if kind is Kind.READER else cls}, with `plugins: [{name}.py]` in the run file")
    return {"written": [str(path) for path in paths], "kind": kind.value}
