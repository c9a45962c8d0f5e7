"""Other weight edits as pure functions: Safe Delta, Model Tailor, SafeLoRA, TIES, DARE, CGM.

Weights are (r, c) = (out, in). Each function follows the method's description and its released code where there is
one; where we differ, the docstring says so. The compensation sweep of SparseGPT (Frantar and Alistarh 2023) is shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.functional.columns import check_lora, check_pair, wide_dtype
from holdfast.functional.factorize import ieee_matmul

# Columns updated one by one before their error is pushed on in one product.
_PANEL = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class RivalEdit:
    """An edited weight (r, c), and the share of its entries (0..1) that hold the tuned value."""

    weight: Float[Tensor, "r c"]
    tuned_share: float

    def figures(self) -> dict[str, Any]:
        """Plain numbers for a record."""
        return {"tuned_share": self.tuned_share}


# current (w, r), target (w, r), diag U (w,), start column -> bool (w, r): entries that take the target. Transposed.
_Choice = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def safe_delta(
    w_prev: Float[Tensor, "r c"],
    w_new: Float[Tensor, "r c"],
    inverse_factor: Float[Tensor, "c c"],
    *,
    strength: float = 0.1,
    protected_share: float = 0.15,
    block_columns: int = 2048,
    compensate: bool = True,
) -> RivalEdit:
    """Safe Delta (Lu et al., ICML 2025): admit tuned entries while the estimated safety loss stays within a budget.

    In blocks of columns: entries are ordered by sensitivity 1 / U_jj^2, least sensitive first (within a column by row);
    the most sensitive `protected_share` is never admitted; the others are, while the running sum of D^2 / U_jj^2 stays
    within (strength / 2)(r / 4096) mean(1 / U_jj^2). What is not admitted stays old, and later columns compensate for
    what is. The released code leaves out compensation within groups of four columns; here it is exact. The budget is
    not scale-free: updates under about 0.4 % of the weight pass whole.

    Args:
        w_prev: the aligned weight. w_new: the tuned one.
        inverse_factor: upper U with U^T U = (H + lam I)^-1 of the SAFETY inputs.
        strength: the paper's s.

    Raises: ValueError: shapes or options.
    """
    _check_share("protected_share", protected_share)
    if not strength >= 0 or block_columns < 1:
        raise ValueError(f"strength={strength}, block_columns={block_columns}; expected >= 0 and >= 1.")
    rows = w_prev.shape[0]

    def choose(current: Tensor, target: Tensor, diagonal: Tensor, _start: int) -> Tensor:
        sensitivity = diagonal.double().square().reciprocal()
        order = torch.sort(sensitivity, stable=True).indices
        loss = ((target - current).double().square() * sensitivity[:, None])[order].flatten()
        budget = strength / 2 * rows / 4096 * float(sensitivity.mean())
        admitted = loss.cumsum(0) <= budget
        admitted[loss.numel() - math.floor(protected_share * loss.numel()) :] = False
        taken = torch.empty_like(current, dtype=torch.bool)
        taken[order] = admitted.view(current.shape)
        return taken

    weight, taken = _sweep(w_prev, w_new, inverse_factor, choose, block_columns, 1.0 if compensate else 0.0)
    return RivalEdit(weight=weight, tuned_share=taken / w_prev.numel())


def model_tailor(
    w_prev: Float[Tensor, "r c"],
    w_new: Float[Tensor, "r c"],
    inverse_factor: Float[Tensor, "c c"],
    *,
    tuned_share: float = 0.1,
    change_weight: float = 0.8,
    block_columns: int = 128,
    compensation: Literal["sparsegpt", "released", "none"] = "sparsegpt",
) -> RivalEdit:
    """Model Tailor (Zhu et al., ICML 2024): keep the most important tuned entries, reset the rest, compensate.

    In blocks of columns, the score of an entry is `change_weight` times the z-score of |D| plus the rest times the
    z-score of W^2 / U_jj^2, each within its row of the block; the top `tuned_share` of the block stays tuned, the rest
    returns to `w_prev`, and the error goes into later columns. (The released code keeps one entry of a block fewer.)

    Args:
        inverse_factor: upper U with U^T U = (H + lam I)^-1 of the TASK inputs.
        change_weight: 0..1; 0.8 in the file that the released program imports, 0.5 in a copy that it does not.
        compensation: "sparsegpt" lowers the output error. "released": the sign in the published code, which raises it.
    """
    _check_share("tuned_share", tuned_share)
    _check_share("change_weight", change_weight)
    directions = {"sparsegpt": 1.0, "released": -1.0, "none": 0.0}
    if compensation not in directions:
        raise ValueError(f"compensation={compensation!r}; expected one of {', '.join(directions)}.")
    check_pair(w_prev, w_new)

    def choose(current: Tensor, target: Tensor, diagonal: Tensor, start: int) -> Tensor:
        stop = start + current.shape[0]
        moved = (w_new[:, start:stop].T.to(current) - target).abs_()
        sensitivity = current.square() / diagonal.square()[:, None]
        score = (change_weight * _z_score(moved) + (1 - change_weight) * _z_score(sensitivity)).flatten()
        keep = math.floor(tuned_share * score.numel() + 0.5)
        reset = torch.ones_like(score, dtype=torch.bool)
        reset[torch.sort(score, descending=True, stable=True).indices[:keep]] = False
        return reset.view(current.shape)

    weight, reset = _sweep(w_new, w_prev, inverse_factor, choose, block_columns, directions[compensation])
    return RivalEdit(weight=weight, tuned_share=1 - reset / w_prev.numel())


@dataclass(frozen=True, kw_only=True, eq=False)
class SafeLoraEdit:
    """A LoRA layer after SafeLoRA. lora_b: (r, rank), projected or as given. cosine: between C B A and B A."""

    lora_b: Float[Tensor, "r k"]
    cosine: float
    projected: bool


def safelora(
    lora_a: Float[Tensor, "k c"] | None,
    lora_b: Float[Tensor, "r k"],
    alignment: Float[Tensor, "r c"],
    *,
    threshold: float = 0.5,
) -> SafeLoraEdit:
    """SafeLoRA (Hsu et al., NeurIPS 2024): project an update onto the alignment's output directions where it strays.

    With V = W_aligned - W_unaligned and C = V V^T / ||V||_F: where cos(C B A, B A) <= threshold, B becomes C B. Neither
    B A (r x c) nor anything c x c is formed, C (r x r) only where that is less work.

    Args:
        lora_a: None: the update has no factors, and lora_b (r, c) is all of it.

    Raises: ValueError: shapes, or V = 0 (the aligned and the unaligned model are the same).
    """
    if lora_a is None:
        if lora_b.shape != alignment.shape:
            raise ValueError(f"the update is {tuple(lora_b.shape)} and the alignment {tuple(alignment.shape)}.")
        wide = wide_dtype(lora_b, alignment)
        v, a, b = alignment.to(wide), None, lora_b.to(wide)
    else:
        check_lora(lora_a, lora_b, alignment)
        wide = wide_dtype(lora_a, lora_b, alignment)
        v, a, b = alignment.to(wide), lora_a.to(wide), lora_b.to(wide)
    norm = float(torch.linalg.vector_norm(v, dtype=torch.float64))
    if norm == 0:
        raise ValueError("alignment is zero: the aligned and the unaligned weight are the same, and span no direction.")
    rows, columns, width = *v.shape, b.shape[1]
    # Multiplications: 2 r c k by V (V^T B), r r (c + k) by (V V^T) B.
    inner_first = 2 * columns * width <= rows * (columns + width)
    with ieee_matmul():
        projected = (v @ (v.T @ b) if inner_first else (v @ v.T) @ b) / norm
        if a is None:
            pairs = ((projected, b), (projected, projected), (b, b))
            cross, *sizes = (float((x * y).sum(dtype=torch.float64)) for x, y in pairs)
        else:
            gram = (a @ a.T).double()
            cross = float(((projected.T @ b).double() * gram).sum())
            sizes = [float(((m.T @ m).double() * gram).sum()) for m in (projected, b)]
    scale = math.sqrt(max(sizes[0], 0.0)) * math.sqrt(max(sizes[1], 0.0))
    cosine = cross / scale if scale > 0 else 0.0
    # An update of zero has no direction; projecting it changes nothing.
    strays = cosine <= threshold
    return SafeLoraEdit(lora_b=projected.to(lora_b.dtype) if strays else lora_b, cosine=cosine, projected=strays)


def trim(delta: Float[Tensor, "r c"], density: float) -> Float[Tensor, "r c"]:
    """The largest `density` (0..1) of the entries by magnitude, the others zero; ties at the threshold all stay."""
    _check_share("density", density)
    keep = math.floor(density * delta.numel() + 0.5)
    if keep == 0:
        return torch.zeros_like(delta)
    size = delta.abs()
    threshold = size.flatten().kthvalue(delta.numel() - keep + 1).values
    return torch.where(size >= threshold, delta, torch.zeros_like(delta))


def ties(
    deltas: Sequence[Float[Tensor, "r c"]], *, density: float = 0.2, thresholds: Sequence[float] | None = None
) -> Float[Tensor, "r c"]:
    """TIES (Yadav et al., NeurIPS 2023): trim each change, elect a sign per entry, average what agrees with it.

    Args:
        density: share of each tensor's entries that survive, 0..1.
        thresholds: one magnitude per change, instead: entries below it go. With `shared_threshold` of all tensors of a
            change it is the original's trimming over all parameters together.
    Returns: one change (r, c), to be added with a weight (1 in the paper). Where the signs of an entry are elected
        evenly it stays as it was (the original takes the sign that most entries of the model have).

    Raises: ValueError: no change to merge, or not one threshold per change.
    """
    if not deltas:
        raise ValueError("expected at least one change to merge.")
    if thresholds is not None and len(thresholds) != len(deltas):
        raise ValueError(f"{len(thresholds)} thresholds for {len(deltas)} changes; expected one for each.")
    wide = [d.to(wide_dtype(*deltas)) for d in deltas]
    if thresholds is None:
        trimmed = torch.stack([trim(d, density) for d in wide])
    else:
        trimmed = torch.stack([d * (d.abs() >= t) for d, t in zip(wide, thresholds, strict=True)])
    elected = trimmed.sum(0).sign()
    agrees = (trimmed.sign() == elected) & (trimmed != 0)
    return (trimmed * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def cgm(
    delta: Float[Tensor, "r c"],
    importance: Float[Tensor, "r c"],
    previous: Float[Tensor, "r c"],
    *,
    alpha: float = 0.2,
) -> Float[Tensor, "r c"]:
    """CGM (arXiv 2606.24963): what is kept of a change, D F / (F + alpha F_prev) entry by entry.

    Args:
        importance, previous: mean squared gradients on the new task and on earlier ones, 0 or more. An entry that
            nobody needs (both 0) is taken back, as in the released code.
        alpha: weight of what earlier tasks need; 0.2 in the released code.

    Raises: ValueError: shapes, or an alpha below 0.
    """
    _check_cgm(delta, importance, previous, alpha)
    total = importance + alpha * previous
    return delta * torch.where(total > 0, importance / torch.where(total > 0, total, 1), 0.0).to(delta)


def cgm_plus(
    delta: Float[Tensor, "r c"],
    importance: Float[Tensor, "r c"],
    previous: Float[Tensor, "r c"],
    *,
    alpha: float = 1.0,
    kept: float = 0.95,
) -> Float[Tensor, "r c"]:
    """CGM+ (arXiv 2606.24963): of each output row, the entries that hurt earlier tasks least keep their whole change.

    An entry's cost is (alpha F_prev - F) D^2, to second order what keeping its change costs the old tasks less what it
    gains the new one; floor(kept c) entries of a row with the lowest cost are kept, the first of equal ones, the others
    taken back.

    Args:
        importance, previous: mean squared gradients on the new task and on earlier ones, 0 or more.
        alpha, kept: 1 and 0.95 in the released code; kept is a share, 0..1.

    Raises: ValueError: shapes, an alpha below 0, or a share outside of 0..1.
    """
    _check_cgm(delta, importance, previous, alpha)
    _check_share("kept", kept)
    cost = (alpha * previous - importance) * delta.square()
    order = cost.argsort(dim=1, stable=True)[:, : math.floor(kept * delta.shape[1])]
    return torch.zeros_like(delta).scatter(1, order, delta.gather(1, order))


def _check_cgm(delta: Tensor, importance: Tensor, previous: Tensor, alpha: float) -> None:
    if not alpha >= 0:
        raise ValueError(f"alpha={alpha}; expected 0 or more.")
    if not delta.shape == importance.shape == previous.shape:
        raise ValueError(
            f"delta is {tuple(delta.shape)}, importance {tuple(importance.shape)} and previous "
            f"{tuple(previous.shape)}; expected one shape."
        )


def least_squares_merge(
    rows: Sequence[Float[Tensor, "k c"]], columns: Sequence[Float[Tensor, "r k"]], *, ridge: float = 1e-2
) -> Float[Tensor, "r c"]:
    """The update M that does for the rows of every A_t what B_t A_t did, in the least-squares sense.

    M minimises sum over t of ||(M - B_t A_t) A_t^T||^2 + lam ||M||^2. Source: MAny's low-rank parameter merging (arXiv
    2604.14016, our reading), which reaches the same minimum recursively. Only a matrix of all ranks together is solved.

    Args:
        rows, columns: A_t and B_t of each task, with any scaling in B_t; ranks may differ.
        ridge: lam relative to the mean square of all rows' entries, times their number; above 0.

    Raises: ValueError: no update, factors that do not belong together, or a ridge that is not above 0.
    """
    if not rows or len(rows) != len(columns):
        raise ValueError(
            f"{len(rows)} A and {len(columns)} B; expected one of each for every update, and one at least."
        )
    if not ridge > 0:
        raise ValueError(f"ridge={ridge}; expected more than 0.")
    for a, b in zip(rows, columns, strict=True):
        check_lora(a, b, None)
    a = torch.cat([r.double() for r in rows])
    with ieee_matmul():
        wanted = torch.cat(
            [(b.double() @ r.double()) @ r.double().T for r, b in zip(rows, columns, strict=True)], dim=1
        )
        gram = a @ a.T
        lam = ridge * float(gram.diagonal().mean())
        if lam == 0:
            return torch.zeros(wanted.shape[0], a.shape[1], dtype=rows[0].dtype, device=a.device)
        gram.diagonal().add_(lam)
        return (torch.linalg.solve(gram, wanted.T).T @ a).to(rows[0].dtype)


def shared_threshold(tensors: Callable[[], Iterable[Tensor]], density: float) -> float:
    """The magnitude that the largest `density` (0..1) of all entries of all tensors reach; exact in fp32.

    tensors: gives them one by one, of any shape, each time that it is called: they are read three times and never held
    together. inf for a density that keeps nothing.

    Raises: ValueError: a density outside 0..1, or no entry at all.
    """
    _check_share("density", density)
    total = sum(t.numel() for t in tensors())
    if total == 0:
        raise ValueError("expected at least one entry to trim.")
    keep = math.floor(density * total + 0.5)
    if keep == 0:
        return math.inf
    # The bits of floats that are not negative are ordered as these are: first the upper 16 of the one sought, then the
    # rest.
    upper = torch.zeros(1 << 16, dtype=torch.long)
    for bits in map(_magnitude_bits, tensors()):
        upper += torch.bincount(bits >> 16, minlength=1 << 16)
    above = upper.flip(0).cumsum(0)
    place = int((above < keep).sum())
    head = (1 << 16) - 1 - place
    left = keep - (int(above[place - 1]) if place else 0)
    lower = torch.zeros(1 << 16, dtype=torch.long)
    for bits in map(_magnitude_bits, tensors()):
        lower += torch.bincount(bits[bits >> 16 == head] & 0xFFFF, minlength=1 << 16)
    tail = (1 << 16) - 1 - int((lower.flip(0).cumsum(0) < left).sum())
    return float(torch.tensor((head << 16) | tail, dtype=torch.int32).view(torch.float32))


def _magnitude_bits(values: Tensor) -> Tensor:
    """The bits of |x| in fp32 as non-negative integers, (n,) on the CPU."""
    return values.detach().float().abs().cpu().flatten().view(torch.int32).long()


def dare(
    delta: Float[Tensor, "r c"], *, drop: float, generator: torch.Generator, rescale: bool = True
) -> Float[Tensor, "r c"]:
    """DARE (Yu et al., ICML 2024): drop entries at random with probability `drop`, scale the rest by 1 / (1 - drop).

    Raises: ValueError: `drop` outside 0 up to, not including, 1.
    """
    if not 0 <= drop < 1:
        raise ValueError(f"drop={drop}; expected a probability in 0..1, below 1.")
    # Drawn on the generator's device, so that the same seed gives the same entries everywhere.
    stays = torch.rand(delta.shape, generator=generator, device=generator.device) >= drop
    kept = torch.where(stays.to(delta.device), delta, torch.zeros_like(delta))
    return kept / (1 - drop) if rescale else kept


def _sweep(
    weight: Tensor, target: Tensor, inverse_factor: Tensor, choose: _Choice, block_columns: int, direction: float
) -> tuple[Tensor, int]:
    """Left-to-right replacement with compensation; returns the weight in its own dtype and how many entries it took."""
    check_pair(weight, target)
    columns = weight.shape[1]
    if inverse_factor.shape != (columns, columns):
        raise ValueError(f"inverse_factor is {tuple(inverse_factor.shape)}; expected ({columns}, {columns}).")
    if inverse_factor.device != weight.device:
        raise ValueError(f"inverse_factor is on {inverse_factor.device}; expected {weight.device}, as the weight.")
    wide = wide_dtype(weight, target)
    # Transposed: the sweep goes column by column, and a column is then contiguous.
    w = weight.T.to(wide, copy=True, memory_format=torch.contiguous_format)
    t = target.T
    u = inverse_factor.to(wide)
    count = 0
    with ieee_matmul():
        for start in range(0, columns, block_columns):
            stop = min(columns, start + block_columns)
            block, goal = w[start:stop], t[start:stop].to(wide)
            local, diagonal = u[start:stop, start:stop], u.diagonal()[start:stop]
            take = choose(block, goal, diagonal, start)
            count += int(take.sum())
            error = torch.empty_like(block)
            for p0 in range(0, stop - start, _PANEL):
                p1 = min(stop - start, p0 + _PANEL)
                for i in range(p0, p1):
                    new = torch.where(take[i], goal[i], block[i])
                    torch.sub(block[i], new, out=error[i]).div_(diagonal[i])
                    block[i] = new
                    if direction:
                        block[i + 1 : p1].addr_(local[i, i + 1 : p1], error[i], alpha=-direction)
                if direction:
                    block[p1:].addmm_(local[p0:p1, p1:].T, error[p0:p1], alpha=-direction)
            if direction:
                w[stop:].addmm_(u[start:stop, stop:].T, error, alpha=-direction)
    return w.T.contiguous().to(weight.dtype), count


def _z_score(score: Tensor) -> Tensor:
    """Per row of the weight (column of the transposed block); 0 where a row does not vary."""
    if score.shape[0] < 2:
        return torch.zeros_like(score)
    spread = score.std(dim=0)
    return torch.where(spread > 0, (score - score.mean(dim=0)) / spread.clamp_min(torch.finfo(score.dtype).tiny), 0.0)


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value}; expected a share in 0..1.")
