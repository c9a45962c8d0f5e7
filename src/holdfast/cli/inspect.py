"""`holdfast inspect OUT`: what was edited, from what, and what the reload check found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from holdfast.editing.account import EditReport


def command(
    out: Annotated[Path, typer.Argument(help="The result of `holdfast edit`, or an edit.json.")],
    layers: Annotated[bool, typer.Option("--layers", help="A row per layer instead of one per block.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The whole report as JSON.")] = False,
) -> None:
    """Print what an edit did to each layer (its edit.json)."""
    from holdfast.editing.account import REPORT_FILE, EditReport

    path = out if out.is_file() else out / REPORT_FILE
    report = EditReport.load(path)
    if as_json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        show(path.parent, report, by_layer=layers)


def show(out: Path, report: EditReport, *, by_layer: bool = False) -> None:
    """Print a report for people."""
    from rich.markup import escape
    from rich.table import Table

    from holdfast.cli.terminal import Console
    from holdfast.editing.account import grouped, mean_text, shown_figures

    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console = Console(soft_wrap=True, width=140)
    head = f"{report.rule}, {report.export}, {len(report.layers)} layers edited"
    console.print(f"[bold]{escape(str(out))}[/]: {escape(head)}")
    for name, value in report.inputs.items():
        hashes = " + ".join(part[:12] for part in value.get("fingerprint", ()))
        console.print(escape(f"  {name}: {value.get('source', '')} ({hashes})"), highlight=False)
    for note in report.notes():
        console.print(escape(note), highlight=False)
    shown = shown_figures(report.layers)
    table = Table()
    for heading in ("layer" if by_layer else "block", *(heading for _, heading, _ in shown)):
        table.add_column(heading, overflow="fold")
    for name, rows in grouped(report.layers, by_layer=by_layer):
        table.add_row(escape(name), *(mean_text(rows, key, form) for key, _, form in shown))
    console.print(table)
    for warning in report.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False)
    if report.verification:
        checked = ", ".join(
            f"{key.replace('_', ' ')} {value}" for key, value in report.verification.items() if value is not None
        )
        console.print(escape(f"reload check: {checked}"), highlight=False)
