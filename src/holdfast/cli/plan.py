"""`holdfast plan RUN.yaml`: hours, memory and disk of a run, before anything is loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

# Matrix products in bf16 of a GPU that has 40 or 80 GB (NVIDIA A100, its data sheet).
_USUAL_TFLOPS = 312.0


def command(
    run: Annotated[Path, typer.Argument(help="Run file; its model and data must be here.")],
    gpus: Annotated[
        int | None, typer.Option(min=1, help="So many GPUs share the work; without it, this machine does it.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Memory of one GPU, such as 80GiB.")] = None,
    tflops: Annotated[
        float | None,
        typer.Option(help=f"Matrix-product speed of one GPU; {_USUAL_TFLOPS:g} with --gpus, measured here without."),
    ] = None,
    as_record: Annotated[bool, typer.Option("--json", help="Print the result as JSON; text goes to stderr.")] = False,
) -> dict[str, Any]:
    """Say what a run will take: hours by phase, memory of training, disk. Planning figures; nothing is loaded."""
    from holdfast.cli.units import parse_memory
    from holdfast.errors import ConfigError
    from holdfast.experiment import read_run
    from holdfast.experiment.plan import Devices, plan_run

    if tflops is not None and not 0 < tflops * 1e12 < math.inf:
        raise ConfigError(f"--tflops is {tflops:g}; expected a finite number above 0, such as {_USUAL_TFLOPS:g}.")
    room = parse_memory(memory, "--memory") if memory is not None else None
    bf16 = gpus is not None or _has_bf16()
    devices = Devices(count=gpus or 1, flops=_speed(gpus, tflops), memory_bytes=room, bf16=bf16)
    plan = plan_run(read_run(run), devices)
    _show(plan, devices)
    return {"devices": {"count": devices.count, "flops": devices.flops, "memory_bytes": room}, **plan.to_json()}


def _speed(gpus: int | None, tflops: float | None) -> float:
    if tflops is not None:
        return tflops * 1e12
    if gpus is not None:
        return _USUAL_TFLOPS * 1e12
    from holdfast.models.precision import default_device
    from holdfast.models.speed import flops_per_second

    return flops_per_second(default_device())


def _has_bf16() -> bool:
    from holdfast.models.precision import default_device
    from holdfast.training.supervised import resolve_precision

    return resolve_precision(default_device(), "auto") == "bf16"


def _show(plan: Any, devices: Any) -> None:
    from rich.table import Table

    from holdfast.cli.terminal import Console

    shown = Table(
        title=f"{plan.parameters / 1e6:,.0f} M parameters, {devices.count} x {devices.flops / 1e12:.3g} TFLOP/s"
    )
    shown.add_column("method")
    phases = list(plan.before)
    for name in (*phases, "in all", "memory", "disk"):
        shown.add_column(name, justify="right")
    shown.add_row("before any task", *map(_time, plan.before.values()), _time(sum(plan.before.values())), "", "")
    for name, one in plan.methods.items():
        hours = [_time(one.seconds[phase]) for phase in phases]
        sizes = (f"{one.training_bytes / 2**30:.1f} GiB", f"{one.disk_bytes / 2**30:.1f} GiB")
        shown.add_row(name, *hours, _time(sum(one.seconds.values())), *sizes)
    console = Console()
    console.print(shown)
    console.print(
        f"theta_0 and then all methods, one after another: {_time(plan.seconds)}. Memory: of training, on one device."
    )
    for name, one in plan.methods.items():
        if one.fits is not None and one.fits < one.micro_batch:
            remedy = (
                f"set micro_batch_size to {one.fits}" if one.fits else "no micro batch fits: try gradient_checkpointing"
            )
            console.print(
                f"{name}: {one.training_bytes / 2**30:.1f} GiB at micro_batch_size {one.micro_batch} do not fit into "
                f"{devices.memory_bytes / 2**30:.1f} GiB; {remedy}.",
                markup=False,
                soft_wrap=True,
            )
    for note in plan.notes:
        console.print(note, markup=False, soft_wrap=True)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
