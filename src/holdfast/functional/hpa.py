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
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from holdfast.config import accepts_old_names
from holdfast.errors import NumericalError
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
from holdfast.functional.hpa_config import (
    ALPHA_BOUNDS,
    CurvatureForm,
    HpaConfig,
    Orthogonal,
    Projection,
    Ranking,
    keep_schedule,
    projection_of,
)

# The name of `Ranking` until version 0.2.
Criterion = Ranking


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """The columns that an edit takes back, and why.

    kept: (c,) bool, on the CPU. keep_count, focus_count: columns kept, columns in S (and in T). only_safety: columns in
    S \\ T. overlap: |O| / |S|, 0..1. g: mean log(eps / zeta). alpha: weight of the task focus.
    """

    kept: Bool[Tensor, " c"]
    keep_count: int
    focus_count: int
    only_safety: int
    overlap: float
    g: float
    alpha: float

    @property
    def safety_share(self) -> float:
        """|S \\ T| / c, 0..1."""
        return self.only_safety / int(self.kept.shape[0])

    @property
    def p_s(self) -> float:
        """The paper's P_s: |S \\ T| in percent of the columns."""
        return 100.0 * self.only_safety / int(self.kept.shape[0])


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What a setting does to a layer, without doing it; norms Frobenius.

    selection: the columns. coefficient: of the projection (0 without one; (c,) under "column"). reverted: share of
    ||D||^2 in the kept columns. distance: ||W_hat - W_prev||. change: ||D||. projected: ||W_prev diag(coefficient)||
    over the columns that are not kept: what W_hat loses when the projection is left out. relative_change: ||D|| /
    ||W_prev||; cosine: of W_new and W_prev; both None where W_prev was not read.
    """

    selection: Selection
    coefficient: float | Float[Tensor, " c"]
    reverted: float
    distance: float
    change: float
    projected: float
    relative_change: float | None
    cosine: float | None

    @property
    def coefficient_error(self) -> float:
        """`projected` relative to `distance`: how far off W_hat is without the coefficient."""
        return self.projected / self.distance if self.distance > 0 else 0.0

    def figures(self) -> dict[str, Any]:
        """Plain numbers for a record: shares 0..1, norms Frobenius, None for what is not known or not finite.

        columns c, kept, focus |S|, kept_share, overlap |O|/|S|, safety_share |S \\ T|/c, g, alpha, coefficient (one per
        column is given as its root mean square), share_reverted (of ||D||^2), change, distance.
        """
        s, c = self.selection, self.coefficient
        columns = int(s.kept.shape[0])
        return {
            "columns": columns,
            "kept": s.keep_count,
            "focus": s.focus_count,
            "kept_share": s.keep_count / columns,
            "overlap": s.overlap,
            "safety_share": s.safety_share,
            "g": s.g if math.isfinite(s.g) else None,
            "alpha": s.alpha,
            "coefficient": float(c.square().mean().sqrt()) if isinstance(c, Tensor) else c,
            "share_reverted": self.reverted,
            "change": self.change,
            "distance": self.distance,
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
        """Of the projection: a number, or (c,) under "column"; 0 without a projection."""
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
class LoraWeightEdit(_Edited):
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

    def alpha(self, bounds: tuple[float, float] = ALPHA_BOUNDS) -> float:
        """a0 + (a1 - a0)(1 + tanh g) / 2."""
        return bounds[0] + (bounds[1] - bounds[0]) * (1 + math.tanh(self.g)) / 2

    def phi(self, alpha: float) -> Float[Tensor, " c"]:
        """eps - alpha * zeta."""
        return self.eps - alpha * self.zeta

    @accepts_old_names(criterion="ranking")
    def select(
        self,
        *,
        keep_percent: float,
        focus_percent: float | None = None,
        alpha_bounds: tuple[float, float] = ALPHA_BOUNDS,
        ranking: Ranking = "eps+phi",
    ) -> Selection:
        """The columns to keep. Counts are rounded half up; ties go to the lower index.

        Args:
            keep_percent: p, 0..100. focus_percent: k, p..100; None: 2 p, at most 100.

        Raises: ValueError: p outside 0..100, or k outside p..100, or an unknown ranking.
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
        if ranking == "eps+phi":
            chosen = only_safety[:keep]
            if len(chosen) < keep:
                both = safety_first[shared].sort().values
                ranked = both[_descending(self.eps[both] - alpha * self.zeta[both])]
                chosen = torch.cat([chosen, ranked[: keep - len(chosen)]])
        elif ranking == "eps":
            chosen = self._by_eps[:keep]
        elif ranking == "phi":
            chosen = _descending(self.phi(alpha))[:keep]
        else:
            raise ValueError(f"ranking={ranking!r}; expected one of {', '.join(get_args(Ranking))}.")
        kept = torch.zeros(self.columns, dtype=torch.bool)
        kept[chosen] = True
        return Selection(
            kept=kept,
            keep_count=keep,
            focus_count=focus,
            only_safety=len(only_safety),
            overlap=float(shared.sum()) / focus if focus else 0.0,
            g=self.g,
            alpha=alpha,
        )


