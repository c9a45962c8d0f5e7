"""Interpolation along the task's own path: W_hat = W_prev + factor (W_new - W_prev), all columns alike.

The oldest remedy for forgetting, and the first thing that a weight edit has to beat. A control for HPA.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from holdfast.errors import ConfigError
from holdfast.functional.columns import ColumnChange
from holdfast.functional.controls import interpolation_factors
from holdfast.rules.base import Layer
from holdfast.rules.column_factors import ColumnFactorOptions, ColumnFactorRule


@dataclass(frozen=True, kw_only=True)
class InterpolationOptions(ColumnFactorOptions):
    """factor: share of the change that stays, 0..1; with `match` it follows from HPA's strength, layer by layer.

    Raises: ConfigError: a factor outside 0..1.
    """

    factor: float = 0.6

    def __post_init__(self) -> None:
        if not 0 <= self.factor <= 1:
            raise ConfigError(f"factor is {self.factor}; expected 0..1.")


@dataclass(frozen=True)
class InterpolationRule(ColumnFactorRule):
    """One factor for all columns."""

    config: InterpolationOptions = field(default_factory=InterpolationOptions)
    Config = InterpolationOptions
    name = "interpolation"

    def factors(self, layer: Layer, change: ColumnChange, distance: float | None) -> Tensor:
        """One factor for all columns, (c,)."""
        if distance is not None:
            return interpolation_factors(change, distance=distance)
        return interpolation_factors(change, factor=self.config.factor)
