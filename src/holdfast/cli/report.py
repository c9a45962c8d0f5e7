"""`holdfast report RUN [RUN ...]`: tables, figures, one HTML page, model cards."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    runs: Annotated[
        list[Path], typer.Argument(help="Run directories; those that differ in the seed alone are averaged.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder to write to; by default the first run's own.")] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    model_card: Annotated[bool, typer.Option("--model-card", help="Also write a model card per method.")] = False,
    as_record: Annotated[bool, typer.Option("--json", help="Print the result as JSON; text goes to stderr.")] = False,
) -> dict[str, Any]:
    """Make report.html (one self-contained page), pictures, table.md and table.tex of finished runs."""
    from rich.markup import escape

    from holdfast.cli.terminal import Console
    from holdfast.reports.card import write_card
    from holdfast.reports.read_runs import NothingFinishedError, load_run
    from holdfast.reports.write import write_report

    console = Console()
    files = write_report(runs, out, title=title)
    for line in files.lines:
        console.print(f"- {escape(line)}")
    console.print(f"report  {escape(str(files.html))}", soft_wrap=True)
    console.print(f"figures {len(files.pngs)} PNGs in {escape(str(files.html.parent / 'figures'))}", soft_wrap=True)
    console.print("tables  " + ", ".join(escape(str(p)) for p in files.tables), soft_wrap=True)
    cards = []
    for run in runs if model_card else ():
        with contextlib.suppress(NothingFinishedError):  # the report has said so
            cards += [write_card(run, method) for method in load_run(run).methods]
    for card in cards:
        console.print(f"card    {escape(str(card))}", soft_wrap=True)
    written = {"html": str(files.html), "figures": files.pngs, "tables": files.tables, "cards": cards}
    return {**written, "lines": list(files.lines)}
