"""Random columns: HPA's edit with the choice left to chance, seeded per layer. What taking anything back is worth."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from holdfast.functional.columns import ColumnChange
from holdfast.functional.controls import random_order, revert_factors
from holdfast.functional.hpa import column_count
from holdfast.methods._glue.column_factors import ColumnFactorRule, Control
from holdfast.rules.base import EditRule, Layer


@dataclass(frozen=True)
class RandomColumnsRule(ColumnFactorRule):
    """Columns in a random order that follows from the layer's seed."""

    name = "random_columns"

    def factors(self, layer: Layer, change: ColumnChange, distance: float | None) -> Tensor:
        order = random_order(change.columns, layer.generator())
        if distance is not None:
            return revert_factors(change, order, distance=distance)
        percent = self.config.edit.keep_percent(layer.block, layer.block_count)
        return revert_factors(change, order, count=column_count(percent, change.columns))


class RandomColumns(Control):
    """A control: after each task random columns return to their old values."""

    def rule(self) -> EditRule:
        return RandomColumnsRule(self.config)
