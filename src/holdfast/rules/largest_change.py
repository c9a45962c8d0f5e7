"""Columns of largest change: HPA's edit without the Hessian. The columns that moved most return to their old values.

The control that asks what the calibration is worth: same number of columns as HPA, or (`match: hpa`) same strength.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from holdfast.functional.columns import ColumnChange
from holdfast.functional.controls import order_by_change
from holdfast.rules.base import Layer
from holdfast.rules.column_factors import ColumnFactorRule


@dataclass(frozen=True)
class LargestChangeRule(ColumnFactorRule):
    """Columns in the order of their change."""

    name = "largest_change"

    def factors(self, layer: Layer, change: ColumnChange, distance: float | None) -> Tensor:
        """0 for the columns that changed most, 1 for the others, (c,)."""
        return self.take_back(layer, change, order_by_change(change), distance)
