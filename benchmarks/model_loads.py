"""How often a run reads weights for a model, and what that costs: the run as it is, against reading anew each time.

    OMP_NUM_THREADS=1 python benchmarks/model_loads.py --methods seqft,hpa,cram,cram_hpa

Two tasks on the embedded model, few prompts, both ways one after another in one process, so that only the ratio counts.
"Anew" is what every phase did before a run held its model: `models.held.holding` does nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

from transformers import AutoModelForImageTextToText as Auto

from holdfast import experiment
from holdfast.models import held
from holdfast.tiny.recipe import run_data
from holdfast.tiny.stream import SETTINGS, StreamSize, write_stream

TASKS = ("classify", "caption")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default="seqft,hpa,cram,cram_hpa")
    parser.add_argument("--steps", type=int, default=6, help="training steps of each task")
    parser.add_argument("--train", type=int, default=96, help="training samples of each task")
    parser.add_argument("--prompts", type=int, default=8, help="test prompts of each task and side")
    options = parser.parse_args()
    print(f"{'method':<12} {'reads of task 2':>18} {'CPU seconds':>16} {'ratio':>6}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = StreamSize(
            train=options.train, test=options.prompts, safety=options.prompts, validation=1, safety_validation=1
        )
        write_stream(root / "data", seed=0, size=size, task_names=TASKS)
        one_run(root, "seqft", "warm-up", nullcontext, options.steps)  # imports and caches
        for method in options.methods.split(","):
            (reads, seconds), (reads_anew, seconds_anew) = (
                one_run(root, method, "held", held.holding, options.steps),
                one_run(root, method, "anew", nullcontext, options.steps),
            )
            print(
                f"{method:<12} {reads_anew:>8} -> {reads:<6} {seconds_anew:>7.1f} -> {seconds:<5.1f} "
                f"{seconds / seconds_anew:>6.2f}"
            )


def one_run(root: Path, method: str, kind: str, holding: object, steps: int) -> tuple[int, float]:
    """(reads of weights in the second task, CPU seconds of the whole run)."""
    reads: Counter[int] = Counter()
    step = -1

    def progress(event: str, **values: object) -> None:
        nonlocal step
        step = int(values.get("step", step))  # type: ignore[call-overload]

    usual = Auto.from_pretrained

    def counting(*args: object, **more: object) -> object:
        reads[step] += 1
        return usual(*args, **more)

    settings = replace(SETTINGS, steps=steps)
    plain = run_data(root / "data" / "stream.yaml", [method], seed=0, settings=settings)
    config = experiment.decode_run(plain, base=root)
    with mock.patch.object(Auto, "from_pretrained", counting), mock.patch.object(held, "holding", holding):
        began = time.process_time()
        experiment.run(config, root / f"{method}-{kind}", progress=progress)
    return reads[1], time.process_time() - began


if __name__ == "__main__":
    main()
