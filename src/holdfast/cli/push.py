"""`holdfast push FOLDER OWNER/NAME`: an adapter, experts or an edited model on the Hugging Face Hub, with its card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    folder: Annotated[Path, typer.Argument(help="Adapter, CRAM folder, or what `edit` or `restore` wrote.")],
    repo: Annotated[str, typer.Argument(help="Repository on the hub, owner/name; made where it is missing.")],
    base: Annotated[str | None, typer.Option(help="Base model's id on the hub, where FOLDER names a path.")] = None,
    run: Annotated[Path | None, typer.Option(help="Run directory whose figures the card shows; with --method.")] = None,
    method: Annotated[str | None, typer.Option(help="Method of --run that made FOLDER.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the card and the files, and send nothing.")] = False,
    as_record: Annotated[bool, typer.Option("--json", help="Print the result as JSON; text goes to stderr.")] = False,
) -> dict[str, Any]:
    """Upload a model in one commit. Its card has what it refuses before and after, also as model-index results.

    Log in first with `hf auth login`. Pickles are refused, and paths of this machine are not uploaded.
    """
    from holdfast.reports.push import prepare, push

    upload = prepare(folder, repo, base=base, run=run, method=method)
    if dry_run:
        print(upload.card)
    for name in upload.files:
        print(f"file    {name}")
    address = None if dry_run else push(upload, private=private)
    print(f"pushed  {address}" if address else "nothing was sent")
    return {"repo": repo, "files": list(upload.files), "commit": address}
