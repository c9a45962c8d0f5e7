"""Harmonious Parameter Adaptation (arXiv 2511.20158): which input columns of a weight change are taken back.

Per linear layer, with D = W_new - W_prev, n_j = mean_i D_ij^2 and A = diag((H + lam I)^-1) from safety and task inputs:

    eps_j = n_j / A_s[j]     zeta_j = n_j / A_t[j]                       safety focus, task focus
    S, T  = top k% by eps, by zeta;  O = S & T
    g     = mean of log(eps_j / zeta_j);  alpha = a0 + (a1 - a0)(1 + tanh g) / 2;  phi = eps - alpha zeta
    keep  = S \\ T, then the top of O by phi, until p% of the columns are kept
    W_hat = W_prev on the kept columns, W_new - coef W_prev on all others, coef = <D, W_prev> / ||W_prev||^2

`ColumnRanking` holds what depends on the layer, `select` what depends on the options, so that a sweep over options
costs a sort of a few thousand numbers per setting and needs no weight. `edit_weight` and `edit_lora` are built on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from holdfast.errors import ConfigError, NumericalError
from holdfast.functional.columns import (
    ColumnChange,
    apply_columns,
    check_lora,
    measure_change,
    measure_lora,
    strip_rows,
    wide_dtype,
)
from holdfast.functional.factorize import ieee_matmul

Criterion = Literal["eps+phi", "eps", "phi"]
CurvatureForm = Literal["divide", "multiply"]
Orthogonal = bool | Literal["column"]


@dataclass(frozen=True, kw_only=True)
class HpaConfig:
    """Options of an HPA edit; the defaults are the paper's.

    keep_bounds: (p_min, p_max), percent of the input columns kept in the last and (nearly) in the first block.
    focus_ratio: k = focus_ratio * p, at least 1; k is cut off at 100 %.
    alpha_bounds: (a0, a1).
    saliency: "eps+phi" (the method), or the ablations "eps" (top p% by eps) and "phi" (top p% by phi).
    curvature: "divide" n_j by [H^-1]_jj (optimal brain surgeon), or "multiply".
    orthogonal: True: one Frobenius projection per layer; "column": one per column; False: none.
    """

    keep_bounds: tuple[float, float] = (5.0, 15.0)
    focus_ratio: float = 2.0
    alpha_bounds: tuple[float, float] = (0.4, 0.8)
    saliency: Criterion = "eps+phi"
    curvature: CurvatureForm = "divide"
    orthogonal: Orthogonal = True

    def __post_init__(self) -> None:
        if not all(0 <= p <= 100 for p in self.keep_bounds):
            raise ConfigError(f"keep_bounds={self.keep_bounds}; expected two percentages in 0..100.")
        if not 1 <= self.focus_ratio < math.inf:
            raise ConfigError(f"focus_ratio={self.focus_ratio}; expected at least 1: the kept columns are among S.")
        if not all(math.isfinite(a) for a in self.alpha_bounds):
            raise ConfigError(f"alpha_bounds={self.alpha_bounds}; expected two finite numbers.")
        for name, value, kind in (
            ("saliency", self.saliency, Criterion),
            ("curvature", self.curvature, CurvatureForm),
        ):
            if value not in get_args(kind):
                raise ConfigError(f"{name}={value!r}; expected one of {', '.join(get_args(kind))}.")
        if self.orthogonal not in (True, False, "column"):
            raise ConfigError(f"orthogonal={self.orthogonal!r}; expected true, false or 'column'.")

    def keep_percent(self, block: int, block_count: int) -> float:
        """p of a block; see `keep_schedule`."""
        return keep_schedule(block, block_count, keep_bounds=self.keep_bounds)

    def focus_percent(self, keep_percent: float) -> float:
        """k that goes with p."""
        return min(100.0, self.focus_ratio * keep_percent)


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """The columns that an edit takes back, and why.

    kept: (c,) bool, on the CPU. keep_count, focus_count: columns kept, columns in S (and in T). overlap: |O| / |S|,
    0..1. p_s: |S \\ T| in percent of the columns. g: mean log(eps / zeta). alpha: weight of the task focus.
    """

    kept: Bool[Tensor, " c"]
    keep_count: int
    focus_count: int
    overlap: float
    p_s: float
    g: float
    alpha: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What a setting does to a layer, without doing it.

    selection: the columns. coefficient: of the projection (0 without one; (c,) under "column"). reverted: share of
    ||D||^2 in the kept columns. distance: ||W_hat - W_prev||_F. change: ||D||_F.
    """

    selection: Selection
    coefficient: float | Float[Tensor, " c"]
    reverted: float
    distance: float
    change: float

    def figures(self) -> dict[str, Any]:
        """Plain numbers for a record; a coefficient per column is given as its root mean square."""
        s, c = self.selection, self.coefficient
        return {
            "columns": int(s.kept.shape[0]),
            "kept": s.keep_count,
            "focus": s.focus_count,
            "overlap": s.overlap,
            "p_s": s.p_s,
            "g": s.g,
            "alpha": s.alpha,
            "coefficient": float(c.square().mean().sqrt()) if isinstance(c, Tensor) else c,
            "reverted": self.reverted,
            "distance": self.distance,
            "change": self.change,
        }


