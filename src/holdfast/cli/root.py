"""Options of every verb: `holdfast --plugin my_edit.py edit ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holdfast.version import __version__


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"holdfast {__version__}")
        raise typer.Exit


def root(
    plugin: Annotated[
        list[Path] | None, typer.Option(help="Python file with methods, judges, ... of your own; repeatable.")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and stop.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Tune a multimodal LLM again and again, and hold fast to what it knows and what it refuses."""
    # A callback keeps even a single-verb app a group, so that `holdfast VERB` always works.
    if plugin:
        from holdfast.registry import load_plugins

        load_plugins(plugin)
