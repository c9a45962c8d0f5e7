"""Largest change after each task: HPA without the Hessian, a control. The edit: `holdfast.rules.largest_change`."""

from __future__ import annotations

from holdfast.methods._glue.column_factors import Control
from holdfast.rules.largest_change import LargestChangeRule


class LargestChange(Control):
    """A control: after each task the columns that changed most return to their old values."""

    Rule = LargestChangeRule


__all__ = ["LargestChange", "LargestChangeRule"]