def outcome_of(change: ColumnChange, selection: Selection, projection: Orthogonal = "layer") -> Outcome:
    """What an edit with these kept columns does, from column statistics alone.

    Raises: ValueError: an unknown projection, or one without W_prev in `change`.
    """
    projection = projection_of(projection)
    if projection not in get_args(Projection):
        raise ValueError(f"projection={projection!r}; expected one of {', '.join(get_args(Projection))}.")
    coefficient: float | Tensor = 0.0
    projected = 0.0
    if projection == "column":
        coefficient = change.column_coefficients()
    elif projection == "layer":
        coefficient = change.coefficient()
    if change.square is not None:
        factor = torch.as_tensor(coefficient, dtype=torch.float64)
        projected = float((factor.square() * change.square)[~selection.kept].sum().sqrt())
    return Outcome(
        selection=selection,
        coefficient=coefficient,
        reverted=change.reverted(selection.kept),
        distance=change.distance(selection.kept, coefficient),
        change=change.norm,
        projected=projected,
        relative_change=change.relative(),
        cosine=change.cosine(),
    )


@accepts_old_names(saliency="ranking", orthogonal=("projection", projection_of))
@dataclass(frozen=True, kw_only=True)
class Setting:
    """The options of an edit as they apply to one layer; fields as in `edit_weight`."""

    keep_percent: float
    focus_percent: float | None = None
    alpha_bounds: tuple[float, float] = ALPHA_BOUNDS
    ranking: Ranking = "eps+phi"
    projection: Projection = "layer"


@accepts_old_names(curvature="curvature_form")
def what_if(
    change: ColumnChange,
    safety_inv_diag: Float[Tensor, " c"],
    task_inv_diag: Float[Tensor, " c"],
    settings: Iterable[Setting],
    *,
    curvature_form: CurvatureForm = "divide",
) -> list[Outcome]:
    """What each setting would do to a layer: no weight is read, no model is needed, about 0.1 ms a setting.

    `edit_weight` and `edit_lora` do what this says, and nothing else.

    Raises: ValueError: shapes, percentages or options. NumericalError: a diagonal that is not positive and finite.
    """
    ranking = ColumnRanking(change.energy, safety_inv_diag, task_inv_diag, curvature_form)
    return [
        outcome_of(
            change,
            ranking.select(
                keep_percent=s.keep_percent,
                focus_percent=s.focus_percent,
                alpha_bounds=s.alpha_bounds,
                ranking=s.ranking,
            ),
            s.projection,
        )
        for s in settings
    ]


@accepts_old_names(saliency="ranking", curvature="curvature_form")
def edit_weight(
    w_prev: Float[Tensor, "r c"],
    w_new: Float[Tensor, "r c"],
    safety_inv_diag: Float[Tensor, " c"],
    task_inv_diag: Float[Tensor, " c"],
    *,
    keep_percent: float,
    focus_percent: float | None = None,
    alpha_bounds: tuple[float, float] = ALPHA_BOUNDS,
    orthogonal: Orthogonal = True,
    projection: Projection | None = None,
    ranking: Ranking = "eps+phi",
    curvature_form: CurvatureForm = "divide",
    out: Float[Tensor, "r c"] | None = None,
) -> WeightEdit:
    """The HPA edit of one linear layer: what `holdfast edit`, a run, `harmonize` and the reload check do to a weight.

    Args:
        w_prev, w_new: (out, in), any floating dtype; the arithmetic is float32 or wider, in strips of rows.
        safety_inv_diag, task_inv_diag: (c,), diag((H + lam I)^-1) of safety and of task inputs.
        keep_percent: p, percent of the input columns that return to w_prev. focus_percent: k; None: 2 p.
        alpha_bounds: (a0, a1).
        orthogonal: True, False or "column"; or, by the name that files and flags have, projection: "layer", "none" or
            "column". One of the two.
        ranking: "eps+phi", "eps" or "phi". curvature_form: "divide" or "multiply".
        out: where the weight goes, for editors that stream; may be `w_new` itself.

    Returns: .weight, .kept, .alpha, .overlap, .coefficient, .reverted, .p_s, .g, .distance, .figures().

    Raises: ValueError: shapes, percentages or options. NumericalError: NaN or inf in a weight or a diagonal.
    """
    setting = _setting(keep_percent, focus_percent, alpha_bounds, ranking, orthogonal, projection)
    change = measure_change(w_prev, w_new, projection=setting.projection != "none")
    (outcome,) = what_if(change, safety_inv_diag, task_inv_diag, [setting], curvature_form=curvature_form)
    weight = apply_columns(w_prev, w_new, outcome.selection.kept, coefficient=outcome.coefficient, out=out)
    return WeightEdit(weight=weight, outcome=outcome)


