"""`holdfast demo`: the whole job on a small real model, on two CPU cores, in a few minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    out: Annotated[Path, typer.Option(help="Run directory; a second call with the same one resumes.")] = Path(
        "runs/demo"
    ),
    methods: Annotated[str, typer.Option(help="Methods, separated by commas (`holdfast list methods`).")] = (
        "seqft,hpa,anchor"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the data and of the training.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Three tasks and fewer questions: a first look.")] = False,
    harmful: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of harmful samples hidden in every task's training data.")
    ] = 0.01,
    jobs: Annotated[int, typer.Option(min=1, help="So many methods at once, a thread and half a gigabyte each.")] = 1,
    as_record: Annotated[bool, typer.Option("--json", help="Print the result as JSON; text goes to stderr.")] = False,
) -> dict[str, Any]:
    """Tune a small safety-aligned model on six tasks; show what plain tuning loses and what two edits give back."""
    from dataclasses import replace

    from holdfast.cli.run import finish
    from holdfast.errors import ConfigError
    from holdfast.experiment import decode_run
    from holdfast.tiny.recipe import DEMO, QUICK, run_data
    from holdfast.tiny.stream import SETTINGS, StreamSize, write_stream

    names = [name.strip() for name in methods.split(",") if name.strip()]
    if not names:
        raise ConfigError("--methods is empty; name at least one, for example --methods seqft,hpa.")
    data = out / "data" / f"seed-{seed}{f'-harmful-{harmful:g}' if harmful else ''}{'-quick' if quick else ''}"
    drawn = QUICK if quick else DEMO
    if not data.exists():
        size = StreamSize(
            train=drawn.steps * drawn.batch, test=drawn.test, safety=drawn.safety, validation=1, safety_validation=1
        )
        write_stream(data, seed=seed, harmful=harmful, size=size, task_names=drawn.tasks)
    settings = replace(SETTINGS, steps=drawn.steps, batch=drawn.batch)
    # What was learned earlier, and safety, are asked after the last task only: the final figures need no more.
    plain = run_data(data / "stream.yaml", names, seed=seed, harmful=harmful, settings=settings, limit_between=0)
    plain["defaults"]["task_samples"] = drawn.task_samples
    plain["evaluation"]["batch_size"] = drawn.answered_at_once
    return finish(decode_run(plain, base=Path.cwd()), out, jobs=jobs, report=True)
