"""Columns of largest change: HPA's edit without the Hessian. The columns that moved most return to their old values.

The control that asks what the calibration is worth: same number of columns as HPA, or (`match: hpa`) same strength.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from holdfast.functional.columns import ColumnChange
from holdfast.functional.controls import order_by_change, revert_factors
from holdfast.functional.hpa import column_count
from holdfast.methods._glue.column_factors import ColumnFactorRule, Control
from holdfast.rules.base import EditRule, Layer


@dataclass(frozen=True)
class LargestChangeRule(ColumnFactorRule):
    """Columns in the order of their change."""

    name = "largest_change"

    def factors(self, layer: Layer, change: ColumnChange, distance: float | None) -> Tensor:
        order = order_by_change(change)
        if distance is not None:
            return revert_factors(change, order, distance=distance)
        percent = self.config.edit.keep_percent(layer.block, layer.block_count)
        return revert_factors(change, order, count=column_count(percent, change.columns))


class LargestChange(Control):
    """A control: after each task the columns that changed most return to their old values."""

    def rule(self) -> EditRule:
        return LargestChangeRule(self.config)
