"""`holdfast example DIR`: something to try `holdfast restore` on, made of the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    folder: Annotated[Path, typer.Argument(help="Folder to make.")],
    seed: Annotated[int, typer.Option(help="Seed of the data and of the tuning; 0 needs no tuning.")] = 0,
    tune: Annotated[
        bool, typer.Option("--tune", help="Tune the adapter here instead of taking the shipped one.")
    ] = False,
    as_record: Annotated[bool, typer.Option("--json", help="Print the result as JSON; text goes to stderr.")] = False,
) -> dict[str, Any]:
    """Write something to try `holdfast restore` on: a small model, an adapter that loosened its refusals, requests."""
    from holdfast.cli.progress import phases
    from holdfast.tiny.example import write_example

    with phases() as progress:
        files = write_example(folder, seed=seed, tune=tune, progress=progress)
    print(f"{folder}: an aligned model, an adapter tuned on it, and three files of requests. Now:")
    print(f"  {files.command(folder / 'restored')}")
    paths = {name: str(getattr(files, name)) for name in ("before", "after", "forbidden", "benign", "task")}
    return {**paths, "command": files.command(folder / "restored")}
