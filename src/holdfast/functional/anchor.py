"""The anchored edit: the change of a layer that moves the new task least, and safety and earlier tasks least.

    minimise over W    mean_t ||(W - W_new) x||^2 + mu_s mean_s ||(W - W_old) x||^2 + mu_p mean_p ||(W - W_old) x||^2
                       + lam tau ( ||W - W_new||^2 + (mu_s + mu_p) ||W - W_old||^2 )

    A = H_t / tau + lam I        K = mu_s (H_s / tau + lam I) + mu_p (H_p / tau + lam I)        tau = mean diag H_t
    W_hat = W_old + D A (A + K)^-1,    D = W_new - W_old;    a LoRA D = s B A_lora stays one: A_lora A (A + K)^-1

H: (c, c), mean 2 x x^T per token of the layer's inputs. Interpolation (lam -> infinity) and RegMean (Jin et al., ICLR
2023; mu_p = 0, lam -> 0) are members of the family. docs/design/anchor.md has the derivation and the figures.

`anchor_weight` and `anchor_lora` are one edit. `AnchorGrams` holds the moments, checked once, for several: all
layers that share an input, and a grid of strengths (`anchor_lora_grid`), which costs one Cholesky factor each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.errors import NumericalError
from holdfast.functional.columns import check_pair
from holdfast.functional.factorize import NotPositiveDefiniteError, factor_, ieee_matmul

Precision = Literal["auto", "float32", "float64"]

# Up to this width everything is float64: it costs milliseconds there.
_WIDE_COLUMNS = 1024
# Width of the tiles in which Gram matrices are read: what is made of one stays in a CPU's cache.
_TILE = 512
# Relative error, measured in float64, above which a float32 solution is refined.
_TOLERANCE = 3e-5
# Random combinations of the rows on which that error is measured.
_SKETCH_ROWS = 8
# Refinement steps before float64 takes over; each must at least halve the error.
_MAX_STEPS = 6
# Asymmetry, and excess over sqrt(H_ii H_jj), that rounding explains: float32 sums; Gram matrices kept in bf16.
_ASYMMETRY = 1e-4
_EXCESS = 1e-2


@dataclass(frozen=True, kw_only=True)
class AnchorStrength:
    """How strongly W_old holds: safety_weight is mu_s, past_weight mu_p (unused without past Grams); both 0 or more."""

    safety_weight: float = 1.0
    past_weight: float = 0.3

    def __post_init__(self) -> None:
        for name, value in (("safety_weight", self.safety_weight), ("past_weight", self.past_weight)):
            _check_number(name, value)


class AnchorGrams:
    """The second moments of one layer input, checked once; they are read, never written or copied.

    Args:
        task_gram, safety_gram, past_gram: (c, c), symmetric, mean 2 x x^T per token (any common scale will do), on one
            device; floating point of any width. past_gram None: there is no past term at all, mu_p = 0.
        damping: lam, in units of tau; 0 or more.
        precision: "float64", "float32" (refined in float64 where its error exceeds 3e-5), or "auto": float64 up to
            1024 columns, float32 above.

    Attributes: width: c. tau: mean diag of task_gram. dead_inputs: columns that no Gram saw.

    Raises: ValueError: shapes, devices, dtypes, asymmetry or a damping that is not a number >= 0. NumericalError: NaN
    or inf, a matrix that is not X^T X, or a zero Gram (no input of that kind reached the layer; tau must not be 0).
    """

    def __init__(
        self,
        task_gram: Float[Tensor, "c c"],
        safety_gram: Float[Tensor, "c c"],
        past_gram: Float[Tensor, "c c"] | None = None,
        *,
        damping: float = 0.03,
        precision: Precision = "auto",
    ) -> None:
        _check_number("damping", damping)
        if precision not in ("auto", "float32", "float64"):
            raise ValueError(f"precision={precision!r}; expected 'auto', 'float32' or 'float64'.")
        named = {"task_gram": task_gram, "safety_gram": safety_gram}
        if past_gram is not None:
            named["past_gram"] = past_gram
        for name, gram in named.items():
            _check_gram(name, gram, task_gram)
        self.task, self.safety = task_gram.detach(), safety_gram.detach()
        self.past = None if past_gram is None else past_gram.detach()
        self.damping = float(damping)
        self.width = int(task_gram.shape[0])
        self.device = task_gram.device
        self.tau = float(task_gram.diagonal().double().mean())
        if not self.tau > 0 or not math.isfinite(1 / self.tau):
            raise NumericalError(f"tau, the mean diagonal of task_gram, is {self.tau}: too small to divide by.")
        wide = precision == "float64" or (precision == "auto" and self.width <= _WIDE_COLUMNS)
        self.dtype = torch.float64 if wide or task_gram.dtype == torch.float64 else torch.float32
        dead = torch.stack([gram.diagonal() == 0 for gram in named.values()]).all(0)
        self.dead_inputs = int(dead.sum())

    def factor(self, strength: AnchorStrength | None = None) -> AnchorFactor:
        """Factorise A + K for one strength: c^3 / 3 flops and one (c, c) matrix.

        Raises: NumericalError: not positive definite, even in float64.
        """
        return AnchorFactor(grams=self, strength=strength or AnchorStrength())

    def weights(self, strength: AnchorStrength) -> tuple[float, float, float]:
        """Weights of task, safety and past in A + K, scaled to a sum of 1 (so that no weight overflows)."""
        past = strength.past_weight if self.past is not None else 0.0
        largest = max(1.0, strength.safety_weight, past)
        parts = [1.0 / largest, strength.safety_weight / largest, past / largest]
        total = math.fsum(parts)
        return parts[0] / total, parts[1] / total, parts[2] / total

    def task_product(self, change: Float[Tensor, "k c"]) -> Float[Tensor, "k c"]:
        """change A, in the dtype of `change`; the right-hand side of every strength."""
        out = change * self.task_ridge(change.dtype)
        return self.add_products_(out, [(change / self.tau, self.task)])

    def task_ridge(self, dtype: torch.dtype) -> float | Tensor:
        """What A holds on its diagonal beside H_t / tau; see `ridge`.

        One number, or (c,) where columns differ.
        """
        return self.ridge((1.0, 0.0, 0.0), (self.task, self.safety, self.past), dtype)

    def ridge(
        self, weights: tuple[float, float, float], seen: tuple[Tensor | None, ...], dtype: torch.dtype
    ) -> float | Tensor:
        """lam times the sum of the weights; without damping, 1 in its place on inputs that no Gram saw.

        Such an input is coupled to nothing, and any lam > 0 gives it the share 1 / (1 + mu_s + mu_p): the limit.

        seen: Gram matrices (c, c), or None. Returns: one number, or (c,) where columns differ.
        """
        total = math.fsum(weights)
        if self.damping > 0 or not self.dead_inputs:
            return self.damping * total
        dead = torch.stack([g.diagonal() == 0 for g in seen if g is not None]).all(0)
        return total * dead.to(dtype)

    def terms(self, weights: tuple[float, float, float]) -> list[tuple[float, Tensor]]:
        """The Gram matrices that count, with their weights.

        Each Gram matrix is (c, c).
        """
        grams = (self.task, self.safety, self.past)
        return [(w, g) for w, g in zip(weights, grams, strict=True) if g is not None and w > 0]

    def add_products_(self, out: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        """out += sum_i x_i H_i, in the dtype of `out`, each Gram matrix read once and never widened as a whole.

        out: (n, c). pairs: x_i (n, c), H_i (c, c).
        """
        with ieee_matmul():
            for x, gram in pairs:
                if gram.dtype == out.dtype:
                    out.addmm_(x, gram)
                    continue
                for columns in _tiles(self.width):
                    for rows in _tiles(self.width):
                        out[:, columns].addmm_(x[:, rows], gram[rows, columns].to(out.dtype))
        return out

    def lower_sum(self, terms: list[tuple[float, Tensor]], dtype: torch.dtype) -> Tensor:
        """sum_i w_i H_i / tau, a new (c, c) matrix of which the lower triangle is filled."""
        total = torch.empty(self.width, self.width, dtype=dtype, device=self.device)
        factors = [weight / self.tau for weight, _ in terms]
        # A factor that float32 cannot hold is taken in float64.
        narrow = dtype if all(1e-30 < f < 1e30 for f in factors) else torch.float64
        for rows in _tiles(self.width):
            for columns in _tiles(rows.stop):
                tile = total[rows, columns]
                for position, (factor, (_, gram)) in enumerate(zip(factors, terms, strict=True)):
                    part = gram[rows, columns].to(narrow) * factor
                    if position:
                        tile.add_(part)
                    else:
                        tile.copy_(part)
        return total


@dataclass(kw_only=True, eq=False)
class AnchorFactor:
    """A factor of A + K for one strength; `apply` is change -> change A (A + K)^-1.

    fallbacks: what did not work in float32 and was done in float64 instead, in order; empty when nothing failed.
    error: estimated relative error of the last `apply`, measured in float64 (0 where all of it was float64).
    """

    grams: AnchorGrams
    strength: AnchorStrength
    fallbacks: list[str] = field(default_factory=list)
    error: float = 0.0
    _factor: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._weights = self.grams.weights(self.strength)
        self._terms = self.grams.terms(self._weights)
        grams = (self.grams.task, self.grams.safety, self.grams.past)
        self._ridge = self.grams.ridge(self._weights, grams, torch.float64)
        if self.grams.dtype == torch.float32:
            reason = self._factorise(torch.float32)
            if reason is None:
                return
            self.fallbacks.append(f"float32: {reason}")
        self._require_float64()

    def apply(
        self, change: Float[Tensor, "k c"], task_product: Float[Tensor, "k c"] | None = None
    ) -> Float[Tensor, "k c"]:
        """change A (A + K)^-1, in the working dtype (float32 or float64), on the Grams' device.

        Args:
            change: the rows of A_lora, or of D; several layers that share this input may be stacked.
            task_product: `grams.task_product(change)` if it is at hand (it is the same for every strength).

        Raises: ValueError: shapes. NumericalError: NaN or inf in `change`.
        """
        _check_change("change", change, self.grams)
        x = change.detach().to(self.grams.device, self._factor.dtype)
        self.error = 0.0
        if self.strength_is_zero or not x.shape[0]:
            return x.clone()
        if task_product is None or task_product.dtype != x.dtype:
            task_product = self.grams.task_product(x)
        y = self._solve(task_product)
        if x.dtype == torch.float64:
            return y
        self.error = self._sketch_error(x, y)
        if self.error <= _TOLERANCE:
            return y
        # Per row, refinement costs 12 c^2 (products and solves in both precisions); a float64 factor 2 c^3 / 3 + 8 c^2.
        if 12 * x.shape[0] < self.grams.width:
            refined = self._refine(x.double(), y.double())
            if refined is not None:
                return refined
        self.fallbacks.append(f"float32: relative error {self.error:.1e}")
        self._require_float64()
        return self.apply(change)

    def edit_weight(self, w_prev: Float[Tensor, "r c"], w_new: Float[Tensor, "r c"]) -> Float[Tensor, "r c"]:
        """`anchor_weight` with a factor at hand (layers that share an input share it); 2 r c extra numbers."""
        check_pair(w_prev, w_new)
        if self.strength_is_zero:
            return w_new.detach().clone()
        prev, new = w_prev.detach(), w_new.detach()
        device, wide = self.grams.device, self.grams.dtype
        kept = self.apply(new.to(device, wide) - prev.to(device, wide))
        return kept.add_(prev.to(device)).to(new.device, new.dtype)

    @property
    def strength_is_zero(self) -> bool:
        """Whether nothing holds W_old, so that the change stays as it is."""
        return self._weights[0] == 1.0

    def _factorise(self, dtype: torch.dtype) -> str | None:
        """Form A + K and factorise it in place. Returns what failed, or None."""
        c = self.grams.width
        matrix = self.grams.lower_sum(self._terms, dtype)
        ridge = self._ridge.to(dtype) if isinstance(self._ridge, Tensor) else self._ridge
        matrix.diagonal().add_(ridge)
        diagonal = matrix.diagonal().double()
        try:
            factor_(matrix)
        except NotPositiveDefiniteError as error:
            return f"not positive definite ({error})"
        # What is left of a column after those before it: below rounding it is noise, and so would be the edit.
        left = float((matrix.diagonal().double().square() / diagonal).min())
        if not left > 4 * c * torch.finfo(dtype).eps:
            return f"singular to rounding ({left:.1e} of a column is left)"
        self._factor = matrix
        return None

    def _require_float64(self) -> None:
        reason = self._factorise(torch.float64)
        if reason is not None:
            tried = "; ".join([*self.fallbacks, f"float64: {reason}"])
            raise NumericalError(
                f"A + K ({self.grams.width} x {self.grams.width}) cannot be factorised with damping="
                f"{self.grams.damping:g}, safety_weight={self.strength.safety_weight:g}, past_weight="
                f"{self.strength.past_weight:g}: {tried}. Use more calibration tokens or a larger damping."
            )

    def _solve(self, rows: Tensor) -> Tensor:
        """weights[0] * rows (A + K scaled)^-1; the scale of A + K drops out against that of the rows."""
        with ieee_matmul():
            z = torch.linalg.solve_triangular(self._factor, rows.T, upper=False)
            y = torch.linalg.solve_triangular(self._factor.T, z, upper=True)
        return y.T.mul_(self._weights[0])

    def _residual(self, x: Tensor, y: Tensor) -> Tensor:
        """x A - y (A + K) = (x - y) A - y K, in float64."""
        gap, tau, first = x - y, self.grams.tau, self._weights[0]
        ridge = self.grams.task_ridge(x.dtype)
        out = gap * ridge - y * (self._ridge / first - ridge)
        pairs = [(gap / tau, self.grams.task)]
        pairs += [(y * (-weight / first / tau), gram) for weight, gram in self._terms[1:]]
        return self.grams.add_products_(out, pairs)

    def _correction(self, x: Tensor, y: Tensor) -> Tensor:
        """What the residual says is missing in y, in float64."""
        residual = self._residual(x, y)
        # The residual may lie below what float32 can hold.
        size = float(residual.abs().max())
        if size == 0:
            return residual
        return self._solve(residual.div_(size).to(self._factor.dtype)).double().mul_(size)

    def _sketch_error(self, x: Tensor, y: Tensor) -> float:
        """Relative error of y, measured on random combinations of its rows: a few float64 products of (c, c)."""
        k = x.shape[0]
        generator = torch.Generator().manual_seed(0)
        mix = torch.randn(min(_SKETCH_ROWS, k), k, generator=generator, dtype=torch.float64).to(x.device)
        if k <= _SKETCH_ROWS:
            mix = torch.eye(k, dtype=torch.float64, device=x.device)
        sketch, found = _mix(mix, x), _mix(mix, y)
        return _relative(self._correction(sketch, found), found)

    def _refine(self, x: Tensor, y: Tensor) -> Tensor | None:
        """Iterative refinement: float64 residuals, float32 factor. None where it does not converge."""
        last = math.inf
        for _ in range(_MAX_STEPS):
            step = self._correction(x, y)
            size = _relative(step, y)
            y = y.add_(step)
            # A step that is `ratio` times the one before leaves an error of about ratio times itself.
            ratio = size / last if math.isfinite(last) else size
            self.error = size * min(1.0, ratio)
            if self.error <= _TOLERANCE * 1e-2:
                return y
            if not size <= 0.5 * last or size > 0.5:
                return None
            last = size
        return None


def anchor_weight(
    w_prev: Float[Tensor, "r c"],
    w_new: Float[Tensor, "r c"],
    task_gram: Float[Tensor, "c c"],
    safety_gram: Float[Tensor, "c c"],
    past_gram: Float[Tensor, "c c"] | None = None,
    *,
    safety_weight: float = 1.0,
    past_weight: float = 0.3,
    damping: float = 0.03,
) -> Float[Tensor, "r c"]:
    """W_old + D A (A + K)^-1, the anchored edit of one linear layer; see the module.

    Args:
        w_prev, w_new: the layer before and after the task, any floating dtypes; the result is rounded once.
        task_gram, safety_gram, past_gram: (c, c) second moments of its inputs. past_gram None: no past term, mu_p = 0.
        safety_weight, past_weight: mu_s, mu_p, 0 or more. Both 0: `w_new`, bit for bit.
        damping: lam, in units of tau = mean diag of task_gram; 0 or more.

    Returns: (r, c), the dtype of `w_new`, on its device; a new tensor.

    Raises: ValueError: shapes, dtypes, devices, weights, an asymmetric Gram. NumericalError: NaN or inf, a zero Gram,
    or A + K is not positive definite (too little damping for too few tokens).
    """
    strength = AnchorStrength(safety_weight=safety_weight, past_weight=past_weight)
    check_pair(w_prev, w_new)
    grams = AnchorGrams(task_gram, safety_gram, past_gram, damping=damping)
    _check_change("w_prev", w_prev, grams)
    _check_change("w_new", w_new, grams)
    if grams.weights(strength)[0] == 1.0:
        return w_new.detach().clone()
    return grams.factor(strength).edit_weight(w_prev, w_new)


def anchor_lora(
    lora_a: Float[Tensor, "rank c"],
    task_gram: Float[Tensor, "c c"],
    safety_gram: Float[Tensor, "c c"],
    past_gram: Float[Tensor, "c c"] | None = None,
    *,
    safety_weight: float = 1.0,
    past_weight: float = 0.3,
    damping: float = 0.03,
) -> Float[Tensor, "rank c"]:
    """A_lora A (A + K)^-1: the anchored edit of a LoRA layer, D = s B A_lora, exactly; B and s stay as they are.

    Neither the base nor B is read. Arguments and errors as `anchor_weight`; both weights 0 give `lora_a`, bit for bit.

    Returns: (rank, c), the dtype of `lora_a`, on its device; a new tensor.
    """
    strength = AnchorStrength(safety_weight=safety_weight, past_weight=past_weight)
    grams = AnchorGrams(task_gram, safety_gram, past_gram, damping=damping)
    return next(iter(anchor_lora_grid([lora_a], grams, [strength])))[0]


def anchor_lora_grid(
    lora_as: Sequence[Float[Tensor, "rank c"]], grams: AnchorGrams, strengths: Iterable[AnchorStrength]
) -> Iterator[list[Float[Tensor, "rank c"]]]:
    """`anchor_lora` of all layers that share an input (q, k and v, say), for one strength after another.

    One factor is alive at a time, and the product with A is made once for all strengths.

    Yields: for each strength, the edited A of each layer, in its dtype, on its device.

    Raises: ValueError: no layer, or factors that do not fit the Gram matrices.
    """
    if not lora_as:
        raise ValueError("found no lora_a; expected at least one.")
    for position, a in enumerate(lora_as):
        _check_change(f"lora_a {position}" if len(lora_as) > 1 else "lora_a", a, grams)
    stacked = torch.cat([a.detach().to(grams.device, grams.dtype) for a in lora_as])
    product = grams.task_product(stacked)
    for strength in strengths:
        if grams.weights(strength)[0] == 1.0:
            yield [a.detach().clone() for a in lora_as]
            continue
        kept = grams.factor(strength).apply(stacked, product)
        yield [
            rows.to(a.device, a.dtype, copy=True)
            for rows, a in zip(kept.split([a.shape[0] for a in lora_as]), lora_as, strict=True)
        ]


def _mix(mix: Tensor, rows: Tensor) -> Tensor:
    """mix rows in float64, widening a strip at a time."""
    out = torch.zeros(mix.shape[0], rows.shape[1], dtype=torch.float64, device=rows.device)
    for start in range(0, rows.shape[0], 512):
        out.addmm_(mix[:, start : start + 512], rows[start : start + 512].double())
    return out


def _relative(part: Tensor, whole: Tensor) -> float:
    size = float(torch.linalg.vector_norm(whole))
    step = float(torch.linalg.vector_norm(part))
    if step == 0:
        return 0.0
    return step / size if size > 0 else math.inf


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r}; expected a finite number, 0 or more.")


def _check_change(name: str, change: Tensor, grams: AnchorGrams) -> None:
    if change.ndim != 2 or change.shape[1] != grams.width:
        raise ValueError(
            f"{name} is {tuple(change.shape)} and the Gram matrices are ({grams.width}, {grams.width}); expected "
            f"(rows, {grams.width}). The calibration is of another layer or model."
        )
    if not change.is_floating_point():
        raise ValueError(f"{name} is {change.dtype}; expected floating point. Dequantise a quantised weight first.")
    if not bool(torch.isfinite(change).all()):
        i, j = (int(k) for k in (~torch.isfinite(change)).nonzero()[0])
        raise NumericalError(
            f"{name} holds {float(change[i, j])} at ({i}, {j}); the checkpoint is damaged or its training diverged. "
            "Nothing was edited."
        )


def _tiles(width: int) -> list[slice]:
    return [slice(start, min(width, start + _TILE)) for start in range(0, width, _TILE)]


def _looks_symmetric(gram: Tensor, root: Tensor) -> bool:
    """Whether H and H^T agree on a vector of random signs, scaled so that every column counts alike.

    Two passes of reading. Float32 sums leave 1e-4 of it in doubt, so entries that are off by less than about 1e-3 of
    sqrt(H_ii H_jj) pass; NaN, infinities, missing triangles and entries of inputs that were never seen do not.
    """
    wide = gram.dtype if gram.dtype in (torch.float32, torch.float64) else torch.float32
    signs = torch.randint(0, 2, root.shape, generator=torch.Generator().manual_seed(0)).to(root) * 2 - 1
    inverse = torch.where(root > 0, root.reciprocal(), 0.0)
    vector = (signs * inverse).to(wide)
    with ieee_matmul():
        if gram.dtype == wide:
            right, left = gram @ vector, vector @ gram
        else:
            right, left = torch.zeros_like(vector), torch.zeros_like(vector)
            for start in range(0, len(root), _TILE):
                rows = gram[start : start + _TILE].to(wide)
                right[start : start + _TILE] = rows @ vector
                left += vector[start : start + _TILE] @ rows
    right, left = right.double(), left.double()
    close = (right - left).abs() <= 10 * _ASYMMETRY * root
    bounded = right.abs() <= (1 + _EXCESS) * len(root) * root
    return bool((close & bounded).all())


def _check_gram(name: str, gram: Tensor, first: Tensor) -> None:
    """Square, of one width, finite, symmetric, and nothing that X^T X cannot be.

    Entry by entry on a narrow matrix; a wide one is asked by a product with random signs, and entry by entry only when
    that finds something.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.shape != first.shape or gram.shape[0] == 0:
        raise ValueError(
            f"{name} is {tuple(gram.shape)}; expected a square matrix (c, c), as task_gram {tuple(first.shape)}."
        )
    if not gram.is_floating_point():
        raise ValueError(f"{name} is {gram.dtype}; expected floating point.")
    if gram.device != first.device:
        raise ValueError(f"{name} is on {gram.device} and task_gram on {first.device}; expected one device.")
    c = gram.shape[0]
    diagonal = gram.diagonal().double()
    if bool((diagonal < 0).any()):
        j = int((diagonal < 0).nonzero()[0])
        raise NumericalError(
            f"{name} has {float(diagonal[j])} on its diagonal at {j}; a mean of 2 x x^T has none below 0."
        )
    root = diagonal.sqrt()
    if bool((diagonal > 0).any()) and c > _WIDE_COLUMNS and _looks_symmetric(gram, root):
        return
    for start in range(0, c, _TILE):
        stop = min(c, start + _TILE)
        left, above = gram[start:stop, :stop].double(), gram[:stop, start:stop].T.double()
        limit = root[start:stop, None] * root[None, :stop]
        asymmetric = ~((left - above).abs() <= _ASYMMETRY * limit)
        excess = ~(left.abs() <= (1 + _EXCESS) * limit)
        if not bool(asymmetric.any()) and not bool(excess.any()):
            continue
        for part, shift, flip in ((left, start, False), (above, start, True)):
            bad = (~torch.isfinite(part)).nonzero()
            if len(bad):
                i, j = int(bad[0, 0]) + shift, int(bad[0, 1])
                i, j = (j, i) if flip else (i, j)
                raise NumericalError(
                    f"{name} holds {float(gram[i, j])} at ({i}, {j}): an activation was NaN or infinite. Run the model "
                    "in float32 or bfloat16, and check its weights."
                )
        if bool(asymmetric.any()):
            i, j = (int(k) for k in asymmetric.nonzero()[0])
            raise ValueError(
                f"{name} is not symmetric: {float(left[i, j])} at ({i + start}, {j}), {float(above[i, j])} at "
                f"({j}, {i + start}). A triangle alone must be mirrored first."
            )
        i, j = (int(k) for k in excess.nonzero()[0])
        raise NumericalError(
            f"{name} is not X^T X: {float(left[i, j])} at ({i + start}, {j}) exceeds the root of its diagonal entries "
            f"{float(diagonal[i + start])} and {float(diagonal[j])}."
        )
    if not bool((diagonal > 0).any()):
        raise NumericalError(
            f"{name} is zero: no input of that kind reached this layer, or all of them were 0. Calibrate on samples "
            "that reach it, or leave the layer out (past_gram=None where there is no past)."
        )