class _Edited:
    """The figures of an edit, by the names that users look for."""

    outcome: Outcome

    @property
    def kept(self) -> Bool[Tensor, " c"]:
        """(c,) bool: the input columns that hold W_prev."""
        return self.outcome.selection.kept

    @property
    def alpha(self) -> float:
        return self.outcome.selection.alpha

    @property
    def g(self) -> float:
        return self.outcome.selection.g

    @property
    def overlap(self) -> float:
        """|O| / |S|, 0..1."""
        return self.outcome.selection.overlap

    @property
    def p_s(self) -> float:
        """|S \\ T| in percent of the columns."""
        return self.outcome.selection.p_s

    @property
    def coefficient(self) -> float | Float[Tensor, " c"]:
        """Of the projection: a number, or (c,) under orthogonal="column"; 0 without a projection."""
        return self.outcome.coefficient

    @property
    def reverted(self) -> float:
        """Share of ||D||^2 that was taken back, 0..1."""
        return self.outcome.reverted

    @property
    def distance(self) -> float:
        """||W_hat - W_prev||_F before rounding to the output's dtype."""
        return self.outcome.distance

    def figures(self) -> dict[str, Any]:
        """Plain numbers for a record; see `Outcome.figures`."""
        return self.outcome.figures()


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightEdit(_Edited):
    """An edited weight (r, c) and the account of the edit."""

    weight: Float[Tensor, "r c"]
    outcome: Outcome


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraEdit(_Edited):
    """An edited LoRA layer: W_hat = W_prev * diag(input_scale) + scaling * lora_b @ lora_a.

    lora_a: (rank, c), the kept columns zeroed. lora_b: (r, rank), the one given. input_scale: (c,), float32: 1 on the
    kept columns, 1 - coef elsewhere; all 1 without a projection.
    """

    lora_a: Float[Tensor, "k c"]
    lora_b: Float[Tensor, "r k"]
    scaling: float
    input_scale: Float[Tensor, " c"]
    outcome: Outcome

    def dense(self, w_prev: Float[Tensor, "r c"], out: Tensor | None = None) -> Float[Tensor, "r c"]:
        """W_hat as a matrix, in float32 or wider, rounded once to `out` (or to the dtype of `w_prev`).

        `out` may be `w_prev` itself. The kept columns are copied bit for bit.

        w_prev, out: (r, c).

        Raises: ValueError: the factors are of another layer than `w_prev`.
        """
        check_lora(self.lora_a, self.lora_b, w_prev)
        out = torch.empty_like(w_prev) if out is None else out
        wide = wide_dtype(w_prev, self.lora_a, self.lora_b)
        a, b = self.lora_a.to(w_prev.device, wide), self.lora_b.to(w_prev.device, wide)
        scale, kept = self.input_scale.to(w_prev.device, wide), self.kept.to(w_prev.device)
        step = strip_rows(w_prev)
        buffer = torch.empty(min(step, w_prev.shape[0]), w_prev.shape[1], dtype=wide, device=w_prev.device)
        with ieee_matmul():
            for start in range(0, w_prev.shape[0], step):
                rows = w_prev[start : start + step]
                new = buffer[: rows.shape[0]].copy_(rows).mul_(scale)
                new.addmm_(b[start : start + step], a, alpha=self.scaling)
                # where, not the product: -0.0 + 0.0 is 0.0, and the kept columns are equal bit for bit.
                out[start : start + step].copy_(torch.where(kept, rows.to(wide), new))
        return out


