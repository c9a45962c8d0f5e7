"""`holdfast check-served URL --folder OUT`: does the endpoint apply what lies in the folder?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    url: Annotated[str, typer.Argument(help="OpenAI-compatible endpoint, such as http://localhost:8000/v1.")],
    folder: Annotated[str, typer.Option(help="Checkpoint, PEFT adapter or CRAM folder that it should serve.")],
    base: Annotated[str | None, typer.Option(help="Base model; by default the one that the folder names.")] = None,
    model: Annotated[str | None, typer.Option(help="Its name at the endpoint; by default the folder's name.")] = None,
    samples: Annotated[
        Path | None, typer.Option(help="Requests to ask, JSON or JSON lines; by default a few texts.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most N of the samples.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens per answer.")] = 24,
    json_: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
) -> None:
    """Ask an endpoint and the folder the same, and say whether the endpoint is the folder or silently its base.

    Exit status 0: active. 3: it answers as the base, or as something else. 4: the requests tell nothing.
    """
    import dataclasses
    import json

    from holdfast.cli.samples import read_samples
    from holdfast.serving.check import check_served

    asked = read_samples(samples)[:limit] if samples is not None else None
    found = check_served(url, folder, base=base, model=model, samples=asked, max_new_tokens=max_new_tokens)
    typer.echo(json.dumps(dataclasses.asdict(found)) if json_ else found.sentence(url, folder))
    raise typer.Exit({"active": 0, "unknown": 4}.get(found.verdict, 3))
