"""`holdfast demo`: the whole job on a small real model, on two CPU cores, in a few minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from holdfast.cli.choices import WorldName
from holdfast.cli.list import DEFAULT_WORLD, WORLDS


def command(
    world: Annotated[
        WorldName,
        typer.Option(help="tiny: the embedded model; small: a pretrained language model (extra `small`, an hour)."),
    ] = DEFAULT_WORLD,
    out: Annotated[
        Path | None, typer.Option(help="Run directory, runs/demo by default; a second call with the same one resumes.")
    ] = None,
    methods: Annotated[str, typer.Option(help="Methods, separated by commas (`holdfast list methods`).")] = (
        "seqft,hpa,anchor"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the data and of the training.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer tasks and fewer questions: a first look.")] = False,
    harmful: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of harmful samples hidden in every task's training data.")
    ] = 0.01,
    jobs: Annotated[int, typer.Option(min=1, help="So many methods at once, a thread and half a gigabyte each.")] = 1,
    as_record: Annotated[bool, typer.Option("--json", help="Print the result as JSON; text goes to stderr.")] = False,
) -> dict[str, Any]:
    """Tune a small safety-aligned model on a stream; show what plain tuning loses and what two edits give back."""
    import importlib
    from dataclasses import replace

    from holdfast.cli.run import finish
    from holdfast.errors import ConfigError
    from holdfast.experiment import decode_run
    from holdfast.tiny.stream import StreamSize, write_stream

    names = [name.strip() for name in methods.split(",") if name.strip()]
    if not names:
        raise ConfigError("--methods is empty; name at least one, for example --methods seqft,hpa.")
    recipe = importlib.import_module(WORLDS[world])
    out = out or Path("runs") / ("demo" if world == DEFAULT_WORLD else f"demo-{world}")
    data = out / "data" / f"seed-{seed}{f'-harmful-{harmful:g}' if harmful else ''}{'-quick' if quick else ''}"
    drawn = recipe.QUICK if quick else recipe.DEMO
    settings = replace(recipe.SETTINGS, steps=drawn.steps, batch=drawn.batch)
    # Before anything is written, as the model may be one that has to be there already. What was learned earlier, and
    # safety, are asked after the last task only: the final figures need no more.
    plain = recipe.run_data(data / "stream.yaml", names, seed=seed, harmful=harmful, settings=settings, limit_between=0)
    plain["defaults"]["task_samples"] = drawn.task_samples
    plain["evaluation"]["batch_size"] = drawn.answered_at_once
    if not data.exists():
        size = StreamSize(
            train=drawn.steps * drawn.batch, test=drawn.test, safety=drawn.safety, validation=1, safety_validation=1
        )
        write_stream(data, seed=seed, harmful=harmful, size=size, task_names=drawn.tasks, world=recipe.WORLD)
    return finish(decode_run(plain, base=Path.cwd()), out, jobs=jobs, report=True)
