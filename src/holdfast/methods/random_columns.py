"""Random columns after each task: HPA with the choice left to chance, a control. `holdfast.rules.random_columns`."""

from __future__ import annotations

from holdfast.methods._glue.column_factors import Control
from holdfast.rules.random_columns import RandomColumnsRule


class RandomColumns(Control):
    """A control: after each task random columns return to their old values."""

    Rule = RandomColumnsRule


__all__ = ["RandomColumns", "RandomColumnsRule"]
