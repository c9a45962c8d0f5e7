"""`holdfast.harmonize`: HPA or the anchored edit on live models, in a notebook or a training script of one's own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from holdfast import rules
from holdfast.calibration.gram_sets import GramSets
from holdfast.checkpoints.curvature_file import Curvature
from holdfast.editing.account import EditReport, versions
from holdfast.editing.descent import describe_no_change
from holdfast.editing.in_place import edit_live
from holdfast.errors import ConfigError
from holdfast.rules.anchor import AnchorConfig, AnchorRule
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
    calibration: Curvature | GramSets | str | Path,
    *,
    config: HpaConfig | AnchorConfig | None = None,
    rule: EditRule | str | None = None,
    seed: int = 0,
    allow_other_base: bool = False,
) -> Harmonized:
    """Give a tuned model back what the tuning took: an edit of `after` towards `before`, in place.

    Args:
        before: the model that the tuning started from, or its state dict (names to tensors of any shape); copies, where
            the same model was tuned. May be {} where `after` is a PEFT model: its base is BEFORE, and only the
            adapter's A is edited.
        after: the tuned model; edited in place and returned.
        calibration: a `Curvature` or the file that `holdfast calibrate` wrote: HPA's edit. `GramSets` or the folder
            that `holdfast calibrate-grams` wrote: the anchored edit.
        config: options of that edit; its defaults otherwise. rule: another rule, or the name of one without options.
        allow_other_base: accept weights of `after` that have nothing in common with those of `before`.

    Raises: CalibrationError, CheckpointError, AdapterError, NumericalError: see `holdfast.editing.in_place.edit_live`.
        Everything is checked before the first layer is edited.

    >>> before = {name: value.clone() for name, value in model.state_dict().items()}
    >>> result = holdfast.harmonize(before, train(model), "curvature.safetensors")
    >>> result.report.mean("share_reverted")
    """
    found_calibration = _calibration(calibration)
    chosen = _rule(found_calibration, config, rule)
    layers = found_calibration.task if isinstance(found_calibration, GramSets) else found_calibration
    state = before.state_dict() if isinstance(before, nn.Module) else before
    rows = edit_live(state, after, rule=chosen, curvature=layers, seed=seed, allow_other_base=allow_other_base)
    found = describe_no_change(rows)
    for sentence in found:
        warnings.warn(sentence, stacklevel=2)
    inputs: dict[str, Any] = {
        "before": {"source": type(before).__name__},
        "after": {"source": type(after).__name__},
        "calibration": {
            "source": "grams" if isinstance(found_calibration, GramSets) else "curvature",
            "fingerprint": [layers.digest()],
        },
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


def _calibration(given: Curvature | GramSets | str | Path) -> Curvature | GramSets:
    if isinstance(given, Curvature | GramSets):
        return given
    return GramSets.open(given) if Path(given).is_dir() else Curvature.load(given)


def _rule(
    calibration: Curvature | GramSets, config: HpaConfig | AnchorConfig | None, rule: EditRule | str | None
) -> EditRule:
    """The rule that was asked for, or the one that the calibration is for. Raises ConfigError: they do not fit."""
    if isinstance(rule, str):
        with_grams = isinstance(calibration, GramSets) and "grams" in rules.inputs_of(rule)
        return rules.get(rule, given={"grams": calibration} if with_grams else None)
    if rule is not None:
        return rule
    wanted: type = AnchorConfig if isinstance(calibration, GramSets) else HpaConfig
    if config is not None and not isinstance(config, wanted):
        raise ConfigError(
            f"config is {type(config).__name__}, and this calibration is for {wanted.__name__}: a file of `holdfast "
            "calibrate` is HPA's, a folder of `holdfast calibrate-grams` the anchored edit's."
        )
    if isinstance(calibration, GramSets):
        return AnchorRule(config if isinstance(config, AnchorConfig) else AnchorConfig(), calibration)
    return HpaRule(config if isinstance(config, HpaConfig) else HpaConfig())
