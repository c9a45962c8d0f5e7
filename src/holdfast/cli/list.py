"""`holdfast list WHAT`: names that a run file, a stream file or an option may use."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, get_args

import typer

from holdfast.cli.choices import Kind

KINDS: tuple[str, ...] = get_args(Kind)


def command(
    what: Annotated[Kind, typer.Argument(help=f"One of {', '.join(KINDS)}.")],
    names_only: Annotated[bool, typer.Option("--names", help="Names alone, one a line.")] = False,
) -> None:
    """List what there is, with a line about each."""
    rows = list(entries(what))
    width = max((len(name) for name, _ in rows), default=0)
    for name, line in rows:
        typer.echo(name if names_only else f"{name:<{width}}  {line}".rstrip())


def entries(what: str) -> Iterator[tuple[str, str]]:
    """(name, one line about it) of every method, scorer, judge, family or stream."""
    if what == "methods":
        from holdfast.methods import METHODS

        for name, (where, preset) in METHODS.items():
            options = ", ".join(_flat(preset))
            yield name, _first_line(where) + (f" ({options})" if options else "")
    elif what == "scorers":
        from holdfast.scorers import SCORERS

        yield from ((name, _first_line(where)) for name, where in sorted(SCORERS.items()))
    elif what == "judges":
        from holdfast.judges import JUDGES

        yield from ((name, _first_line(where)) for name, where in sorted(JUDGES.items()))
    elif what == "families":
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MODELS

        # Nothing here depends on a list of families: whatever transformers can load and has plain linear layers, works.
        yield from ((name, model if isinstance(model, str) else ", ".join(model)) for name, model in MODELS.items())
    else:
        yield "tiny", "the embedded stream: `holdfast demo`"
        from holdfast.shipped import first_comment

        for path in stream_files():
            yield str(path), first_comment(path)


def stream_files() -> list[Path]:
    """Stream files in configs/streams of the working folder, then those that come with holdfast."""
    from holdfast import shipped

    own = sorted((Path.cwd() / "configs" / "streams").glob("*.yaml"))
    return list(dict.fromkeys([*own, *shipped.stream_files().values()]))


def _first_line(where: str) -> str:
    """First line of the docstring of "module:Class", from its source: importing every method would take seconds."""
    module, _, name = where.partition(":")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    found = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)
    text = (ast.get_docstring(found) if found else None) or ast.get_docstring(tree) or ""
    return text.strip().split("\n\n")[0].replace("\n", " ")


def _flat(options: object, where: str = "") -> Iterator[str]:
    if isinstance(options, dict):
        for key, value in options.items():
            yield from _flat(value, f"{where}.{key}" if where else key)
    else:
        yield f"{where}: {options}"