def keep_schedule(block: int, block_count: int, *, keep_bounds: tuple[float, float] = (5.0, 15.0)) -> float:
    """p_l = p_max - (l / L)(p_max - p_min) percent for the block with 0-based index `block`, l = block + 1.

    p falls linearly with depth and ends at p_min exactly. keep_bounds is (p_min, p_max).

    Raises: ValueError: no block of this index.
    """
    if not 0 <= block < block_count:
        raise ValueError(f"block {block} of {block_count}; expected 0..{block_count - 1}.")
    p_min, p_max = keep_bounds
    if block + 1 == block_count:
        return float(p_min)
    return p_max - (block + 1) / block_count * (p_max - p_min)


def column_count(percent: float, columns: int) -> int:
    """`percent` of the columns, rounded half up (the tolerance absorbs binary fractions such as 14.999...)."""
    return math.floor(percent * columns / 100 + 0.5 + 1e-9)


def saliency(
    energy: Float[Tensor, " c"], inv_diag: Float[Tensor, " c"], form: CurvatureForm = "divide"
) -> Float[Tensor, " c"]:
    """Mean OBS saliency of each input column of a weight change, float64 on the CPU.

    s_j = mean_i D_ij^2 / [H^-1]_jj ("divide"; Hassibi and Stork 1993), or the product ("multiply").

    Raises: ValueError: shapes. NumericalError: an inverse diagonal that is not positive and finite.
    """
    if inv_diag.shape != energy.shape:
        raise ValueError(
            f"the inverse diagonal is {tuple(inv_diag.shape)}; expected {tuple(energy.shape)}, one number per input "
            "column. The calibration is of another layer or model."
        )
    inv_diag = inv_diag.detach().cpu().double()
    bad = ~(torch.isfinite(inv_diag) & (inv_diag > 0))
    if bool(bad.any()):
        j = int(bad.nonzero()[0])
        raise NumericalError(
            f"the inverse diagonal is {float(inv_diag[j])} at input column {j}; expected positive and finite. "
            "Calibrate again."
        )
    return energy / inv_diag if form == "divide" else energy * inv_diag


