"""Diagonals and factors of the inverse of a damped Hessian, with an explicit policy for matrices that do not factorise.

    diag((H + lam I)^-1),   lam = damping * mean(diag H),   a dead input (H_jj = 0) counts as H_jj = 1

Source: HPA (arXiv 2511.20158) and its ancestors: OBS (Hassibi and Stork 1993), GPTQ and SparseGPT (Frantar et al.).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.errors import NumericalError
from holdfast.functional.factorize import (
    Engine,
    NotPositiveDefiniteError,
    add_gram_,
    check_square,
    column_square_sums,
    ieee_matmul,
    invert_factor_,
    restore_from_upper_,
)

OnFailure = Literal["error", "retry"]

# Share of a column that must survive 1 - z in the dual form (float64) to leave eight correct digits.
_DUAL_FLOOR = 1e-8


@dataclass(frozen=True, kw_only=True, eq=False)
class InverseDiagonal:
    """diag((H + lam I)^-1) and how it was obtained.

    values: (c,), float32, positive. damping: the damping that worked (equal to `requested_damping` unless a fallback
    was taken). lam: the absolute damping. shrinkage: weight of the diagonal target. form: "primal" (c x c) or
    "dual" (tokens x tokens). dead_inputs: columns that never saw a signal. fallbacks: what had to be tried before it
    worked, in order; empty when nothing failed.
    """

    values: Float[Tensor, " c"]
    damping: float
    requested_damping: float
    lam: float
    shrinkage: float
    form: Literal["primal", "dual"]
    dead_inputs: int
    fallbacks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Ridge:
    """S + diag(added), scaled: H_shrunk + lam I = scale * (1 - shrinkage) * (S + diag(added))."""

    added: Tensor
    scale: float
    lam: float


def ridge(diagonal: Float[Tensor, " c"], *, scale: float, damping: float, shrinkage: float) -> _Ridge:
    """What must be added to the diagonal of S so that it stands for the damped, shrunk H = scale * S.

    Shrinkage pulls H towards its own diagonal, (1 - rho) H + rho diag(H): few tokens inflate an inverse, by about
    N / (N - c - 1), and this tames the correlations without touching the scale of any column.

    Raises: ValueError: damping or shrinkage out of range. NumericalError: the diagonal is not finite, or negative.
    """
    if not damping >= 0 or not 0 <= shrinkage < 1:
        raise ValueError(f"expected damping >= 0 and 0 <= shrinkage < 1, found {damping} and {shrinkage}.")
    diagonal = diagonal.double()
    if not bool(torch.isfinite(diagonal).all()):
        j = int((~torch.isfinite(diagonal)).nonzero()[0])
        raise NumericalError(
            f"The Gram matrix holds {float(diagonal[j])} at input column {j}: an activation was NaN or infinite. "
            "Run the model in float32 or bfloat16, and check its weights."
        )
    if bool((diagonal < 0).any()):
        raise NumericalError(f"The Gram matrix has a negative diagonal ({float(diagonal.min())}); it is not X^T X.")
    # lam is taken before dead inputs count as 1: otherwise an arbitrary constant would set the damping of live ones.
    lam = damping * scale * float(diagonal.mean())
    live = shrinkage * diagonal + lam / scale
    dead = torch.full_like(diagonal, (1 + lam) / scale)
    return _Ridge(added=torch.where(diagonal > 0, live, dead) / (1 - shrinkage), scale=scale * (1 - shrinkage), lam=lam)


def inverse_diagonal_primal(
    gram: Float[Tensor, "c c"],
    *,
    scale: float = 1.0,
    damping: float = 0.01,
    shrinkage: float = 0.0,
    on_failure: OnFailure = "error",
    engine: Engine = "auto",
) -> InverseDiagonal:
    """diag((H + lam I)^-1) of H = scale * gram, by Cholesky, triangular inverse and column sums of squares.

    Works inside the lower triangle of `gram` and restores it, so that the matrix is unchanged afterwards, without a
    second c x c buffer.

    Args:
        gram: full symmetric, contiguous, float32 or float64; used as scratch and restored, bit for bit.
        on_failure: "error", or "retry": ten times the damping up to 1, then float64 (a copy) with the requested
            damping. Every step taken is listed in `fallbacks`.

    Raises: NumericalError: NaN or inf, or not positive definite (with "retry": not even in float64).
    """
    if on_failure not in ("error", "retry"):
        raise ValueError(f"on_failure={on_failure!r}; expected 'error' or 'retry'.")
    check_square(gram)
    diagonal = gram.diagonal().clone()
    fallbacks: list[str] = []

    def attempt(matrix: Tensor, level: float) -> InverseDiagonal | None:
        r = ridge(diagonal, scale=scale, damping=level, shrinkage=shrinkage)
        try:
            matrix.diagonal().add_(r.added.to(matrix.dtype))
            invert_factor_(matrix, engine=engine)
            values = (column_square_sums(matrix) / r.scale).float()
        except NotPositiveDefiniteError:
            return None
        finally:
            restore_from_upper_(matrix, diagonal)
        if not bool((torch.isfinite(values) & (values > 0)).all()):
            return None
        return InverseDiagonal(
            values=values,
            damping=level,
            requested_damping=damping,
            lam=r.lam,
            shrinkage=shrinkage,
            form="primal",
            dead_inputs=int((diagonal == 0).sum()),
            fallbacks=tuple(fallbacks),
        )

    name = str(gram.dtype).removeprefix("torch.")
    levels = [damping]
    if on_failure == "retry":
        # From damping 0 the ladder starts at the usual 1 %.
        step = damping * 10 if damping > 0 else 0.01
        while step <= 1 + 1e-12:
            levels.append(step)
            step *= 10
    for level in levels:
        result = attempt(gram, level)
        if result is not None:
            return result
        if not fallbacks:
            _require_finite(gram)
        fallbacks.append(f"{name}: not positive definite at damping {level:g}")
    if on_failure == "retry" and gram.dtype != torch.float64:
        result = attempt(gram.double(), damping)
        if result is not None:
            return result
        fallbacks.append(f"float64: not positive definite at damping {damping:g}")
    raise NumericalError(
        f"The Gram matrix ({gram.shape[0]} x {gram.shape[0]}) is not positive definite: {'; '.join(fallbacks)}. "
        "Use more calibration tokens or a larger damping, or pass on_failure='retry' to try ten times the damping up "
        "to 1 and then float64; each step is recorded."
    )


def _require_finite(gram: Tensor) -> None:
    """No damping mends a NaN off the diagonal, which passes the check of the diagonal."""
    for start in range(0, gram.shape[0], 64):
        strip = gram[start : start + 64]
        if not bool(torch.isfinite(strip).all()):
            i, j = (int(k) for k in (~torch.isfinite(strip)).nonzero()[0])
            raise NumericalError(
                f"The Gram matrix holds {float(strip[i, j])} at ({start + i}, {j}): an activation was NaN or infinite. "
                "Run the model in float32 or bfloat16, and check its weights."
            )


def inverse_diagonal_dual(
    blocks: Callable[[int, int], Float[Tensor, "n w"]],
    diagonal: Float[Tensor, " c"],
    tokens: int,
    *,
    scale: float = 1.0,
    damping: float = 0.01,
    shrinkage: float = 0.0,
    device: torch.device | None = None,
) -> InverseDiagonal:
    """The same diagonal from X (n, c) with n < c, by the n x n matrix of the dual form; float64 throughout.

    (X^T X + D)^-1 = D^-1 - D^-1 X^T (I + X D^-1 X^T)^-1 X D^-1, hence with Y = X D^-1/2 and I + Y Y^T = L L^T the
    j-th entry is (1 - ||L^-1 y_j||^2) / D_jj. The difference cancels for columns far above the damping, so float64.

    Args:
        blocks: columns [start, stop) of X as an (n, w) tensor; X itself may be kept in pieces and in bf16.
        diagonal: (c,) sums of squares of the columns of X.

    Raises: NumericalError: NaN or inf, or a damping so small that float64 cannot hold the difference.
    """
    r = ridge(diagonal, scale=scale, damping=damping, shrinkage=shrinkage)
    c = diagonal.shape[0]
    if bool((r.added <= 0).any()):
        raise NumericalError(
            f"H has {tokens} tokens for {c} input columns and damping {damping}: it is singular. Use damping > 0."
        )
    root = r.added.rsqrt()
    values = torch.empty(c, dtype=torch.float64, device=device)
    kernel = torch.zeros(tokens, tokens, dtype=torch.float64, device=device)
    width = 512

    def scaled(start: int) -> Tensor:
        return blocks(start, min(c, start + width)).double() * root[start : start + width]

    with ieee_matmul():
        for start in range(0, c, width):
            add_gram_(kernel, scaled(start).T)
        kernel.diagonal().add_(1)
        # 1 + (a Gram matrix) is positive definite by construction; cholesky_ex reads the lower triangle only.
        factor, info = torch.linalg.cholesky_ex(kernel)
        if int(info) != 0:
            raise NumericalError(f"The dual Gram matrix ({tokens} x {tokens}) is not positive definite (order {info}).")
        del kernel
        for start in range(0, c, width):
            y = scaled(start)
            solved = torch.linalg.solve_triangular(factor, y, upper=False)
            values[start : start + width] = 1 - solved.square_().sum(0)
    if float(values.min()) < _DUAL_FLOOR:
        raise NumericalError(
            f"damping {damping} is too small for the dual form: {float(values.min()):.1e} of a column is left after "
            "cancellation. Use a larger damping, or InputGram(..., dual=False)."
        )
    return InverseDiagonal(
        values=(values / r.added / r.scale).float(),
        damping=damping,
        requested_damping=damping,
        lam=r.lam,
        shrinkage=shrinkage,
        form="dual",
        dead_inputs=int((diagonal == 0).sum()),
    )


def inverse_cholesky_factor(
    hessian: Float[Tensor, "c c"], damping: float = 0.01, *, engine: Engine = "auto"
) -> Float[Tensor, "c c"]:
    """Upper triangular U with U^T U = (H + lam I)^-1, the factor of left-to-right compensation sweeps (SparseGPT).

    U is L^-1 of the matrix with rows and columns reversed, reversed back: one triangular inverse, no explicit H^-1.

    Raises: NumericalError: NaN or inf, or not positive definite.
    """
    check_square(hessian)
    c = hessian.shape[0]
    r = ridge(hessian.diagonal(), scale=1.0, damping=damping, shrinkage=0.0)
    # Reversing rows and columns of a square matrix is reversing its memory.
    flat = hessian.reshape(-1).flip(0)
    work = flat.view(c, c)
    work.diagonal().add_(r.added.flip(0).to(work.dtype))
    try:
        invert_factor_(work, engine=engine)
    except NotPositiveDefiniteError as error:
        raise NumericalError(
            f"The Hessian ({c} x {c}) is not positive definite at damping {damping:g} ({error}). Use more calibration "
            "tokens or a larger damping."
        ) from None
    work.tril_()
    return flat.flip(0).view(c, c)


def inverse_cholesky_diagonal(hessian: Float[Tensor, "c c"], damping: float = 0.01) -> Float[Tensor, " c"]:
    """diag(U)^2 of the upper Cholesky factor U of (H + lam I)^-1. NOT the diagonal of the inverse.

    U_jj^2 is the inverse curvature of column j when the columns before it are already fixed, so it depends on the
    order of the columns: right inside a left-to-right compensation sweep (SparseGPT, Safe Delta), wrong elsewhere.
    """
    return inverse_cholesky_factor(hessian, damping).diagonal().double().square().float()
