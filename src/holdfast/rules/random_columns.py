"""Random columns: HPA's edit with the choice left to chance, seeded per layer. What taking anything back is worth."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from holdfast.functional.columns import ColumnChange
from holdfast.functional.controls import random_order
from holdfast.rules.base import Layer
from holdfast.rules.column_factors import ColumnFactorRule


@dataclass(frozen=True)
class RandomColumnsRule(ColumnFactorRule):
    """Columns in a random order that follows from the layer's seed."""

    name = "random_columns"

    def factors(self, layer: Layer, change: ColumnChange, distance: float | None) -> Tensor:
        """0 for columns drawn by the layer's seed, 1 for the others, (c,)."""
        return self.take_back(layer, change, random_order(change.columns, layer.generator()), distance)