class ColumnRanking:
    """One layer's columns, ranked once by both focuses; `select` then answers any setting.

    Args:
        energy: (c,) mean_i D_ij^2. safety_inv_diag, task_inv_diag: (c,) diag((H + lam I)^-1).
        form: "divide" or "multiply".
    """

    def __init__(
        self,
        energy: Float[Tensor, " c"],
        safety_inv_diag: Float[Tensor, " c"],
        task_inv_diag: Float[Tensor, " c"],
        form: CurvatureForm = "divide",
    ) -> None:
        energy = energy.detach().cpu().double()
        self.eps = saliency(energy, safety_inv_diag, form)
        self.zeta = saliency(energy, task_inv_diag, form)
        self.columns = int(energy.shape[0])
        changed = energy > 0
        # eps and zeta share n_j: the ratio is one of inverse diagonals, and alpha depends on the calibration alone.
        ratio = torch.log(self.eps[changed]) - torch.log(self.zeta[changed])
        self.g = float(ratio.mean()) if bool(changed.any()) else 0.0
        self._by_eps = _descending(self.eps)
        self._by_zeta = _descending(self.zeta)
        self._zeta_rank = torch.empty_like(self._by_zeta)
        self._zeta_rank[self._by_zeta] = torch.arange(self.columns)

    def alpha(self, bounds: tuple[float, float] = (0.4, 0.8)) -> float:
        """a0 + (a1 - a0)(1 + tanh g) / 2."""
        return bounds[0] + (bounds[1] - bounds[0]) * (1 + math.tanh(self.g)) / 2

    def phi(self, alpha: float) -> Float[Tensor, " c"]:
        """eps - alpha * zeta."""
        return self.eps - alpha * self.zeta

    def select(
        self,
        *,
        keep_percent: float,
        focus_percent: float | None = None,
        alpha_bounds: tuple[float, float] = (0.4, 0.8),
        criterion: Criterion = "eps+phi",
    ) -> Selection:
        """The columns to keep. Counts are rounded half up; ties go to the lower index.

        Args:
            keep_percent: p, 0..100. focus_percent: k, p..100; None: 2 p, at most 100.

        Raises: ValueError: p outside 0..100, or k outside p..100, or an unknown criterion.
        """
        focus_percent = min(100.0, 2 * keep_percent) if focus_percent is None else focus_percent
        if not 0 <= keep_percent <= focus_percent <= 100:
            raise ValueError(
                f"keep_percent={keep_percent}, focus_percent={focus_percent}; expected 0 <= keep <= focus <= 100."
            )
        keep, focus = column_count(keep_percent, self.columns), column_count(focus_percent, self.columns)
        alpha = self.alpha(alpha_bounds)
        safety_first = self._by_eps[:focus]
        shared = self._zeta_rank[safety_first] < focus
        only_safety = safety_first[~shared]
        if criterion == "eps+phi":
            chosen = only_safety[:keep]
            if len(chosen) < keep:
                both = safety_first[shared].sort().values
                ranked = both[_descending(self.eps[both] - alpha * self.zeta[both])]
                chosen = torch.cat([chosen, ranked[: keep - len(chosen)]])
        elif criterion == "eps":
            chosen = self._by_eps[:keep]
        elif criterion == "phi":
            chosen = _descending(self.phi(alpha))[:keep]
        else:
            raise ValueError(f"criterion={criterion!r}; expected one of {', '.join(get_args(Criterion))}.")
        kept = torch.zeros(self.columns, dtype=torch.bool)
        kept[chosen] = True
        return Selection(
            kept=kept,
            keep_count=keep,
            focus_count=focus,
            overlap=float(shared.sum()) / focus if focus else 0.0,
            p_s=100.0 * len(only_safety) / self.columns,
            g=self.g,
            alpha=alpha,
        )


