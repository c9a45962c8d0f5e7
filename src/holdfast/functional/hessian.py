"""The layer-wise Hessian of a linear layer, H = 2 X^T X over its input activations, and what edits need of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.errors import NumericalError
from holdfast.functional.factorize import Engine, add_gram_, ieee_matmul, mirror_lower_
from holdfast.functional.inverse import (
    InverseDiagonal,
    OnFailure,
    inverse_cholesky_diagonal,
    inverse_cholesky_factor,
    inverse_diagonal_dual,
    inverse_diagonal_primal,
)

__all__ = [
    "InputGram",
    "InverseDiagonal",
    "Normalization",
    "inverse_cholesky_diagonal",
    "inverse_cholesky_factor",
    "inverse_diagonal",
]

Normalization = Literal["sequence", "token", "sum"]

_SMALL_WIDTH = 512


@dataclass(frozen=True, kw_only=True, eq=False)
class GramState:
    """Everything that an `InputGram` has seen, as plain values: to merge, to send, to store.

    lower: (c, c), valid on and below the diagonal, or None while rows are kept. rows: (n, c) inputs, or None.
    """

    in_features: int
    normalization: Normalization
    sequences: int
    tokens: int
    lower: Tensor | None
    rows: Tensor | None


class InputGram:
    """Running Gram matrix of a linear layer's input activations, X^T X over real tokens.

    H = (2 / sequences) sum X^T X under "sequence" (the paper's running mean), (2 / tokens) under "token", 2 X^T X under
    "sum". While there are fewer tokens than half the width, the inputs themselves are kept and the dual form is used:
    it is smaller and much cheaper (19 times at 512 tokens and width 4096).

    Args:
        in_features: width c of the layer's input.
        normalization: see above; recorded with every calibration, because it moves alpha.
        dtype: of the sums: float32, or by default float64 up to width 512, where it costs nothing. Inputs may be bf16
            or fp16; bf16 sums cannot be factorised and are refused.
        device: where the sums live; by default where the first input lives (on the CPU for MPS, which has no float64).
        dual: keep inputs while they are few. False: always sum, so that memory is c x c from the first update.
    """

    def __init__(
        self,
        in_features: int,
        normalization: Normalization = "sequence",
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dual: bool = True,
    ) -> None:
        if in_features < 1:
            raise ValueError(f"in_features={in_features}; expected at least 1.")
        if normalization not in get_args(Normalization):
            raise ValueError(f"normalization={normalization!r}; expected one of {', '.join(get_args(Normalization))}.")
        if dtype is None:
            # A damped Gram of few tokens has condition numbers near 1e4: float32 then holds the inverse to 1e-4 only.
            dtype = torch.float64 if in_features <= _SMALL_WIDTH else torch.float32
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype={dtype}; expected float32 or float64: sums in fewer bits cannot be factorised.")
        self.in_features = in_features
        self.normalization: Normalization = normalization
        self.dtype = dtype
        self.device = torch.device(device) if device is not None else None
        self.sequences = 0
        self.tokens = 0
        self._dual = dual
        self._rows: list[Tensor] = []
        self._lower: Tensor | None = None
        self._mirrored = False

    def update(self, x: Tensor, mask: Tensor | None = None, *, sequences: int | None = None) -> Self:
        """Add a batch of input activations.

        Args:
            x: (sequences, tokens, c), or (tokens, c) for one sequence. Any floating dtype.
            mask: (sequences, tokens) or (tokens,), true (or 1) for a real token; padding never enters. None: all real.
            sequences: how many sequences the batch holds, where x is packed and does not show it. By default the
                number of those with at least one real token.

        Raises: ValueError: shapes do not fit. NumericalError: a real token holds NaN or inf.
        """
        if x.ndim not in (2, 3) or x.shape[-1] != self.in_features or not x.is_floating_point():
            raise ValueError(
                f"found input of shape {tuple(x.shape)}, {x.dtype}; expected floating point of shape "
                f"(sequences, tokens, {self.in_features})."
            )
        x = x.detach()
        lead = x.shape[:-1]
        if mask is None:
            rows = x.reshape(-1, self.in_features)
            seen = (lead[0] if x.ndim == 3 else 1) if rows.shape[0] else 0
        else:
            if mask.shape != lead:
                raise ValueError(f"found mask of shape {tuple(mask.shape)}; expected {tuple(lead)}, one value a token.")
            real = mask.to(device=x.device) != 0
            # Padding is dropped before any arithmetic: it may legitimately be NaN (attention over nothing).
            rows = x[real]
            seen = int(real.any(dim=-1).sum())
        if not bool(torch.isfinite(rows).all()):
            column = int((~torch.isfinite(rows)).any(0).nonzero()[0])
            raise NumericalError(
                f"An input activation is NaN or infinite (input column {column} of {self.in_features}). Run the model "
                "in float32 or bfloat16, and check its weights."
            )
        if self.device is None:
            self.device = torch.device("cpu") if x.device.type == "mps" else x.device
        count = int(rows.shape[0])
        self.sequences += seen if sequences is None else sequences
        self.tokens += count
        if count == 0:
            return self
        if self._dual and self._lower is None and 2 * self.tokens < self.in_features:
            # clone: a view would keep the whole batch of activations alive, and could be written to by the model.
            self._rows.append(rows.to(self.device, copy=True).contiguous())
        else:
            self._add(rows)
        return self

    @property
    def tokens_over_width(self) -> float:
        """N / c: below about 2 the inverse is inflated by N / (N - c - 1) and only the damping bounds it."""
        return self.tokens / self.in_features

    @property
    def form(self) -> Literal["primal", "dual"]:
        """Whether the matrix is kept ("primal", c x c) or the inputs ("dual", tokens x c)."""
        return "primal" if self._lower is not None else "dual"

    @property
    def scale(self) -> float:
        """H = scale * X^T X."""
        self._require_data()
        return {"sequence": 2.0 / max(self.sequences, 1), "token": 2.0 / self.tokens, "sum": 2.0}[self.normalization]

    def diagonal(self) -> Float[Tensor, " c"]:
        """diag H, float64."""
        return self._gram_diagonal() * self.scale

    def hessian(self) -> Float[Tensor, "c c"]:
        """H itself, a new tensor (c, c)."""
        self._require_data()
        if self._lower is not None:
            return self._full() * self.scale
        total = torch.zeros(self.in_features, self.in_features, dtype=self.dtype, device=self.device)
        for piece in self._rows:
            self._add_to(total, piece)
        mirror_lower_(total)
        return total.mul_(self.scale)

    def inverse_diagonal(self, damping: float = 0.01, *, shrinkage: float = 0.0) -> Float[Tensor, " c"]:
        """diag((H + lam I)^-1), float32; lam = damping * mean(diag H). The sums are unchanged afterwards.

        Raises: NumericalError: no data, or a matrix that does not factorise (`reduce` can retry and tells how).
        """
        return self.reduce(damping, shrinkage=shrinkage).values

    def reduce(
        self,
        damping: float = 0.01,
        *,
        shrinkage: float = 0.0,
        on_failure: OnFailure = "error",
        engine: Engine = "auto",
    ) -> InverseDiagonal:
        """The diagonal of the inverse with the account of how it was obtained. See `inverse_diagonal_primal`."""
        scale = self.scale
        if self._lower is None and damping > 0:
            return inverse_diagonal_dual(
                lambda start, stop: torch.cat([r[:, start:stop].double() for r in self._rows]),
                self._gram_diagonal(),
                self.tokens,
                scale=scale,
                damping=damping,
                shrinkage=shrinkage,
                device=self.device,
            )
        self._to_primal()
        return inverse_diagonal_primal(
            self._full(), scale=scale, damping=damping, shrinkage=shrinkage, on_failure=on_failure, engine=engine
        )

    def inverse_cholesky_factor(self, damping: float = 0.01) -> Float[Tensor, "c c"]:
        """Upper triangular U with U^T U = (H + lam I)^-1, for compensation sweeps (Safe Delta, SparseGPT)."""
        return inverse_cholesky_factor(self.hessian(), damping)

    def state(self) -> GramState:
        """What has been seen so far; tensors are shared, not copied."""
        return GramState(
            in_features=self.in_features,
            normalization=self.normalization,
            sequences=self.sequences,
            tokens=self.tokens,
            lower=self._lower,
            rows=torch.cat(self._rows) if self._rows else None,
        )

    def merge(self, other: InputGram | GramState) -> Self:
        """Add what another Gram of the same input has seen (another process, another shard of the data).

        Raises: ValueError: another width or another normalization.
        """
        state = other.state() if isinstance(other, InputGram) else other
        if (state.in_features, state.normalization) != (self.in_features, self.normalization):
            raise ValueError(
                f"cannot merge a Gram of width {state.in_features}, normalised by {state.normalization}, into one of "
                f"width {self.in_features}, normalised by {self.normalization}."
            )
        if self.device is None:
            source = state.lower if state.lower is not None else state.rows
            self.device = source.device if source is not None else None
        self.sequences += state.sequences
        self.tokens += state.tokens
        if state.rows is not None:
            if self._dual and self._lower is None and 2 * self.tokens < self.in_features:
                self._rows.append(state.rows.to(self.device, copy=True))
            else:
                self._add(state.rows)
        if state.lower is not None:
            self._to_primal()
            assert self._lower is not None
            # The strict upper triangles are stale in both; adding them is harmless.
            self._lower.add_(state.lower.to(self._lower))
            self._mirrored = False
        return self

    def all_reduce(self, group: Any = None) -> Self:
        """Sum over all processes of a torch.distributed group; every process ends with the same bits.

        Few tokens in all processes together: the inputs are gathered in the order of ranks. Otherwise the sums are
        added. Call it in every process, also in one that saw no data.
        """
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
            return self
        device = self._communication_device(dist, group)
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        mine = torch.tensor([self.sequences, self.tokens, int(self._lower is not None)], device=device)
        # all_gather, not all_gather_into_tensor: the latter is deprecated in torch 2.13, its successor unknown to 2.11.
        gathered = [torch.zeros_like(mine) for _ in range(world)]
        dist.all_gather(gathered, mine, group=group)
        counts = torch.stack(gathered)
        tokens: list[int] = [int(t) for t in counts[:, 1].tolist()]
        total = sum(tokens)
        keeps_rows = self._dual and not bool(counts[:, 2].any()) and 2 * total < self.in_features
        if self.device is None:
            self.device = device
        if keeps_rows and total:
            padded = torch.zeros(max(tokens), self.in_features, dtype=self.dtype, device=device)
            if self._rows:
                padded[: tokens[rank]] = torch.cat(self._rows).to(padded)
            pieces = [torch.empty_like(padded) for _ in range(world)]
            dist.all_gather(pieces, padded, group=group)
            self._rows = [pieces[i][:n].to(self.device) for i, n in enumerate(tokens) if n]
        elif total:
            self._to_primal()
            assert self._lower is not None
            if self._lower.device == device:
                dist.all_reduce(self._lower, group=group)
            else:
                moved = self._lower.to(device)
                dist.all_reduce(moved, group=group)
                self._lower.copy_(moved)
            self._mirrored = False
        self.sequences, self.tokens = int(counts[:, 0].sum()), total
        return self

    def _communication_device(self, dist: Any, group: Any) -> torch.device:
        if self.device is not None and (self.device.type != "cpu" or dist.get_backend(group) != "nccl"):
            return self.device
        if dist.get_backend(group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def _require_data(self) -> None:
        if self.tokens == 0:
            raise NumericalError(
                "The Gram matrix has seen no real token. Check that the calibration set is not empty and that its mask "
                "marks real tokens with 1."
            )

    def _gram_diagonal(self) -> Tensor:
        self._require_data()
        if self._lower is not None:
            return self._lower.diagonal().double()
        return torch.stack([r.double().square().sum(0) for r in self._rows]).sum(0)

    def _add(self, rows: Tensor) -> None:
        self._to_primal()
        assert self._lower is not None
        self._mirrored = False
        self._add_to(self._lower, rows)

    def _add_to(self, total: Tensor, rows: Tensor) -> None:
        # Chunks of rows: bf16 inputs are widened a piece at a time (exactly).
        step = 4096
        with ieee_matmul():
            for start in range(0, rows.shape[0], step):
                add_gram_(total, rows[start : start + step].to(total.device))

    def _to_primal(self) -> None:
        if self._lower is None:
            c = self.in_features
            self._lower = torch.zeros(c, c, dtype=self.dtype, device=self.device)
        rows, self._rows = self._rows, []
        for piece in rows:
            self._add(piece)

    def _full(self) -> Tensor:
        """The sums as a full symmetric matrix."""
        assert self._lower is not None
        if not self._mirrored:
            mirror_lower_(self._lower)
            self._mirrored = True
        return self._lower


def inverse_diagonal(
    hessian: Float[Tensor, "c c"], damping: float = 0.01, *, shrinkage: float = 0.0
) -> Float[Tensor, " c"]:
    """diag((H + lam I)^-1) of a full symmetric H (c, c), which is used as scratch and restored. See `InputGram`."""
    return inverse_diagonal_primal(hessian, damping=damping, shrinkage=shrinkage).values
