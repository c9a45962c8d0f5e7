"""Triangular inverses of symmetric positive definite matrices, in place, on the lower triangle only.

Everything here works on one row-major (c, c) buffer: the lower triangle is overwritten, the strict upper triangle is
never touched. A symmetric matrix therefore carries its own backup, and a factorisation that destroyed it (or failed
half-way) is undone at O(c^2) by `restore_from_upper_`: no second c x c buffer, neither for the inverse nor for a retry.

Two engines give the same numbers to rounding: LAPACK's potrf + trtri through scipy (CPU, where scipy is installed), and
a recursion made of matrix products that runs wherever torch runs. docs/design/inverse-diagonal.md has the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

Engine = Literal["auto", "lapack", "blocked"]

# Rows added together before they enter a float64 sum: 16 / c of the matrix is all the memory that the sums cost.
_STRIP_ROWS = 16


class NotPositiveDefiniteError(ArithmeticError):
    """A leading minor is not positive; internal: the callers retry, or raise NumericalError with the whole story."""


@contextmanager
def ieee_matmul() -> Iterator[None]:
    """Float32 products in float32 while the block runs, whatever the process asked for (TF32, bf16 products).

    Trainers switch TF32 on for the whole process; ten bits of mantissa make a damped Gram matrix indefinite.
    """
    with _float32_products("ieee", "cuda", "mkldnn"):
        yield


@contextmanager
def _float32_products(precision: str, *names: str) -> Iterator[None]:
    """Float32 products of the backends `names` in `precision` ("ieee", "bf16") while the block runs."""
    backends: list[Any] = [getattr(torch.backends, name).matmul for name in names]
    previous = [b.fp32_precision for b in backends]
    for backend in backends:
        backend.fp32_precision = precision
    try:
        yield
    finally:
        for backend, value in zip(backends, previous, strict=True):
            backend.fp32_precision = value


def add_gram_(total: Float[Tensor, "c c"], x: Float[Tensor, "n c"]) -> None:
    """total += x^T x on the lower triangle (and on nothing above the diagonal blocks but their own squares).

    Half the products of a full matrix product: x^T x is symmetric. What lies above the diagonal is unspecified
    afterwards until `mirror_lower_` is called. x may be narrower than the total (bf16, fp16); sums are the total's.
    """
    c = total.shape[0]
    on_cpu = total.device.type == "cpu"
    # Narrow blocks waste less on the diagonal; 256 is where the product itself slows down on a CPU.
    width = 256 if on_cpu else 2048
    # Tensor cores multiply bf16 and fp16 exactly and add in float32; a CPU does so through a float32 copy of the input.
    mixed = not on_cpu and total.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)
    # The copy of a bf16 input holds bf16 numbers; multiplied as bf16 nothing is rounded, and sums stay float32.
    lossless = on_cpu and total.dtype == torch.float32 and x.dtype == torch.bfloat16
    x = x if mixed else x.to(total.dtype)
    with _float32_products("bf16", "mkldnn") if lossless else nullcontext():
        for start in range(0, c, width):
            stop = min(c, start + width)
            left, right, block = x[:, start:stop].T, x[:, :stop], total[start:stop, :stop]
            if mixed:
                block.add_(torch.mm(left, right, out_dtype=torch.float32))
            else:
                block.addmm_(left, right)


def mirror_lower_(matrix: Float[Tensor, "c c"]) -> None:
    """Copy the strict lower triangle onto the upper one."""
    _copy_triangle_(matrix, lower_to_upper=True)


def restore_from_upper_(matrix: Float[Tensor, "c c"], diagonal: Float[Tensor, " c"]) -> None:
    """Copy the strict upper triangle onto the lower one and write the diagonal back."""
    _copy_triangle_(matrix, lower_to_upper=False)
    matrix.diagonal().copy_(diagonal)


def _copy_triangle_(matrix: Tensor, *, lower_to_upper: bool) -> None:
    c = matrix.shape[0]
    step = _block_width(matrix)
    for start in range(0, c, step):
        stop = min(c, start + step)
        below, right = matrix[stop:, start:stop], matrix[start:stop, stop:]
        square = matrix[start:stop, start:stop]
        if lower_to_upper:
            right.copy_(below.T)
            square.copy_(square.tril() + square.tril(-1).T)
        else:
            below.copy_(right.T)
            square.copy_(square.triu() + square.triu(1).T)


def factor_(matrix: Float[Tensor, "c c"], *, engine: Engine = "auto") -> None:
    """Overwrite the lower triangle of a positive definite matrix M = L L^T by L; above it is unspecified afterwards.

    Args:
        matrix: contiguous, float32 or float64; only its lower triangle is read. c^3 / 3 flops.
        engine: "lapack" (CPU, needs scipy: no copy), "blocked" (torch only: a second matrix) or "auto".

    Raises: NotPositiveDefiniteError.
    """
    check_square(matrix)
    lapack = _lapack(matrix, invert=False) if engine != "blocked" else None
    if engine == "lapack" and lapack is None:
        raise ValueError("engine='lapack' needs a CPU tensor and scipy; use engine='blocked' or 'auto'.")
    if lapack is not None:
        lapack()
        return
    with ieee_matmul():
        factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0:
        raise NotPositiveDefiniteError(f"leading minor {int(info)} is not positive")
    matrix.copy_(factor)


def invert_factor_(matrix: Float[Tensor, "c c"], *, engine: Engine = "auto") -> None:
    """Overwrite the lower triangle of a positive definite matrix M = L L^T by L^-1; the strict upper one is kept.

    Args:
        matrix: contiguous, float32 or float64; only its lower triangle is read. 2 c^3 / 3 flops.
        engine: "lapack" (CPU, needs scipy), "blocked" (torch only) or "auto".

    Raises: NotPositiveDefiniteError: the lower triangle is then half-way; the upper one is intact.
    """
    check_square(matrix)
    lapack = _lapack(matrix) if engine != "blocked" else None
    if engine == "lapack" and lapack is None:
        raise ValueError("engine='lapack' needs a CPU tensor and scipy; use engine='blocked' or 'auto'.")
    if lapack is not None:
        lapack()
    else:
        with ieee_matmul():
            _invert_blocked_(matrix, _block_width(matrix))


def column_square_sums(factor: Float[Tensor, "c c"]) -> Float[Tensor, " c"]:
    """Sum of squares of each column of the lower triangle: strip onto strip in its own dtype, then in float64.

    With factor = L^-1 this is diag((L L^T)^-1).
    """
    c = factor.shape[0]
    total = torch.zeros(c, dtype=torch.float64, device=factor.device)
    partial = torch.zeros(_STRIP_ROWS, c, dtype=factor.dtype, device=factor.device)
    for number, start in enumerate(range(0, c, _STRIP_ROWS)):
        stop = min(c, start + _STRIP_ROWS)
        left, corner = factor[start:stop, :start], factor[start:stop, start:stop].tril()
        partial[: stop - start, :start].addcmul_(left, left)
        partial[: stop - start, start:stop].addcmul_(corner, corner)
        if number % 64 == 63:
            _add_rows_(total, partial)
            partial.zero_()
    return _add_rows_(total, partial)


def _add_rows_(total: Tensor, rows: Tensor) -> Tensor:
    """Row by row: a sum in float64 would widen all of them at once."""
    for row in rows:
        total += row
    return total


def _lapack(matrix: Tensor, *, invert: bool = True) -> Callable[[], None] | None:
    """potrf, and trtri after it, on the tensor's own memory, or None where they do not apply."""
    if matrix.device.type != "cpu":
        return None
    try:
        from scipy.linalg import lapack
    except ImportError:
        return None
    prefix = "s" if matrix.dtype == torch.float32 else "d"
    potrf, trtri = getattr(lapack, prefix + "potrf"), getattr(lapack, prefix + "trtri")
    # Row-major lower is column-major upper: the transposed view is what Fortran sees, without a copy.
    view = matrix.detach().numpy().T

    def run() -> None:
        factor, info = potrf(view, lower=0, overwrite_a=1, clean=0)
        if info == 0 and invert:
            factor, info = trtri(factor, lower=0, overwrite_c=1)
        if info == 0 and factor.ctypes.data != matrix.data_ptr():
            raise RuntimeError("scipy's LAPACK wrapper copied a matrix that was to be overwritten in place.")
        if info > 0:
            raise NotPositiveDefiniteError(f"leading minor {info} is not positive")
        if info < 0:
            raise RuntimeError(f"LAPACK refused argument {-info}.")

    return run


