"""`holdfast sweep GRID.yaml`: one run file with values varied; a second call with the same --out goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    grid: Annotated[Path, typer.Argument(help="Grid: `run`, a run file, and `vary`, its keys with values to try.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the cells; by default runs/<name of the file>.")] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="So many cells at once, each in a process of its own; 1, or all of them with --ray."),
    ] = None,
    retries: Annotated[int, typer.Option(min=0, help="How often a cell whose process died is started again.")] = 2,
    ray: Annotated[
        str | None,
        typer.Option(help="Put cells on a Ray cluster: its address, auto, or local for one on this machine."),
    ] = None,
    cpus_per_cell: Annotated[float, typer.Option(help="CPUs that a cell reserves, with --ray.")] = 1.0,
    gpus_per_cell: Annotated[float, typer.Option(help="GPUs that a cell reserves, with --ray; 0.5 shares one.")] = 0.0,
    as_record: Annotated[bool, typer.Option("--json", help="Print the result as JSON; text goes to stderr.")] = False,
) -> dict[str, Any]:
    """Repeat a run with other seeds, methods or options, side by side. Finished runs are kept, killed ones resume."""
    from rich.live import Live
    from rich.table import Table

    from holdfast.cli.progress import Shown
    from holdfast.cli.terminal import Console
    from holdfast.errors import RunError
    from holdfast.experiment.sweep import read_grid, sweep

    cells = read_grid(grid)
    states = {cell.name: "waiting" for cell in cells}

    def table() -> Table:
        shown = Table(title=f"{sum(s in ('finished', 'kept') for s in states.values())} of {len(cells)} cells finished")
        for name in (*cells[0].values, "state"):
            shown.add_column(name)
        for cell in cells:
            shown.add_row(*cell.values.values(), states[cell.name])
        return shown

    console = Console()
    # In a log, lines: the table comes once, at the end.
    lines = Shown(quiet=console.is_terminal)
    with Live(table(), console=console, auto_refresh=False) as live, lines:

        def progress(event: str, *, name: str, state: str, **rest: Any) -> None:
            states[name] = state
            live.update(table(), refresh=console.is_terminal)
            if state in ("running", "checking"):
                lines.at(name, doing=state)
            else:
                lines.finish(name)
                lines.say_line(f"{name}: {state}")

        places = _on_ray(ray, cpus_per_cell, gpus_per_cell)
        try:
            found = sweep(
                cells,
                out or Path("runs") / grid.stem,
                jobs=jobs or (1 if places is None else len(cells)),
                retries=retries,
                progress=progress,
                places=places,
            )
        finally:
            if places is not None:
                places.close()
    failed = [result for result in found if result.state == "failed"]
    for result in failed:
        console.print(f"{result.name}: {result.error}", markup=False, soft_wrap=True)
    if failed:
        mistakes = sum(result.mistake for result in failed)
        advice = "Repeat the command." if not mistakes else "Mend what is said above, then repeat the command."
        if 0 < mistakes < len(failed):
            advice += f" Repeating it may do for {len(failed) - mistakes} of them."
        raise RunError(f"{len(failed)} of {len(cells)} cells failed; the others are finished. {advice}")
    return {"cells": [{"name": result.name, "state": result.state} for result in found]}


def _on_ray(address: str | None, cpus: float, gpus: float) -> Any:
    from holdfast.errors import ConfigError

    if address is None:
        if (cpus, gpus) != (1.0, 0.0):
            raise ConfigError("--cpus-per-cell and --gpus-per-cell only speak to Ray; add --ray, or leave them out.")
        return None
    from holdfast.experiment.ray_places import RayPlaces

    return RayPlaces(address, cpus=cpus, gpus=gpus)
