"""Controls for an edit by columns: the same kind of edit, chosen without a Hessian, weak or strong at will.

Each is a factor per input column, s (c,) in 0..1: W_hat = W_prev + D diag(s). 1 keeps the change, 0 takes it back.
Asked for a distance, a control reaches ||W_hat - W_prev||_F exactly, so that two edits are compared at equal strength
and not at an equal number of columns, which moves weights by very different amounts.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from holdfast.functional.columns import ColumnChange, check_pair, strip_rows, wide_dtype


def interpolation_factors(
    change: ColumnChange, *, factor: float | None = None, distance: float | None = None
) -> Float[Tensor, " c"]:
    """One factor for all columns: the given one, or the one that moves the weight by `distance`.

    Raises: ValueError: both or neither given, a factor outside 0..1, a negative distance.
    """
    if (factor is None) == (distance is None):
        raise ValueError("expected either factor or distance.")
    if distance is not None:
        _check_distance(distance)
        factor = min(1.0, distance / change.norm) if change.norm > 0 else 1.0
    assert factor is not None
    if not 0 <= factor <= 1:
        raise ValueError(f"factor is {factor}; expected 0..1 (0 takes the whole change back).")
    return torch.full((change.columns,), factor, dtype=torch.float64)


def order_by_change(change: ColumnChange) -> Int[Tensor, " c"]:
    """Columns from the largest change to the smallest; ties go to the lower index."""
    return torch.sort(change.energy, descending=True, stable=True).indices


def random_order(columns: int, generator: torch.Generator) -> Int[Tensor, " c"]:
    """A random order of the columns."""
    return torch.randperm(columns, generator=generator)


def revert_factors(
    change: ColumnChange, order: Int[Tensor, " c"], *, count: int | None = None, distance: float | None = None
) -> Float[Tensor, " c"]:
    """Take columns back in `order`: `count` of them, or as many as leave ||W_hat - W_prev|| = `distance`.

    With a distance the last column is taken back in part, so that the distance is met; a distance of ||D|| or more
    takes nothing back.

    Raises: ValueError: both or neither given, a count outside 0..c, a negative distance.
    """
    if (count is None) == (distance is None):
        raise ValueError("expected either count or distance.")
    factors = torch.ones(change.columns, dtype=torch.float64)
    if count is not None:
        if not 0 <= count <= change.columns:
            raise ValueError(f"count is {count}; expected 0..{change.columns}.")
        factors[order[:count]] = 0.0
        return factors
    assert distance is not None
    _check_distance(distance)
    square = (change.energy * change.rows)[order]
    taken = square.cumsum(0)
    excess = float(taken[-1]) - distance**2
    if excess <= 0:
        return factors
    whole = int((taken <= excess).sum())
    factors[order[:whole]] = 0.0
    if whole < change.columns:
        rest = excess - (float(taken[whole - 1]) if whole else 0.0)
        factors[order[whole]] = math.sqrt(max(0.0, 1.0 - rest / float(square[whole])))
    return factors


def distance_of(change: ColumnChange, factors: Float[Tensor, " c"]) -> float:
    """||W_hat - W_prev||_F."""
    return float((change.energy * change.rows * factors.double().square()).sum().sqrt())


def reverted_by(change: ColumnChange, factors: Float[Tensor, " c"]) -> float:
    """Share of ||D||^2 that lies in what was taken back, 0..1; 0 for D = 0."""
    total = float(change.energy.sum())
    return float((change.energy * (1.0 - factors.double()).square()).sum()) / total if total > 0 else 0.0


def scale_change(
    w_prev: Float[Tensor, "r c"],
    w_new: Float[Tensor, "r c"],
    factors: Float[Tensor, " c"],
    *,
    out: Float[Tensor, "r c"] | None = None,
) -> Float[Tensor, "r c"]:
    """W_prev + (W_new - W_prev) diag(factors), in float32 or wider, rounded once; 0 and 1 are exact.

    out: where the result goes; may be `w_new` or `w_prev` itself. By default a new tensor of the wider dtype.

    Raises: ValueError: weights of other shapes or devices, or factors that are not (c,).
    """
    check_pair(w_prev, w_new)
    rows, columns = w_prev.shape
    if factors.shape != (columns,):
        raise ValueError(f"found factors of shape {tuple(factors.shape)}; expected ({columns},).")
    if out is None:
        out = torch.empty_like(w_prev, dtype=torch.promote_types(w_prev.dtype, w_new.dtype))
    wide = wide_dtype(w_prev, w_new)
    weights = factors.to(w_prev.device, wide)
    strip = strip_rows(w_prev)
    for start in range(0, rows, strip):
        stop = min(rows, start + strip)
        p, n = w_prev[start:stop].to(wide), w_new[start:stop].to(wide)
        out[start:stop].copy_(torch.lerp(p, n, weights.expand_as(p)))
    return out


def _check_distance(distance: float) -> None:
    if not 0 <= distance < math.inf:
        raise ValueError(f"distance is {distance}; expected a norm, 0 or more.")
