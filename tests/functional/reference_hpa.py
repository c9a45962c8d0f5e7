"""HPA once more, slowly: float64, explicit loops and sets, written from the formulas and not from the package."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np


def inverse_diagonal(x: np.ndarray, damping: float = 0.01) -> np.ndarray:
    """x (sequences, tokens, c) -> diag((H + lam I)^-1) by a dense inverse."""
    sequences, _, c = x.shape
    h = np.zeros((c, c))
    for sequence in x.astype(np.float64):
        h += 2.0 / sequences * sequence.T @ sequence
    lam = damping * np.trace(h) / c
    for j in range(c):
        if h[j, j] == 0:
            h[j, j] = 1.0
    return np.diag(np.linalg.inv(h + lam * np.eye(c)))


def count(percent: float, columns: int) -> int:
    """Half up, in exact arithmetic on the decimal that was written."""
    exact = Fraction(repr(float(percent))) * columns / 100
    return math.floor(exact + Fraction(1, 2))


def top(scores: dict[int, float], k: int) -> list[int]:
    return sorted(scores, key=lambda j: (-scores[j], j))[:k]


def edit(
    w_prev: np.ndarray,
    w_new: np.ndarray,
    a_s: np.ndarray,
    a_t: np.ndarray,
    *,
    keep_percent: float,
    focus_percent: float,
    alpha_bounds: tuple[float, float] = (0.4, 0.8),
    orthogonal: Any = True,
    ranking: str = "eps+phi",
    curvature_form: str = "divide",
) -> dict[str, Any]:
    old, new = w_prev.astype(np.float64), w_new.astype(np.float64)
    r, c = old.shape
    eps, zeta = {}, {}
    for j in range(c):
        n_j = sum((new[i, j] - old[i, j]) ** 2 for i in range(r)) / r
        eps[j] = n_j / a_s[j] if curvature_form == "divide" else n_j * a_s[j]
        zeta[j] = n_j / a_t[j] if curvature_form == "divide" else n_j * a_t[j]
    ratios = [math.log(eps[j] / zeta[j]) for j in range(c) if eps[j] > 0]
    g = sum(ratios) / len(ratios) if ratios else 0.0
    a0, a1 = alpha_bounds
    alpha = a0 + (a1 - a0) * (1 + math.tanh(g)) / 2
    phi = {j: eps[j] - alpha * zeta[j] for j in range(c)}

    keep, focus = count(keep_percent, c), count(focus_percent, c)
    s, t = set(top(eps, focus)), set(top(zeta, focus))
    shared, only_safety = s & t, s - t
    if ranking == "eps":
        kept = set(top(eps, keep))
    elif ranking == "phi":
        kept = set(top(phi, keep))
    elif len(only_safety) > keep:
        kept = set(top({j: eps[j] for j in only_safety}, keep))
    else:
        kept = only_safety | set(top({j: phi[j] for j in shared}, keep - len(only_safety)))

    d = new - old
    if orthogonal == "column":
        coef = np.array([d[:, j] @ old[:, j] / (old[:, j] @ old[:, j]) if old[:, j].any() else 0.0 for j in range(c)])
    else:
        norm = (old**2).sum()
        coef = np.full(c, (d * old).sum() / norm if orthogonal and norm > 0 else 0.0)
    edited = old.copy()
    for j in range(c):
        if j not in kept:
            edited[:, j] = new[:, j] - coef[j] * old[:, j]
    total = (d**2).sum()
    return {
        "weight": edited,
        "kept": np.array([j in kept for j in range(c)]),
        "alpha": alpha,
        "g": g,
        "overlap": len(shared) / focus if focus else 0.0,
        "p_s": 100 * len(only_safety) / c,
        "coefficient": coef if orthogonal == "column" else coef[0],
        "reverted": (d[:, sorted(kept)] ** 2).sum() / total if total else 0.0,
        "distance": math.sqrt(((edited - old) ** 2).sum()),
    }
