"""`holdfast.harmonize`: HPA on live models, for whoever trains in a notebook or a training script of their own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from holdfast.checkpoints.curvature_file import Curvature
from holdfast.editing.account import EditReport, versions
from holdfast.editing.descent import describe_no_change
from holdfast.editing.in_place import edit_live
from holdfast.rules.base import EditRule
from holdfast.rules.hpa import HpaConfig, HpaRule


@dataclass(frozen=True)
class Harmonized:
    """model: the tuned model, edited in place. report: what was done, layer by layer."""

    model: nn.Module
    report: EditReport


def harmonize(
    before: nn.Module | Mapping[str, Tensor],
    after: nn.Module,
    calibration: Curvature | str | Path,
    *,
    config: HpaConfig | None = None,
    rule: EditRule | None = None,
    seed: int = 0,
    allow_other_base: bool = False,
) -> Harmonized:
    """Give a tuned model back what the tuning took: HPA's edit of `after` towards `before`, in place.

    Args:
        before: the model that the tuning started from, or its state dict; copies, where the same model was tuned. May
            be {} where `after` is a PEFT model: its base is BEFORE, and only the adapter's A is edited.
        after: the tuned model; edited in place and returned.
        calibration: a `Curvature`, or the file that `holdfast calibrate` wrote.
        config: HPA's options; the paper's by default. rule: another rule than HPA.
        allow_other_base: accept weights of `after` that have nothing in common with those of `before`.

    Raises: CalibrationError, CheckpointError, AdapterError, NumericalError: see `holdfast.editing.in_place.edit_live`.
        Everything is checked before the first layer is edited.

    >>> before = {name: value.clone() for name, value in model.state_dict().items()}
    >>> result = holdfast.harmonize(before, train(model), "curvature.safetensors")
    >>> result.report.mean("share_reverted")
    """
    curvature = calibration if isinstance(calibration, Curvature) else Curvature.load(calibration)
    chosen = rule if rule is not None else HpaRule(config or HpaConfig())
    state = before.state_dict() if isinstance(before, nn.Module) else before
    rows = edit_live(state, after, rule=chosen, curvature=curvature, seed=seed, allow_other_base=allow_other_base)
    found = describe_no_change(rows)
    for sentence in found:
        warnings.warn(sentence, stacklevel=2)
    inputs: dict[str, Any] = {
        "before": {"source": type(before).__name__},
        "after": {"source": type(after).__name__},
        "calibration": {"source": "curvature", "fingerprint": [curvature.digest()]},
    }
    report = EditReport(
        rule=chosen.name,
        settings=dict(chosen.settings()),
        export="live",
        layers=rows,
        inputs=inputs,
        plan_hash="",
        warnings=found,
        versions=versions(),
    )
    return Harmonized(model=after, report=report)
