"""HPA: Harmonious Parameter Adaptation (arXiv 2511.20158), tuning that keeps refusals and old skills by a weight edit.

After each task, per linear layer, the input columns that matter most to safety (and less to the task) return to their
old values; the others keep the change, orthogonal to the old weight. No gradient, no replay, no alignment data. The
mathematics is `holdfast.functional.hpa`, the edit of one layer `HpaRule`; here is the method of a stream.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from holdfast.functional.hpa import HpaConfig
from holdfast.methods.seqft import EditingConfig, SeqFT
from holdfast.rules.base import EditRule
from holdfast.rules.hpa import HpaRule, diagonals

__all__ = ["Hpa", "HpaConfig", "HpaMethodConfig", "HpaRule", "diagonals"]


@dataclass(frozen=True, kw_only=True)
class HpaMethodConfig(EditingConfig):
    """Options of HPA in a stream: the edit's, over those of tuning and calibration."""

    edit: HpaConfig = field(default_factory=HpaConfig)


class Hpa(SeqFT):
    """SeqFT with HPA's edit after each task; the edited weights are released and are where the next task starts."""

    Config = HpaMethodConfig
    config: HpaMethodConfig

    def rule(self) -> EditRule:
        """HPA with this method's options."""
        return HpaRule(self.config.edit)