def _invert_blocked_(a: Tensor, width: int) -> None:
    """L^-1 by halves. With M = L^-1: M11, then L21 = A21 M11^T, A22 -= L21 L21^T, M22, and M21 = -M22 L21 M11."""
    n = a.shape[0]
    if n <= width:
        factor, info = torch.linalg.cholesky_ex(a)
        if int(info) != 0:
            raise NotPositiveDefiniteError(f"leading minor {int(info)} of a diagonal block is not positive")
        eye = torch.eye(n, dtype=a.dtype, device=a.device)
        inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
        a.copy_(inverse.tril_().add_(a.triu(1)))
        return
    half = width * max(1, round(n / (2 * width)))
    m11, a21, a22 = a[:half, :half], a[half:, :half], a[half:, half:]
    _invert_blocked_(m11, width)
    # A21 <- A21 M11^T, right to left: a column block needs only itself and what lies left of it.
    for start, stop in reversed(_blocks(half, width)):
        new = a21[:, start:stop] @ m11[start:stop, start:stop].tril().T
        a21[:, start:stop] = new.addmm_(a21[:, :start], m11[start:stop, :start].T)
    for start, stop in _blocks(n - half, width):
        rows = a21[start:stop]
        a22[start:stop, :start].addmm_(rows, a21[:start].T, alpha=-1)
        a22[start:stop, start:stop] -= (rows @ rows.T).tril_()
    _invert_blocked_(a22, width)
    # A21 <- A21 M11, left to right; then A21 <- -M22 A21, bottom up.
    for start, stop in _blocks(half, width):
        new = a21[:, start:stop] @ m11[start:stop, start:stop].tril()
        a21[:, start:stop] = new.addmm_(a21[:, stop:], m11[stop:, start:stop])
    for start, stop in reversed(_blocks(n - half, width)):
        new = a22[start:stop, start:stop].tril() @ a21[start:stop]
        a21[start:stop] = new.addmm_(a22[start:stop, :start], a21[:start]).neg_()


def _blocks(size: int, width: int) -> list[tuple[int, int]]:
    return [(start, min(size, start + width)) for start in range(0, size, width)]


def _block_width(matrix: Tensor) -> int:
    """Width of a panel: 3 % of the matrix on a CPU, where memory is the point; wide enough to be fast on a GPU."""
    if matrix.device.type != "cpu":
        return 512
    return max(32, min(384, matrix.shape[0] // 32 // 16 * 16))


def check_square(matrix: Tensor) -> None:
    """Refuse what cannot be factorised in place.

    matrix: (c, c), contiguous, float32 or float64.

    Raises: ValueError: another shape, layout or type.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.is_contiguous():
        raise ValueError(
            f"expected a contiguous square matrix (c, c), found shape {tuple(matrix.shape)}, strides {matrix.stride()}."
        )
    if matrix.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expected float32 or float64, found {matrix.dtype}; bf16 sums cannot be factorised.")
