"""Interpolation after each task: the control that shrinks all of the change. See `holdfast.rules.interpolation`."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.methods._glue.column_factors import Control, ControlConfig
from holdfast.methods._glue.rule_options import part_of
from holdfast.rules.interpolation import InterpolationOptions, InterpolationRule


@dataclass(frozen=True, kw_only=True)
class InterpolationConfig(ControlConfig, InterpolationOptions):
    """Options of interpolation in a stream: the edit's, over those of tuning and calibration."""

    def __post_init__(self) -> None:
        super().__post_init__()
        part_of(self, InterpolationOptions)


class Interpolation(Control):
    """A control: after each task all of the change shrinks by one factor."""

    Config = InterpolationConfig
    config: InterpolationConfig
    Rule = InterpolationRule


__all__ = ["Interpolation", "InterpolationConfig", "InterpolationRule"]
