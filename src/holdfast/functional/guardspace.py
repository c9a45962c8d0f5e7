"""GuardSpace's two constraints on a LoRA (arXiv 2510.14301, our reading): tensors of one layer in, tensors out.

W (r, c) = (out, in); C (c, c) is the Gram matrix of the layer's inputs on forbidden requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.functional.cram import product_svd
from holdfast.functional.factorize import ieee_matmul


@dataclass(frozen=True, kw_only=True, eq=False)
class GuardedStart:
    """Where a guarded adapter starts. lora_a (k, c), lora_b (r, k): the part of W that safety has least to do with.

    seen (c, m): orthonormal columns, the input directions of forbidden requests, which no update may read.
    """

    lora_a: Float[Tensor, "k c"]
    lora_b: Float[Tensor, "r k"]
    seen: Float[Tensor, "c m"]


def guarded_start(
    weight: Float[Tensor, "r c"],
    covariance: Float[Tensor, "c c"],
    *,
    rank: int,
    energy: float = 0.99,
    null_below: float | None = None,
    damping: float = 0.01,
) -> GuardedStart:
    """The start of a guarded adapter of one layer.

    With W C = U S V^T, the `rank` components with the smallest singular values, taken back through C^-1, are what
    safety uses least: U_k S_k V_k^T C^-1 = B A, split evenly here (the factors' own scales follow from C, and may lie
    many orders apart). That is the start of CorDA's knowledge-preserved mode (arXiv 2406.05223); PEFT has it for whole
    models at once, with its own hooks for the covariances. `seen` is the fewest eigenvectors of C that hold `energy` of
    its trace, or those whose eigenvalues are above `null_below` of the largest.

    Args:
        covariance: of the inputs; its scale does not matter. rank: of the adapter, at most min(r, c).
        energy: 0 up to, not including, 1; how much of the inputs of forbidden requests an update must not read.
        null_below: more than 0, below 1; instead of `energy`: eigenvalues up to this share of the largest are none
            (1e-6 in the released code). One direction at least is left either way.
        damping: added to the diagonal of C, relative to its mean, before it is inverted.

    Raises: ValueError: shapes, options, or a covariance of zero.
    """
    rows, columns = weight.shape
    if covariance.shape != (columns, columns):
        raise ValueError(f"covariance is {tuple(covariance.shape)}; expected ({columns}, {columns}).")
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(f"rank={rank}; expected 1 to {min(rows, columns)}.")
    if not 0 <= energy < 1 or not damping > 0:
        raise ValueError(f"energy={energy}, damping={damping}; expected a share below 1, and more than 0.")
    if null_below is not None and not 0 < null_below < 1:
        raise ValueError(f"null_below={null_below}; expected more than 0 and less than 1.")
    w, c = weight.double(), covariance.double()
    mean = float(c.diagonal().mean())
    if mean <= 0:
        raise ValueError("covariance is zero: no input of a forbidden request was seen.")
    with ieee_matmul():
        values, vectors = torch.linalg.eigh(c)
        falling = values.flip(0).clamp_min(0)
        if null_below is not None:
            count = int((falling > null_below * falling[0]).sum())
        else:
            held = falling.cumsum(0) / falling.sum()
            count = int((held < energy).sum()) + 1 if energy > 0 else 0
        # One direction at least is left to learn with.
        seen = vectors.flip(1)[:, : min(count, columns - 1)]
        damped = c / mean + damping * torch.eye(columns, dtype=torch.float64, device=c.device)
        u, s, vh = torch.linalg.svd(w @ damped, full_matrices=False)
        least = slice(s.shape[0] - rank, s.shape[0])
        a = torch.linalg.solve(damped, (s[least, None] * vh[least]).T).T
        left, strength, right = product_svd(a, u[:, least])
    root = strength.sqrt()
    return GuardedStart(
        lora_a=(root[:, None] * right).float(), lora_b=(left * root).float(), seen=seen.float().contiguous()
    )


def unseen(rows: Float[Tensor, "k c"], seen: Float[Tensor, "c m"]) -> Float[Tensor, "k c"]:
    """`rows` without what they read along `seen` (orthonormal columns): A (I - Q Q^T)."""
    return rows - (rows @ seen) @ seen.T
