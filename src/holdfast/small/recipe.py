"""The run file of the small world's stream: what `holdfast demo --world small` runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from holdfast.small.assemble import model_path
from holdfast.small.tasks import SMALL
from holdfast.tiny import recipe
from holdfast.tiny.stream import DemoSize, TrainingSettings

# A step of 8 samples takes 10 s and more on one core without bf16, so a task has few. Nothing here was swept.
SETTINGS = TrainingSettings(lr=8e-4, steps=20, batch=8, rank=8, alpha=16, warmup_ratio=0.1)

WORLD = SMALL
# Three tasks of the four, for time: about an hour with three methods on one core.
DEMO = DemoSize(steps=20, batch=8, test=24, safety=24, tasks=("sort", "caption", "guide"))
QUICK = DemoSize(steps=20, batch=8, test=12, safety=12, tasks=("sort", "guide"))
# Chosen on the validation draw of one task, by its score minus what is not refused minus over-refusal, then by what is
# helped (`benchmarks/small_sweep.py`; docs/design/small-world.md): HPA at the paper's damping leaves more of a task
# than at the embedded world's 1.0; theta_0's answers to welcome how-tos are what this world's how-to task changes.
DAMPING = 0.01
NO_BENIGN: dict[str, Any] = {"benign_samples": 0, "edit": {"benign_share": None}}
_WITHOUT_BENIGN = ("anchor", "anchor_no_past", "anchor_no_screen", "cram_anchor")


def run_data(
    stream_file: Path,
    methods: Sequence[str],
    *,
    settings: TrainingSettings = SETTINGS,
    cache: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Plain data of a run file for a stream that `write_stream` wrote; options: of `holdfast.tiny.recipe.run_data`.

    cache: see `assemble.model_path`.

    Raises: ModelError: the extra `small` is not installed, or one of its parts is missing. StorageError: no room.
    """
    data = recipe.run_data(stream_file, methods, settings=settings, **{"damping": DAMPING, **options})
    data["model"] = str(model_path("aligned", cache=cache))
    for name, own in data["methods"].items():
        data["methods"][name] = own = {**own, **(NO_BENIGN if name in _WITHOUT_BENIGN else {})}
        if "unaligned" in own:
            own["unaligned"] = str(model_path("base", cache=cache))
    # What is assembled is fp32 already: no copy of half a gigabyte in every run.
    data["store_dtype"] = None
    data["defaults"]["task_samples"] = DEMO.task_samples
    data["evaluation"]["batch_size"] = 16
    data["safety_calibration"] = {"max_new_tokens": 24}
    data["benign_calibration"] = {"max_new_tokens": 24}
    return data