def outcome_of(change: ColumnChange, selection: Selection, orthogonal: Orthogonal = True) -> Outcome:
    """What an edit with these kept columns does, from column statistics alone.

    Raises: ValueError: `orthogonal` is none of True, False, "column", or W_prev was not read and it is not False.
    """
    coefficient: float | Tensor = 0.0
    if orthogonal == "column":
        coefficient = change.column_coefficients()
    elif orthogonal is True:
        coefficient = change.coefficient()
    elif orthogonal is not False:
        raise ValueError(f"orthogonal={orthogonal!r}; expected True, False or 'column'.")
    return Outcome(
        selection=selection,
        coefficient=coefficient,
        reverted=change.reverted(selection.kept),
        distance=change.distance(selection.kept, coefficient),
        change=change.norm,
    )


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One point of a sweep for one layer; fields as in `edit_weight`."""

    keep_percent: float
    focus_percent: float | None = None
    alpha_bounds: tuple[float, float] = (0.4, 0.8)
    saliency: Criterion = "eps+phi"
    orthogonal: Orthogonal = True


def what_if(
    change: ColumnChange,
    safety_inv_diag: Float[Tensor, " c"],
    task_inv_diag: Float[Tensor, " c"],
    settings: Iterable[Setting],
    *,
    curvature: CurvatureForm = "divide",
) -> list[Outcome]:
    """What each setting would do to a layer: no weight is read, no model is needed, about 0.1 ms a setting."""
    ranking = ColumnRanking(change.energy, safety_inv_diag, task_inv_diag, curvature)
    return [
        outcome_of(
            change,
            ranking.select(
                keep_percent=s.keep_percent,
                focus_percent=s.focus_percent,
                alpha_bounds=s.alpha_bounds,
                criterion=s.saliency,
            ),
            s.orthogonal,
        )
        for s in settings
    ]


def edit_weight(
    w_prev: Float[Tensor, "r c"],
    w_new: Float[Tensor, "r c"],
    safety_inv_diag: Float[Tensor, " c"],
    task_inv_diag: Float[Tensor, " c"],
    *,
    keep_percent: float,
    focus_percent: float | None = None,
    alpha_bounds: tuple[float, float] = (0.4, 0.8),
    orthogonal: Orthogonal = True,
    saliency: Criterion = "eps+phi",
    curvature: CurvatureForm = "divide",
    out: Float[Tensor, "r c"] | None = None,
) -> WeightEdit:
    """The HPA edit of one linear layer.

    Args:
        w_prev, w_new: (out, in), any floating dtype; the arithmetic is float32 or wider, in strips of rows.
        safety_inv_diag, task_inv_diag: (c,), diag((H + lam I)^-1) of safety and of task inputs.
        keep_percent: p, percent of the input columns that return to w_prev. focus_percent: k; None: 2 p.
        alpha_bounds: (a0, a1). orthogonal: True, False or "column". saliency: "eps+phi", "eps" or "phi".
        curvature: "divide" or "multiply".
        out: where the weight goes, for editors that stream; may be `w_new` itself.

    Returns: .weight, .kept, .alpha, .overlap, .coefficient, .reverted, .p_s, .g, .distance, .figures().

    Raises: ValueError: shapes, percentages or options. NumericalError: NaN or inf in a weight or a diagonal.
    """
    change = measure_change(w_prev, w_new, projection=orthogonal is not False)
    setting = Setting(
        keep_percent=keep_percent,
        focus_percent=focus_percent,
        alpha_bounds=alpha_bounds,
        saliency=saliency,
        orthogonal=orthogonal,
    )
    (outcome,) = what_if(change, safety_inv_diag, task_inv_diag, [setting], curvature=curvature)
    weight = apply_columns(w_prev, w_new, outcome.selection.kept, coefficient=outcome.coefficient, out=out)
    return WeightEdit(weight=weight, outcome=outcome)


def edit_lora(
    w_prev: Float[Tensor, "r c"] | None,
    lora_a: Float[Tensor, "k c"],
    lora_b: Float[Tensor, "r k"],
    scaling: float,
    safety_inv_diag: Float[Tensor, " c"],
    task_inv_diag: Float[Tensor, " c"],
    *,
    keep_percent: float,
    focus_percent: float | None = None,
    alpha_bounds: tuple[float, float] = (0.4, 0.8),
    orthogonal: Orthogonal = True,
    saliency: Criterion = "eps+phi",
    curvature: CurvatureForm = "divide",
) -> LoraEdit:
    """The HPA edit of W_prev + scaling * B A as a LoRA of the same rank; r x c is never formed.

    Args:
        w_prev: (r, c), read once for the projection; may be None with orthogonal=False.
        lora_a: (rank, c). lora_b: (r, rank). scaling: alpha / r of the adapter (alpha / sqrt(r) under rslora).
        The rest as in `edit_weight`.

    Returns: .lora_a (kept columns zeroed), .lora_b, .input_scale, .dense(w_prev) and the figures of `edit_weight`.

    Raises: ValueError, NumericalError as `edit_weight`.
    """
    if w_prev is None and orthogonal is not False:
        raise ValueError("the projection needs w_prev; pass it, or orthogonal=False to edit without reading the base.")
    change = measure_lora(lora_a, lora_b, scaling, w_prev if orthogonal is not False else None)
    setting = Setting(
        keep_percent=keep_percent,
        focus_percent=focus_percent,
        alpha_bounds=alpha_bounds,
        saliency=saliency,
        orthogonal=orthogonal,
    )
    (outcome,) = what_if(change, safety_inv_diag, task_inv_diag, [setting], curvature=curvature)
    return mask_lora(lora_a, lora_b, scaling, outcome)


def mask_lora(lora_a: Float[Tensor, "k c"], lora_b: Float[Tensor, "r k"], scaling: float, outcome: Outcome) -> LoraEdit:
    """A LoRA layer with the kept columns of an outcome taken back."""
    kept = outcome.selection.kept
    scale = torch.where(kept, 1.0, 1.0 - torch.as_tensor(outcome.coefficient, dtype=torch.float64)).float()
    return LoraEdit(
        lora_a=lora_a.detach().masked_fill(kept.to(lora_a.device), 0),
        lora_b=lora_b,
        scaling=scaling,
        input_scale=scale.to(lora_a.device),
        outcome=outcome,
    )


def _descending(score: Tensor) -> Tensor:
    """Indices from the largest score to the smallest; ties go to the lower index."""
    return torch.sort(score, descending=True, stable=True).indices
