"""`holdfast sweep-edit BEFORE AFTER --calibration FILE`: what each setting would do, without doing it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from holdfast.cli.choices import CriterionName, CurvatureFormName


def command(
    before: Annotated[str, typer.Argument(help="The model that the tuning started from: folder or hub id.")],
    after: Annotated[str, typer.Argument(help="The tuned model, or an adapter on BEFORE; several as A+B.")],
    calibration: Annotated[Path, typer.Option(help="What `holdfast calibrate` wrote.")],
    keep: Annotated[
        list[str] | None, typer.Option(help="Percent of columns that go back, last..first block; repeat it for a grid.")
    ] = None,
    focus: Annotated[
        list[float] | None, typer.Option(help="Candidates as a multiple of --keep; repeat it for a grid.")
    ] = None,
    alpha: Annotated[
        list[str] | None, typer.Option(help="Bounds of the task's weight, low..high; repeat it for a grid.")
    ] = None,
    ranking: Annotated[
        CriterionName,
        typer.Option(
            "--ranking",
            "--saliency",
            help="Score that ranks columns: eps+phi is the paper's; eps or phi alone for comparison.",
        ),
    ] = "eps+phi",
    curvature_form: Annotated[
        CurvatureFormName, typer.Option(help="Use of the inverse's diagonal: divide is the paper's method.")
    ] = "divide",
    out: Annotated[Path | None, typer.Option(help="Write the rows to this JSON file too.")] = None,
    allow_other_calibration: Annotated[
        bool,
        typer.Option(
            "--allow-other-calibration", help="Accept a calibration made with other weights of this architecture."
        ),
    ] = False,
    as_record: Annotated[bool, typer.Option("--json", help="Print the result as JSON; text goes to stderr.")] = False,
) -> dict[str, Any]:
    """Compare settings of HPA's edit by what they keep and take back. The weights are read once, whatever the grid."""
    from dataclasses import asdict

    from rich import box
    from rich.table import Table

    from holdfast.checkpoints.curvature_file import Curvature
    from holdfast.cli.progress import bars
    from holdfast.cli.terminal import Console
    from holdfast.cli.units import format_bounds, parse_bounds
    from holdfast.editing.measure import measure_pair
    from holdfast.files import write_json
    from holdfast.functional.hpa_config import ALPHA_BOUNDS, FOCUS_RATIO, KEEP_BOUNDS, HpaConfig
    from holdfast.rules.what_if import grid, sweep

    configs = grid(
        [parse_bounds(text, "--keep") for text in keep or ()] or [KEEP_BOUNDS],
        focus or [FOCUS_RATIO],
        [parse_bounds(text, "--alpha") for text in alpha or ()] or [ALPHA_BOUNDS],
        HpaConfig(ranking=ranking, curvature_form=curvature_form),
    )
    curvature = Curvature.load(calibration)
    with bars("reading") as progress:
        layers = measure_pair(
            before, after, curvature, allow_other_calibration=allow_other_calibration, progress=progress
        )
    began = time.perf_counter()
    rows = sweep(layers, configs)
    seconds = time.perf_counter() - began
    heads = (
        "keep %",
        "focus",
        "alpha\nbounds",
        "kept",
        "over-\nlap",
        "safety\nonly",
        "alpha",
        "re-\nverted",
        "strength",
    )
    table = Table(*heads, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for row in rows:
        table.add_row(
            format_bounds(row.config.keep_bounds),
            f"{row.config.focus_ratio:g}",
            format_bounds(row.config.alpha_bounds),
            f"{row.kept_share:.1%}",
            f"{row.overlap:.1%}",
            f"{row.safety_share:.1%}",
            f"{row.alpha:.3f}",
            f"{row.share_reverted:.1%}",
            f"{row.strength:.3f}",
        )
    Console().print(table)
    print(f"{len(rows)} settings over {len(layers)} layers in {seconds:.1f} s")
    record = {"layers": len(layers), "rows": [asdict(row) for row in rows]}
    if out is not None:
        write_json(out, record)
    return record
