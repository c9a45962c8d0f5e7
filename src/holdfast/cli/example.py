"""`holdfast example DIR`: something to try `holdfast restore` on, made of the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    folder: Annotated[Path, typer.Argument(help="Folder to make.")],
    seed: Annotated[int, typer.Option(help="Of the data and of the tuning.")] = 0,
) -> None:
    """Tune the embedded model until it answers what it should refuse; write all that `holdfast restore` needs."""
    from holdfast.cli.progress import phases
    from holdfast.tiny.example import write_example

    with phases() as progress:
        files = write_example(folder, seed=seed, progress=progress)
    print(f"{folder}: an aligned model, an adapter tuned on it, and three files of requests. Now:")
    print(f"  {files.command(folder / 'restored')}")
