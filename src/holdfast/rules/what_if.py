"""What if: many settings of an HPA edit answered from column statistics, with no model and no weight in memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from holdfast.errors import CalibrationError, ConfigError
from holdfast.functional.hpa import HpaConfig, Outcome
from holdfast.rules.base import MeasuredLayer
from holdfast.rules.hpa import foresee


@dataclass(frozen=True)
class SweepRow:
    """One setting over all layers; shares 0..1.

    kept_share, overlap, safety_share, alpha: means over the layers. share_reverted: of the squared change of all layers
    together. strength: ||W_hat - W_prev|| / ||W_new - W_prev|| over all layers, without the projection's coefficient
    where the base was not read; it moves nothing else that a sweep shows.
    """

    config: HpaConfig
    kept_share: float
    overlap: float
    safety_share: float
    alpha: float
    share_reverted: float
    strength: float


def grid(
    keeps: Sequence[tuple[float, float]],
    focuses: Sequence[float],
    alphas: Sequence[tuple[float, float]],
    base: HpaConfig,
) -> list[HpaConfig]:
    """Every combination of keep bounds, focus ratio and alpha bounds, over the other options of `base`."""
    return [
        replace(base, keep_bounds=keep, focus_ratio=focus, alpha_bounds=alpha)
        for keep, focus, alpha in itertools.product(keeps, focuses, alphas)
    ]


def sweep(layers: Sequence[MeasuredLayer], configs: Iterable[HpaConfig]) -> list[SweepRow]:
    """One row per configuration. The ranking of a layer's columns is done once for all settings.

    Raises: CalibrationError: no layer. ConfigError: no setting, or settings that differ in `curvature_form`.
    """
    configs = list(configs)
    if not layers:
        raise CalibrationError("There is no layer to sweep over.")
    forms = sorted({config.curvature_form for config in configs})
    if len(forms) != 1:
        raise ConfigError(f"One sweep takes one form of the curvature, found {', '.join(forms) or 'no setting'}.")
    outcomes = [foresee(measured.layer, measured.change, configs) for measured in layers]
    return [_row(config, [layer[i] for layer in outcomes]) for i, config in enumerate(configs)]


def _row(config: HpaConfig, outcomes: Sequence[Outcome]) -> SweepRow:
    def mean(values: Iterable[float]) -> float:
        found = list(values)
        return sum(found) / len(found)

    change = sum(o.change**2 for o in outcomes)
    return SweepRow(
        config=config,
        kept_share=mean(o.selection.keep_count / o.selection.kept.shape[0] for o in outcomes),
        overlap=mean(o.selection.overlap for o in outcomes),
        safety_share=mean(o.selection.safety_share for o in outcomes),
        alpha=mean(o.selection.alpha for o in outcomes),
        share_reverted=sum(o.reverted * o.change**2 for o in outcomes) / change if change > 0 else 0.0,
        strength=math.sqrt(sum(o.distance**2 for o in outcomes) / change) if change > 0 else 0.0,
    )
