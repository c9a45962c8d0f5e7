"""`holdfast demo`: the whole job on a small real model, on two CPU cores, in a few minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

# Enough prompts that an interval says something, few enough for five minutes on two cores.
PROMPTS = {"train": 960, "test": 100, "safety": 80}
QUICK_PROMPTS = {"train": 960, "test": 40, "safety": 24}
QUICK_TASKS = ("classify", "caption", "guide")


def command(
    out: Annotated[Path, typer.Option(help="Run directory; a second call with the same one resumes.")] = Path(
        "runs/demo"
    ),
    methods: Annotated[str, typer.Option(help="Methods, separated by commas (`holdfast list methods`).")] = (
        "seqft,hpa,largest_change"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the data and of the training.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Three tasks and few prompts: a look in a minute.")] = False,
    harmful: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of harmful samples hidden in every task's training data.")
    ] = 0.0,
    jobs: Annotated[int, typer.Option(min=1, help="So many methods at once, a thread each.")] = 3,
    as_record: Annotated[bool, typer.Option("--json", help="Print the result as JSON; text goes to stderr.")] = False,
) -> dict[str, Any]:
    """Tune a tiny safety-aligned multimodal LLM on a stream of tasks; show what is lost and what HPA gives back."""
    from holdfast.cli.run import finish
    from holdfast.errors import ConfigError
    from holdfast.experiment import decode_run
    from holdfast.tiny.recipe import run_data
    from holdfast.tiny.stream import StreamSize, write_stream

    names = [name.strip() for name in methods.split(",") if name.strip()]
    if not names:
        raise ConfigError("--methods is empty; name at least one, for example --methods seqft,hpa.")
    data = out / "data" / f"seed-{seed}{f'-harmful-{harmful:g}' if harmful else ''}{'-quick' if quick else ''}"
    if not data.exists():
        size = StreamSize(**(QUICK_PROMPTS if quick else PROMPTS), validation=1, safety_validation=1)
        write_stream(data, seed=seed, harmful=harmful, size=size, task_names=QUICK_TASKS if quick else None)
    config = decode_run(run_data(data / "stream.yaml", names, seed=seed, harmful=harmful), base=Path.cwd())
    return finish(config, out, jobs=jobs, report=True)
