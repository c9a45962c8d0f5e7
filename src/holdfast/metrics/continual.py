"""Figures of continual learning, as functions of an accuracy matrix.

A[t, j] is the score on task j after task t was learned, in 0..1, t and j from 0 to T - 1. Cells above the diagonal
(tasks not learned yet) are ignored and may be nan. Sources: GEM (Lopez-Paz and Ranzato 2017) for backward transfer,
Chaudhry et al. 2018 for forgetting, MCITlib for MFT, MFN and MAA.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from holdfast.errors import DataError

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ContinualSummary:
    """All figures of one accuracy matrix, rates in 0..1 (differences in -1..1); nan where a figure is not defined.

    ap: mean of the last row (average performance; MFN and "Last" elsewhere).
    mft: mean of the diagonal (how well each task was learned when it was learned).
    maa: mean over steps of the mean over tasks so far.
    bwt: mean over all tasks but the last of A[T-1, j] - A[j, j], divided by T - 1 (GEM; the default). nan for one task.
    bwt_t: the same sum divided by T, so that bwt_t = ap - mft. 0 for one task.
    forgetting: mean over all tasks but the last of (best score before the last step - last score). nan for one task.
    last: the last row.   running: mean over tasks so far, after each step.
    """

    ap: float
    mft: float
    maa: float
    bwt: float
    bwt_t: float
    forgetting: float
    last: tuple[float, ...]
    running: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data; what is not defined is None, because JSON has no nan."""

        def plain(value: float) -> float | None:
            return None if math.isnan(value) else value

        return {
            key: [plain(v) for v in value] if isinstance(value, tuple) else plain(value)
            for key, value in dataclasses.asdict(self).items()
        }


def summarize(matrix: npt.ArrayLike, *, missing: str = "refuse") -> ContinualSummary:
    """Summary of a square accuracy matrix.

    Args:
        matrix: (T, T), scores in 0..1, rows = after task t; entries above the diagonal are ignored.
        missing: "refuse" (a nan on or below the diagonal is an error) or "propagate" (every figure that needs the cell
            becomes nan). A mean is never taken over fewer cells in silence.

    Raises: DataError: not square, empty, outside 0..1, or a needed cell is missing.
    """
    a = check_matrix(matrix, missing=missing)
    steps = len(a)
    last, just_learned = a[-1], a.diagonal()
    running = np.array([a[t, : t + 1].mean() for t in range(steps)])
    drop = last[:-1] - just_learned[:-1]
    # The column of task j starts at step j: cells above are not scores of a learned task.
    best = np.array([a[j:-1, j].max() for j in range(steps - 1)])
    return ContinualSummary(
        ap=float(last.mean()),
        mft=float(just_learned.mean()),
        maa=float(running.mean()),
        bwt=float(drop.mean()) if steps > 1 else math.nan,
        bwt_t=float(drop.sum() / steps),
        forgetting=float((best - last[:-1]).mean()) if steps > 1 else math.nan,
        last=tuple(map(float, last)),
        running=tuple(map(float, running)),
    )


def check_matrix(matrix: npt.ArrayLike, *, missing: str = "refuse") -> Matrix:
    """`matrix` as float64 (T, T) with the cells above the diagonal set to nan; None counts as missing.

    Raises DataError: not square, empty, outside 0..1, or a needed cell is missing and `missing` says "refuse".
    """
    if missing not in ("refuse", "propagate"):
        raise DataError(f"missing is {missing!r}; expected 'refuse' or 'propagate'.")
    try:
        a = np.array(matrix, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"The accuracy matrix is not a table of numbers ({error}); expected T rows of T numbers, "
            "nan above the diagonal."
        ) from None
    if a.ndim != 2 or a.shape[0] != a.shape[1] or a.size == 0:
        raise DataError(
            f"The accuracy matrix has shape {a.shape}; expected (T, T) with T >= 1: one row per learned task, "
            "one column per task. For an unfinished run pass the first t rows and columns."
        )
    a[np.triu_indices_from(a, k=1)] = np.nan
    rows, columns = np.tril_indices_from(a)
    for t, j in zip(rows.tolist(), columns.tolist(), strict=True):
        value = a[t, j]
        if math.isnan(value):
            if missing == "refuse":
                raise DataError(
                    f"The accuracy matrix has no score for task {j} after step {t}; score it, or pass "
                    "missing='propagate' to get nan for the figures that need it."
                )
        elif not 0.0 <= value <= 1.0:
            raise DataError(f"The score of task {j} after step {t} is {value}; scores are rates in 0..1, not percent.")
    return a
