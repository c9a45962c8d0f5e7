"""A weight change seen by input column: measured in one pass over the rows, applied in another, little memory in both.

W_prev and W_new are (r, c) = (out, in). An edit that keeps or adjusts whole columns needs, of the change
D = W_new - W_prev, three numbers per column only. Both passes go over strips of rows that fit a cache, in float32 (or
float64 if a weight is), so bf16 and fp16 checkpoints are widened a strip at a time and rounded once, at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from holdfast.errors import NumericalError
from holdfast.functional.factorize import ieee_matmul


@dataclass(frozen=True, kw_only=True, eq=False)
class ColumnChange:
    """What an edit by columns needs to know of D = W_new - W_prev; float64, on the CPU.

    energy: (c,) mean_i D_ij^2. dot: (c,) sum_i D_ij W_ij with W = W_prev, or None where W_prev was not read.
    square: (c,) sum_i W_ij^2, or None likewise. rows: r.
    """

    energy: Float[Tensor, " c"]
    dot: Float[Tensor, " c"] | None
    square: Float[Tensor, " c"] | None
    rows: int

    @property
    def columns(self) -> int:
        """c, the number of input columns."""
        return int(self.energy.shape[0])

    @property
    def norm(self) -> float:
        """||D||_F."""
        return float((self.energy.sum() * self.rows).sqrt())

    def relative(self) -> float | None:
        """||D||_F / ||W_prev||_F; None where W_prev was not read or is zero."""
        total = 0.0 if self.square is None else float(self.square.sum())
        return self.norm / math.sqrt(total) if total > 0 else None

    def cosine(self) -> float | None:
        """<W_new, W_prev> / (||W_new|| ||W_prev||); None where W_prev was not read, or a weight is zero.

        Near 0 for weights that have nothing to do with each other, however large a change is otherwise.
        """
        if self.dot is None or self.square is None:
            return None
        dot, square = float(self.dot.sum()), float(self.square.sum())
        new = self.norm**2 + 2 * dot + square
        return (dot + square) / math.sqrt(new * square) if new > 0 and square > 0 else None

    def coefficient(self) -> float:
        """<D, W_prev>_F / ||W_prev||_F^2; 0 for a zero weight."""
        dot, square = self._projection()
        total = float(square.sum())
        return float(dot.sum()) / total if total > 0 else 0.0

    def column_coefficients(self) -> Float[Tensor, " c"]:
        """<D_j, W_j> / ||W_j||^2 for each column; 0 where the column of W_prev is zero."""
        dot, square = self._projection()
        return torch.where(square > 0, dot / square.clamp_min(torch.finfo(torch.float64).tiny), 0.0)

    def distance(self, kept: Bool[Tensor, " c"], coefficient: float | Tensor = 0.0) -> float:
        """||W_hat - W_prev||_F of the edit that keeps `kept` and adds D - coefficient * W_prev elsewhere.

        kept: (c,) bool. coefficient: one number, or (c,).

        Raises: ValueError: a coefficient is given and W_prev was not read.
        """
        moved = self.energy * self.rows
        if isinstance(coefficient, Tensor) or coefficient != 0.0:
            dot, square = self._projection()
            moved = moved - 2 * coefficient * dot + coefficient * coefficient * square
        return float(moved[~kept.cpu()].clamp_min(0).sum().sqrt())

    def reverted(self, kept: Bool[Tensor, " c"]) -> float:
        """Share of ||D||^2 that lies in the kept columns, 0..1; 0 for D = 0."""
        total = float(self.energy.sum())
        return float(self.energy[kept.cpu()].sum()) / total if total > 0 else 0.0

    def _projection(self) -> tuple[Tensor, Tensor]:
        if self.dot is None or self.square is None:
            raise ValueError("the projection needs W_prev, which was not read; pass it, or use orthogonal=False.")
        return self.dot, self.square


def measure_change(
    w_prev: Float[Tensor, "r c"], w_new: Float[Tensor, "r c"], *, projection: bool = True
) -> ColumnChange:
    """Column statistics of W_new - W_prev, in one pass.

    Args:
        projection: also measure <D, W_prev> and ||W_prev||^2 (about twice the work).

    Raises: ValueError: shapes or devices differ. NumericalError: NaN or inf in a weight.
    """
    check_pair(w_prev, w_new)
    rows, columns = w_prev.shape
    strip, wide = strip_rows(w_prev), wide_dtype(w_prev, w_new)
    delta = torch.empty(min(strip, rows), columns, dtype=wide, device=w_prev.device)
    prev = torch.empty_like(delta)
    energy = _ColumnSum(delta)
    dot, square = (_ColumnSum(delta), _ColumnSum(delta)) if projection else (None, None)
    for start in range(0, rows, strip):
        stop = min(rows, start + strip)
        d, w = delta[: stop - start], prev[: stop - start]
        d.copy_(w_new[start:stop])
        w.copy_(w_prev[start:stop])
        d.sub_(w)
        energy.add(d, d)
        if dot is not None and square is not None:
            dot.add(d, w)
            square.add(w, w)
    n = energy.total() / rows
    _require_finite(n, w_prev=w_prev, w_new=w_new)
    return ColumnChange(
        energy=n.cpu(),
        dot=None if dot is None else dot.total().cpu(),
        square=None if square is None else square.total().cpu(),
        rows=rows,
    )


class _ColumnSum:
    """Sums of products along columns, over strips of rows.

    Products are added strip onto strip in the working precision, and every 64 strips into a float64 total: one long
    float32 sum would be 3e-4 off, a float64 sum of everything several times slower.
    """

    def __init__(self, strip: Tensor) -> None:
        self._partial = torch.zeros_like(strip)
        self._total = torch.zeros(strip.shape[1], dtype=torch.float64, device=strip.device)
        self._strips = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        self._partial[: x.shape[0]].addcmul_(x, y)
        self._strips += 1
        if self._strips == 64:
            self.total()

    def total(self) -> Tensor:
        self._total += self._partial.sum(0, dtype=torch.float64)
        self._partial.zero_()
        self._strips = 0
        return self._total


def measure_lora(
    lora_a: Float[Tensor, "k c"],
    lora_b: Float[Tensor, "r k"],
    scaling: float,
    w_prev: Float[Tensor, "r c"] | None = None,
) -> ColumnChange:
    """Column statistics of D = scaling * B A without forming it.

    n_j = scaling^2 a_j^T (B^T B) a_j / r with a_j the j-th column of A; <D, W>_j = scaling a_j^T (B^T W)_j.

    Args:
        w_prev: read once, in strips, for the projection; None: the base is not read.

    Raises: ValueError: shapes do not fit. NumericalError: NaN or inf in a factor or in the base.
    """
    check_lora(lora_a, lora_b, w_prev)
    rows, rank = lora_b.shape
    # Small layers in float64, where it costs nothing; at 7B shapes float32 is what keeps the whole model under 1 s.
    small = (rows + lora_a.shape[1]) * rank * rank < 2**24
    wide = torch.float64 if small else wide_dtype(lora_a, lora_b)
    a, b = lora_a.to(wide), lora_b.to(wide)
    with ieee_matmul():
        energy = ((b.T @ b) @ a).mul_(a).sum(0).double() * (scaling**2 / rows)
    # A semi-definite form; rounding may leave -1e-20 where a column of D is zero.
    energy = energy.clamp_min_(0) if bool(torch.isfinite(energy).all()) else energy
    if not bool(torch.isfinite(energy).all()):
        if not bool(torch.isfinite(lora_b).all()):
            raise NumericalError("NaN or inf in lora_b; the training that made it diverged. Nothing was edited.")
        _require_finite(energy, lora_a=lora_a)
    dot = square = None
    if w_prev is not None:
        device, columns = w_prev.device, lora_a.shape[1]
        product = torch.zeros(rank, columns, dtype=wide, device=device)
        strip = strip_rows(w_prev)
        buffer = torch.empty(min(strip, rows), columns, dtype=wide, device=device)
        squares = _ColumnSum(buffer)
        with ieee_matmul():
            for start in range(0, rows, strip):
                stop = min(rows, start + strip)
                w = buffer[: stop - start].copy_(w_prev[start:stop])
                product.addmm_(b[start:stop].T.to(device), w)
                squares.add(w, w)
        square = squares.total()
        _require_finite(square, w_prev=w_prev)
        dot = (product.mul_(a.to(product.device)).sum(0).double() * scaling).cpu()
        square = square.cpu()
    return ColumnChange(energy=energy.cpu(), dot=dot, square=square, rows=rows)


def apply_columns(
    w_prev: Float[Tensor, "r c"],
    w_new: Float[Tensor, "r c"],
    kept: Bool[Tensor, " c"],
    *,
    coefficient: float | Float[Tensor, " c"] = 0.0,
    out: Float[Tensor, "r c"] | None = None,
) -> Float[Tensor, "r c"]:
    """W_prev on the kept columns, bit for bit; W_new - coefficient * W_prev on all others.

    Args:
        coefficient: one number, or one per column.
        out: where the result goes; may be `w_new` or `w_prev` itself. By default a new tensor of the wider of the two
            dtypes. A narrower `out` is rounded to once.

    Raises: ValueError: shapes or devices differ, or `kept` is no bool of shape (c,).
    """
    check_pair(w_prev, w_new)
    rows, columns = w_prev.shape
    if kept.shape != (columns,) or kept.dtype != torch.bool:
        raise ValueError(f"found kept {tuple(kept.shape)}, {kept.dtype}; expected bool of shape ({columns},).")
    if out is None:
        out = torch.empty_like(w_prev, dtype=torch.promote_types(w_prev.dtype, w_new.dtype))
    elif out.shape != w_prev.shape:
        raise ValueError(f"found out of shape {tuple(out.shape)}; expected {tuple(w_prev.shape)}.")
    kept = kept.to(w_prev.device)
    plain = not isinstance(coefficient, Tensor) and coefficient == 0.0
    wide = wide_dtype(w_prev, w_new)
    strip = strip_rows(w_prev)
    adjusted = torch.empty(min(strip, rows), columns, dtype=wide, device=w_prev.device)
    widened = torch.empty_like(adjusted)
    factor = coefficient.to(widened) if isinstance(coefficient, Tensor) else coefficient
    for start in range(0, rows, strip):
        stop = min(rows, start + strip)
        prev, target = w_prev[start:stop], out[start:stop]
        if plain:
            target.copy_(torch.where(kept, prev, w_new[start:stop]))
            continue
        new, old = adjusted[: stop - start], widened[: stop - start]
        new.copy_(w_new[start:stop])
        old.copy_(prev)
        if isinstance(factor, Tensor):
            new.addcmul_(old, factor, value=-1)
        else:
            new.sub_(old, alpha=factor)
        target.copy_(torch.where(kept, old, new, out=new))
    return out


def strip_rows(weight: Tensor) -> int:
    """Rows per strip: about 2^18 numbers on a CPU (they stay in its cache), 2^24 on an accelerator.

    At most 1024 rows on a CPU, which adds along a column one by one; an accelerator adds in a tree.

    weight: (r, c).
    """
    if weight.device.type == "cpu":
        return min(1024, max(1, 2**18 // max(1, weight.shape[1])))
    return max(1, 2**24 // max(1, weight.shape[1]))


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 if any of the tensors is."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_pair(w_prev: Tensor, w_new: Tensor) -> None:
    """Two weights of one layer. Raises: ValueError.

    w_prev, w_new: (r, c). A ValueError says which shape, device or type was found and which was expected.
    """
    if w_prev.ndim != 2 or w_prev.shape != w_new.shape:
        raise ValueError(
            f"w_prev is {tuple(w_prev.shape)} and w_new is {tuple(w_new.shape)}; expected one shape (r, c) = (out, in)."
        )
    if w_prev.device != w_new.device:
        raise ValueError(f"w_prev is on {w_prev.device} and w_new on {w_new.device}; expected one device.")
    for name, w in (("w_prev", w_prev), ("w_new", w_new)):
        if not w.is_floating_point():
            raise ValueError(f"{name} is {w.dtype}; expected floating point. Dequantise a quantised weight first.")


def check_lora(lora_a: Tensor, lora_b: Tensor, w_prev: Tensor | None = None) -> None:
    """Two factors of one layer, and its weight. Raises: ValueError.

    lora_a: (rank, c). lora_b: (r, rank). w_prev: (r, c), or None where the base is not read.
    """
    if lora_a.ndim != 2 or lora_b.ndim != 2 or lora_a.shape[0] != lora_b.shape[1]:
        raise ValueError(
            f"lora_a is {tuple(lora_a.shape)} and lora_b is {tuple(lora_b.shape)}; expected (rank, c) and (r, rank)."
        )
    shape = (lora_b.shape[0], lora_a.shape[1])
    if w_prev is not None and tuple(w_prev.shape) != shape:
        raise ValueError(f"w_prev is {tuple(w_prev.shape)}; B A is {shape}. The adapter is of another layer.")


def _require_finite(per_column: Tensor, **sources: Tensor) -> None:
    if bool(torch.isfinite(per_column).all()):
        return
    column = int((~torch.isfinite(per_column)).nonzero()[0])
    culprits = [name for name, s in sources.items() if not bool(torch.isfinite(s[:, column]).all())]
    raise NumericalError(
        f"NaN, inf or an overflow in input column {column} of {' and '.join(culprits or sources)}; the checkpoint is "
        "damaged or its training diverged. Nothing was edited."
    )
