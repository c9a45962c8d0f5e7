"""The run file of the embedded stream: what `holdfast demo` and the five-seed table run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from holdfast.tiny import model_path
from holdfast.tiny.stream import SETTINGS, TINY, DemoSize, TrainingSettings

# HPA's p is the paper's. Its damping is not: few tokens inflate the inverse of a Gram matrix, and on the validation
# draw a lam as large as the mean diagonal made the better edit (docs/design/hessian.md).
KEEP_BOUNDS = (5.0, 15.0)
DAMPING = 1.0

WORLD = TINY
# Sizes for five minutes on two cores without bf16 instructions: half of the batch and two thirds of the steps of the
# published table (`SETTINGS`), and a sixth of its questions. Enough that plain tuning loses what it loses there; the
# intervals say how sure each figure is. A pass of so small a model costs the same for one request as for sixty.
DEMO = DemoSize(steps=40, batch=8, test=32, safety=36, answered_at_once=60)
QUICK = DemoSize(steps=40, batch=8, test=24, safety=16, answered_at_once=60, tasks=("classify", "caption", "guide"))

# What a method needs beside the defaults, by its name or, where that is not here, by the first word of it.
METHOD_OPTIONS: dict[str, dict[str, Any]] = {
    # An expert of CRAM is a LoRA of scale 1 on attention alone, where the others have scale 2 on every linear layer: it
    # takes a larger step (docs/design/cram.md).
    "cram": {"training": {"learning_rate": 4e-3}, "cram": {"dropout": 0.0}},
    # The released recipe has scale 2 itself, so half that step moves an expert as far. Nothing is downloaded here, so
    # the router sees what the model sees, on whose scale CLIP's sigma of 2 means nothing: it comes from the data.
    "cram_official": {
        "training": {"learning_rate": 2e-3},
        "cram": {"dropout": 0.0, "encoder": "backbone", "sigma": None},
    },
    # Rivals have the damping of their authors, not the one that was chosen for HPA: at HPA's, Safe Delta admits next to
    # nothing. Its budget s is not scale-free: the paper's 0.1 is for changes of 1e-4, and those here are larger.
    "safe_delta": {"strength": 10.0, "calibration": {"damping": 0.01}},
    "model_tailor": {"calibration": {"damping": 0.01}},
}
# These ask for the model before its alignment, which is shipped too.
_NEED_UNALIGNED = ("safe_lora", "resta")


def own_options(name: str) -> dict[str, Any]:
    """What the method `name` needs beside the defaults of the embedded stream."""
    if name in _NEED_UNALIGNED:
        return {"unaligned": str(model_path("base"))}
    return METHOD_OPTIONS.get(name, METHOD_OPTIONS.get(name.partition("_")[0], {}))


def run_data(
    stream_file: Path,
    methods: Sequence[str],
    *,
    seed: int,
    harmful: float = 0.0,
    settings: TrainingSettings = SETTINGS,
    limit: int | None = None,
    limit_between: int | None = None,
    keep_bounds: Sequence[float] = KEEP_BOUNDS,
    damping: float = DAMPING,
) -> dict[str, Any]:
    """Plain data of a run file (`holdfast.experiment.decode_run`) for a stream that `write_stream` wrote.

    harmful: the share that `write_stream` was asked for; it names the condition in reports. limit: prompts per test
    split and side of a safety set, at most; None: all that were drawn. limit_between: see `EvaluationConfig`.
    """
    return {
        "model": str(model_path("aligned")),
        "stream": str(stream_file),
        "methods": {name: own_options(name) for name in methods},
        "defaults": {
            "training": {
                "rank": settings.rank,
                "alpha": settings.alpha,
                "dropout": 0.0,
                "learning_rate": settings.lr,
                "warmup_ratio": settings.warmup_ratio,
                "weight_decay": settings.weight_decay,
                "max_steps": settings.steps,
                "batch_size": settings.batch,
            },
            "edit": {"keep_bounds": list(keep_bounds)},
            "calibration": {"damping": damping},
        },
        "evaluation": {
            # The world is made up, so what a complying answer contains is known: compliance is proved, not guessed.
            "judges": [{"name": "reference"}, {"name": "keyword_strict"}],
            "batch_size": 50,
            "limit": limit,
            "limit_between": limit_between,
        },
        "safety_calibration": {"max_new_tokens": 48},
        "benign_calibration": {"max_new_tokens": 48},
        "injection": {"fraction": harmful} if harmful else None,
        # Six merges in fp16 would round the weights six times.
        "store_dtype": "float32",
        "seed": seed,
        # One thread per process: two processes then use both cores, and any number of jobs gives the same bytes.
        "threads": 1,
    }
