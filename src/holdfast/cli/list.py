"""`holdfast list WHAT`: names that a run file, a stream file or an option may use."""

from __future__ import annotations

import ast
import importlib.util
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, get_args

import typer

from holdfast.cli.choices import Kind, WorldName

KINDS: tuple[str, ...] = get_args(Kind)
# Worlds that `holdfast demo` plays -> the module with their recipe: WORLD, DEMO, QUICK, run_data.
WORLDS = {"tiny": "holdfast.tiny.recipe", "small": "holdfast.small.recipe"}
DEFAULT_WORLD: WorldName = "tiny"
# What has a registry -> where it stands.
REGISTRIES = {
    "methods": "holdfast.methods:REGISTRY",
    "scorers": "holdfast.scorers:REGISTRY",
    "judges": "holdfast.judges:REGISTRY",
    "readers": "holdfast.data.readers:REGISTRY",
    "safety-readers": "holdfast.data.readers:SAFETY_REGISTRY",
    "tuners": "holdfast.models.tuner:REGISTRY",
    "rules": "holdfast.rules:REGISTRY",
}


def command(
    what: Annotated[Kind, typer.Argument(help=f"One of {', '.join(KINDS)}.")],
    names_only: Annotated[bool, typer.Option("--names", help="Names alone, one a line.")] = False,
    as_record: Annotated[bool, typer.Option("--json", help="Print the result as JSON; text goes to stderr.")] = False,
) -> list[dict[str, str]]:
    """List methods, edits, judges, scorers, file formats, model families or streams, with a line about each."""
    rows = list(entries(what))
    widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
    columns = shutil.get_terminal_size().columns
    for name, source, line in rows:
        head = f"{name:<{widths[0]}}  {source:<{widths[1]}}  " if widths[1] else f"{name:<{widths[0]}}  "
        # A line's text in a column of its own, however narrow the terminal is.
        text = textwrap.wrap(line, max(30, columns - len(head)), break_on_hyphens=False) or [""]
        shown = f"\n{' ' * len(head)}".join([head + text[0], *text[1:]])
        typer.echo(name if names_only else shown.rstrip())
    return [{"name": name, "source": source, "about": line} for name, source, line in rows]


def entries(what: str) -> Iterator[tuple[str, str, str]]:
    """(name, where it comes from, one line about it) of everything of a kind; families and streams have no source."""
    if what in REGISTRIES:
        yield from _registered(REGISTRIES[what])
    elif what == "families":
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MODELS

        # Nothing here depends on a list of families: whatever transformers can load and has plain linear layers, works.
        yield from ((name, "", model if isinstance(model, str) else ", ".join(model)) for name, model in MODELS.items())
    else:
        from holdfast.shipped import first_comment

        for world, module in WORLDS.items():
            option = "" if world == DEFAULT_WORLD else f" --world {world}"
            about = _first_line(module).partition(":")[0].removeprefix("The run file of ")
            yield world, "", f"{about}: `holdfast demo{option}`"
        for path in stream_files():
            yield str(path), "", first_comment(path)


def stream_files() -> list[Path]:
    """Stream files in configs/streams of the working folder, then those that come with holdfast."""
    from holdfast import shipped

    own = sorted((Path.cwd() / "configs" / "streams").glob("*.yaml"))
    return list(dict.fromkeys([*own, *shipped.stream_files().values()]))


def _registered(place: str) -> Iterator[tuple[str, str, str]]:
    from holdfast.errors import ConfigError

    module, _, attribute = place.partition(":")
    registry = getattr(importlib.import_module(module), attribute)
    for name in registry.names():
        try:
            entry = registry.find(name)
        except ConfigError as error:
            yield name, "?", str(error)
            continue
        options = ", ".join(_flat(entry.options))
        yield name, entry.came_from, _first_line(entry.where) + (f" ({options})" if options else "")


def _first_line(where: str) -> str:
    """First line of the docstring of "module:name", from its source: importing every method would take seconds."""
    module, _, name = where.partition(":")
    try:
        spec = importlib.util.find_spec(module)
        text = Path(spec.origin).read_text(encoding="utf-8") if spec is not None and spec.origin else ""
        tree = ast.parse(text)
    except (ImportError, ValueError, SyntaxError, OSError) as error:
        return f"{where} cannot be read: {error}"
    kinds = (ast.ClassDef, ast.FunctionDef)
    found = next((node for node in tree.body if isinstance(node, kinds) and node.name == name), None)
    line = (ast.get_docstring(found) if found else None) or ast.get_docstring(tree) or where
    return line.strip().split("\n\n")[0].replace("\n", " ")


def _flat(options: object, where: str = "") -> Iterator[str]:
    if isinstance(options, dict):
        for key, value in options.items():
            yield from _flat(value, f"{where}.{key}" if where else key)
    else:
        yield f"{where}: {options}"
