"""Do two weights descend from one model? The same questions for files and for live models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.errors import CheckpointError

# Cosine of two weights of one layer, below which they are not taken for relatives. Independent weights of 16 x 16
# numbers reach 0.06 and a 7B's 0.0002; a change of five times the norm still leaves 0.2.
_UNRELATED = 0.1
# Distance over change, from which an edit counts as having moved a weight further than the tuning did.
_FURTHER = 1.01


def require_alike(
    key: str, *, before: tuple[Sequence[int], object], after: tuple[Sequence[int], object], remedy: str
) -> None:
    """Raise CheckpointError where (shape, type) of one tensor differ. remedy: what to do about types."""
    require_shape(key, before=before[0], after=after[0])
    if before[1] != after[1]:
        raise CheckpointError(
            f"{key} is {after[1]} after and {before[1]} before: rounding would count as a change. {remedy}"
        )


def require_shape(key: str, *, before: Sequence[int], after: Sequence[int]) -> None:
    """Raise CheckpointError where the shapes of one tensor differ."""
    if tuple(before) != tuple(after):
        raise CheckpointError(
            f"{key} is {tuple(after)} after and {tuple(before)} before; both must descend from one base model. "
            "Pass as BEFORE the checkpoint this task was trained from."
        )


def require_descent(key: str, row: Mapping[str, Any], *, before: object, after: object, option: str) -> None:
    """Raise CheckpointError where `row["cosine"]` of a weight before and after is that of unrelated models.

    row: of a rule that measured both weights, with `cosine` and `relative_change`; any other passes.
    before, after: what the message calls the models. option: what allows it.
    """
    cosine, relative = row.get("cosine"), row.get("relative_change")
    if cosine is not None and relative is not None and abs(cosine) < _UNRELATED:
        raise CheckpointError(
            f"{key} has nothing in common before and after (cosine {cosine:.3f}, change "
            f"{relative:.2f} of BEFORE's norm): {after} seems to descend from another model than "
            f"{before}. Pass as BEFORE the checkpoint this task was trained from, or allow it ({option})."
        )


def describe_no_change(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence where no edited layer differs between BEFORE and AFTER."""
    if all(row.get("change") == 0 for row in rows):
        return ["AFTER equals BEFORE in every calibrated layer: there was nothing to edit"]
    return []


def describe_moved_further(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence where an edit left layers farther from BEFORE than the tuning had: compensation can do that."""
    moved = {
        str(row.get("layer", "?")): row["distance"] / row["change"]
        for row in rows
        if row.get("change") and row.get("distance") is not None and row["distance"] > _FURTHER * row["change"]
    }
    if not moved:
        return []
    name, most = max(moved.items(), key=lambda item: item[1])
    return [
        f"{len(moved)} of {len(rows)} layers are farther from BEFORE than AFTER is, {name} by {most:.2f} times: the "
        "edit moves what the tuning had not"
    ]
