"""`holdfast route EXPERTS SAMPLES`: which experts would answer, and why.

The language model is not run, except where the folder has a guard: theta_0 then reads each prompt once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    experts: Annotated[Path, typer.Argument(help="CRAM folder, such as the cram/ of a run's step.")],
    samples: Annotated[Path | None, typer.Argument(help="JSON or JSON lines of requests.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Instead of SAMPLES: one request's text.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="With --prompt: an image; may be repeated.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model; by default the one that the folder names.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Where the router's CLIP or SigLIP lies now.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object per request instead of a table.")] = False,
) -> None:
    """Show which of CRAM's experts (arXiv 2606.02502) would answer: group, similarities, guard's score, weights."""
    from holdfast.cli.samples import read_samples
    from holdfast.data.types import Sample
    from holdfast.errors import ConfigError
    from holdfast.tuners.cram.folder import open_folder

    if (samples is None) == (prompt is None):
        raise ConfigError("Pass a file of SAMPLES, or one request with --prompt TEXT (and --image FILE).")
    if samples is not None:
        asked = read_samples(samples)
    else:
        assert prompt is not None
        asked = [Sample.single("request", prompt, images=[path.absolute() for path in image or ()])]
    rows = open_folder(experts, base=base, encoder=encoder).explain(asked)
    _print_json(rows) if json else _print_table(rows)


def _print_json(rows: list[dict]) -> None:
    import json

    for row in rows:
        print(json.dumps(row, ensure_ascii=False))


def _print_table(rows: list[dict]) -> None:
    from rich.table import Table

    from holdfast.cli.terminal import Console

    guarded = any("guard_score" in row for row in rows)
    table = Table()
    for heading in ("request", "group", "similarity to groups", *(["guard score"] if guarded else []), "experts"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        similar = sorted(row["similarity"].items(), key=lambda item: -item[1])
        weights = sorted(((n, w) for n, w in row["weights"].items() if w > 0), key=lambda item: -item[1])
        alone = "none: the base would refuse" if row.get("guarded") else "none: the base answers alone"
        answer = ", ".join(f"{name} {weight:.2f}" for name, weight in weights) or alone
        score = [f"{row['guard_score']:.2f}"] if guarded else []
        table.add_row(
            row["id"], row["group"], ", ".join(f"{name} {value:.2f}" for name, value in similar), *score, answer
        )
    Console().print(table)
