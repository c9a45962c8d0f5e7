"""Glue of the controls: SeqFT with an edit that is one factor per input column (`holdfast.rules.column_factors`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from holdfast.methods._glue.rule_options import part_of
from holdfast.methods.seqft import EditingConfig, SeqFT
from holdfast.rules.base import EditRule
from holdfast.rules.column_factors import ColumnFactorOptions, ColumnFactorRule, hpa_distance


@dataclass(frozen=True, kw_only=True)
class ControlConfig(EditingConfig, ColumnFactorOptions):
    """Options that every control has: those of its rule, over those of tuning and calibration."""


class Control(SeqFT):
    """SeqFT with a column-factor rule after each task. Rule: which."""

    Config = ControlConfig
    config: ControlConfig
    Rule: ClassVar[type[ColumnFactorRule]]

    def rule(self) -> EditRule:
        """The control with this method's options."""
        return self.Rule(part_of(self.config, self.Rule.Config))


__all__ = ["ColumnFactorRule", "Control", "ControlConfig", "hpa_distance"]
