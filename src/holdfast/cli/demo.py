"""`holdfast demo`: the whole job on a small real model, on two CPU cores, in a few minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

# Sizes for five minutes on two cores without bf16 instructions: half of the batch and two thirds of the steps of the
# published table (`holdfast.tiny.stream.SETTINGS`), and a sixth of its questions. Enough that plain tuning loses what
# it loses there; the intervals say how sure each figure is.
STEPS, BATCH = 40, 8
PROMPTS = {"test": 32, "safety": 36}
QUICK_PROMPTS = {"test": 24, "safety": 16}
QUICK_TASKS = ("classify", "caption", "guide")
# Task samples that an edit takes its statistics from.
CALIBRATED_ON = 48
# Requests in a batch: a pass of so small a model costs the same for one request as for sixty.
ANSWERED_AT_ONCE = 60


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
    from holdfast.tiny.recipe import run_data
    from holdfast.tiny.stream import SETTINGS, StreamSize, write_stream

    names = [name.strip() for name in methods.split(",") if name.strip()]
    if not names:
        raise ConfigError("--methods is empty; name at least one, for example --methods seqft,hpa.")
    data = out / "data" / f"seed-{seed}{f'-harmful-{harmful:g}' if harmful else ''}{'-quick' if quick else ''}"
    if not data.exists():
        prompts = QUICK_PROMPTS if quick else PROMPTS
        size = StreamSize(train=STEPS * BATCH, validation=1, safety_validation=1, **prompts)
        write_stream(data, seed=seed, harmful=harmful, size=size, task_names=QUICK_TASKS if quick else None)
    settings = replace(SETTINGS, steps=STEPS, batch=BATCH)
    # What was learned earlier, and safety, are asked after the last task only: the final figures need no more.
    plain = run_data(data / "stream.yaml", names, seed=seed, harmful=harmful, settings=settings, limit_between=0)
    plain["defaults"]["task_samples"] = CALIBRATED_ON
    plain["evaluation"]["batch_size"] = ANSWERED_AT_ONCE
    return finish(decode_run(plain, base=Path.cwd()), out, jobs=jobs, report=True)