@accepts_old_names(saliency="ranking", curvature="curvature_form")
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
    alpha_bounds: tuple[float, float] = ALPHA_BOUNDS,
    orthogonal: Orthogonal = True,
    projection: Projection | None = None,
    ranking: Ranking = "eps+phi",
    curvature_form: CurvatureForm = "divide",
) -> LoraWeightEdit:
    """The HPA edit of W_prev + scaling * B A as a LoRA of the same rank; r x c is never formed.

    Args:
        w_prev: (r, c), read once for the projection; may be None without one.
        lora_a: (rank, c). lora_b: (r, rank). scaling: alpha / r of the adapter (alpha / sqrt(r) under rslora).
        The rest as in `edit_weight`.

    Returns: .lora_a (kept columns zeroed), .lora_b, .input_scale, .dense(w_prev) and the figures of `edit_weight`.

    Raises: ValueError, NumericalError as `edit_weight`.
    """
    setting = _setting(keep_percent, focus_percent, alpha_bounds, ranking, orthogonal, projection)
    if w_prev is None and setting.projection != "none":
        raise ValueError("the projection needs w_prev; pass it, or orthogonal=False to edit without reading the base.")
    change = measure_lora(lora_a, lora_b, scaling, w_prev if setting.projection != "none" else None)
    (outcome,) = what_if(change, safety_inv_diag, task_inv_diag, [setting], curvature_form=curvature_form)
    return mask_lora(lora_a, lora_b, scaling, outcome)


def _setting(
    keep_percent: float,
    focus_percent: float | None,
    alpha_bounds: tuple[float, float],
    ranking: Ranking,
    orthogonal: Orthogonal,
    projection: Projection | None,
) -> Setting:
    if projection is not None and orthogonal is not True:
        raise ValueError(f"orthogonal={orthogonal!r} and projection={projection!r} name one option; pass one of them.")
    chosen = projection_of(orthogonal) if projection is None else projection
    if chosen not in get_args(Projection):
        raise ValueError(
            f"orthogonal={orthogonal!r}, projection={projection!r}; expected True, False or 'column', for projection "
            f"one of {', '.join(get_args(Projection))}."
        )
    return Setting(
        keep_percent=keep_percent,
        focus_percent=focus_percent,
        alpha_bounds=alpha_bounds,
        ranking=ranking,
        projection=chosen,
    )


def mask_lora(
    lora_a: Float[Tensor, "k c"], lora_b: Float[Tensor, "r k"], scaling: float, outcome: Outcome
) -> LoraWeightEdit:
    """A LoRA layer with the kept columns of an outcome taken back."""
    kept = outcome.selection.kept
    scale = torch.where(kept, 1.0, 1.0 - torch.as_tensor(outcome.coefficient, dtype=torch.float64)).float()
    return LoraWeightEdit(
        lora_a=lora_a.detach().masked_fill(kept.to(lora_a.device), 0),
        lora_b=lora_b,
        scaling=scaling,
        input_scale=scale.to(lora_a.device),
        outcome=outcome,
    )


def _descending(score: Tensor) -> Tensor:
    """Indices from the largest score to the smallest; ties go to the lower index."""
    return torch.sort(score, descending=True, stable=True).indices


__all__ = [
    "ALPHA_BOUNDS",
    "ColumnRanking",
    "CurvatureForm",
    "HpaConfig",
    "LoraWeightEdit",
    "Orthogonal",
    "Outcome",
    "Projection",
    "Ranking",
    "Selection",
    "Setting",
    "WeightEdit",
    "column_count",
    "edit_lora",
    "edit_weight",
    "keep_schedule",
    "mask_lora",
    "outcome_of",
    "saliency",
    "what_if",
]
