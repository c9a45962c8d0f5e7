"""`holdfast export-router FOLDER`: a router that needs no model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    folder: Annotated[Path, typer.Argument(help="CRAM folder, such as the cram/ of a run's step.")],
    out: Annotated[Path, typer.Option(help="Folder to make; it appears whole or not at all.")],
    base: Annotated[str | None, typer.Option(help="Base model; by default the one that the folder names.")] = None,
    as_record: Annotated[bool, typer.Option("--json", help="Print the result as JSON; text goes to stderr.")] = False,
) -> dict[str, Any]:
    """Write what routing needs of a base and nothing else: embeddings, vision tower, projector, and the router.

    `holdfast serve --backend vllm --router OUT` and any process of your own then decide without the model, and decide
    the same.
    """
    from holdfast.tuners.cram.standalone import export_router, open_exported

    found = export_router(folder, out, base=base)
    opened = open_exported(out)
    typer.echo(
        f"{out}: {found['experts']} experts, {found['tensors']} tensors of the base, {found['bytes'] / 1e6:.1f} MB in "
        f"memory; opened in {opened.load_seconds:.2f} s."
    )
    return {"out": str(out), **found, "load_seconds": opened.load_seconds}
