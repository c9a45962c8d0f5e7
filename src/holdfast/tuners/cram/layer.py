"""All experts of one linear layer in two matrix products, added by a forward hook on whatever computes `W x`.

The linear itself is neither replaced nor subclassed, so a quantised one works too; its weights keep their names. What a
request decided is shared by all layers of one model in one plain `Active` object: no module globals.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from holdfast.errors import AdapterError


class Active:
    """What the request at hand decided, for all layers of one model.

    mode: "unset" (a forward pass is an error), "base" (the base alone), "routed".
    rows: (B, rows of all layers) weight of every stacked expert row, or None where no old expert answers.
    trained: (B, S) weight of the factors being trained, S = 1 or the number of blocks; None is 1.
    pool: (B, T) averaging weights over tokens for the penalty's inputs, or None when nothing collects.
    """

    def __init__(self) -> None:
        self.mode: Literal["unset", "base", "routed"] = "unset"
        self.rows: Tensor | None = None
        self.trained: Tensor | None = None
        self.pool: Tensor | None = None
        self._spread: dict[int, Tensor] = {}
        self._pooled: tuple[Tensor, Tensor] | None = None

    def set(
        self,
        mode: Literal["unset", "base", "routed"],
        rows: Tensor | None = None,
        trained: Tensor | None = None,
        pool: Tensor | None = None,
    ) -> None:
        """What the next forward pass does: nothing yet, the base alone, or experts by row weights.

        Args: rows (B, R), trained (B, S), pool (B, T): see the class; R rows over all experts, T tokens.
        """
        self.mode, self.rows, self.trained, self.pool = mode, rows, trained, pool
        self._spread.clear()
        self._pooled = None

    def rows_for(self, batch: int) -> Tensor | None:
        """`rows`, each repeated for the beams of its sample (generation repeats a sample's inputs side by side).

        Returns: (batch, R), or None where no expert is active.

        Raises: AdapterError: `batch` is no multiple of the requests that were routed.
        """
        if self.rows is None or self.rows.shape[0] == batch:
            return self.rows
        if batch not in self._spread:
            samples = self.rows.shape[0]
            if batch % samples:
                raise AdapterError(
                    f"The forward pass has {batch} sequences but {samples} requests were routed; encode and route the "
                    "same samples."
                )
            self._spread[batch] = self.rows.repeat_interleave(batch // samples, dim=0)
        return self._spread[batch]

    def pooled(self, x: Tensor) -> Tensor:
        """Mean input (B, in) of a layer over `pool`; q, k and v share their input and this product."""
        assert self.pool is not None
        if self._pooled is None or self._pooled[0] is not x:
            self._pooled = (x, torch.bmm(self.pool.to(x).unsqueeze(1), x.detach()).squeeze(1))
        return self._pooled[1]


class ExpertPass(nn.Module):
    """The experts of one linear: frozen ones stacked, and at most one pair of trained factors.

    name: of the linear in the model. block: its decoder block. start, stop: its rows within `Active.rows`.
    """

    stacked_a: Tensor  # (rows, in), in the compute dtype
    stacked_b: Tensor  # (out, rows)

    def __init__(self, name: str, block: int, linear: nn.Module, active: Active) -> None:
        super().__init__()
        self.name, self.block, self.active = name, block, active
        self.in_features, self.out_features = int(linear.in_features), int(linear.out_features)  # type: ignore[arg-type]
        self.start = self.stop = 0
        self.register_buffer("stacked_a", torch.zeros(0, self.in_features), persistent=False)
        self.register_buffer("stacked_b", torch.zeros(self.out_features, 0), persistent=False)
        self.trained_a: nn.Parameter | None = None
        self.trained_b: nn.Parameter | None = None
        self.dropout = 0.0
        self.factor = 1.0
        self.input_mean: Tensor | None = None

    def stack(self, a: Tensor, b: Tensor, start: int) -> None:
        """Hold the frozen experts' concatenated A (rows, in) and B (out, rows)."""
        self.stacked_a, self.stacked_b = a, b
        self.start, self.stop = start, start + a.shape[0]

    def train_factors(self, a: Tensor, b: Tensor, dropout: float, factor: float = 1.0) -> None:
        """Add trainable factors, copies of A (r, in) and B (out, r) / factor; every forward pass multiplies by it."""
        self.trained_a = nn.Parameter(a.detach().clone())
        self.trained_b = nn.Parameter(b.detach() / factor)
        self.dropout, self.factor = dropout, factor

    def drop_factors(self) -> None:
        """Forget the factors in training and what was gathered for them."""
        self.trained_a = self.trained_b = None
        self.input_mean = None

    def extend(self, linear: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook: `y + ((x A_cat^T) * P) B_cat^T`, and the trained factors likewise.

        x = args[0]: (B, T, in). output: (B, T, out). P: (B, R), the routing weight of each of the R stacked rows.

        Raises: AdapterError: no route was chosen, or the input has no batch dimension.
        """
        del linear
        active = self.active
        if active.mode == "base":
            return output
        x = args[0]
        if active.mode == "unset":
            raise AdapterError(
                f"{self.name} ran before its request was routed. Ask the model within `loaded.serving(samples)`, or "
                "choose `Cram.base_alone()` or `Cram.forced(...)` explicitly."
            )
        if x.dim() != 3:
            raise AdapterError(
                f"{self.name} got an input of shape {tuple(x.shape)}; per-sample routing needs (batch, tokens, "
                f"{self.in_features}). Do not pack several samples into one row."
            )
        rows = active.rows_for(x.shape[0])
        if rows is not None and self.stop > self.start:
            hidden = F.linear(x, self.stacked_a)
            # To its device too: a model spread over several has its rows on the first.
            hidden = hidden * rows[:, None, self.start : self.stop].to(hidden)
            output = _accumulate(output, hidden, self.stacked_b)
        if self.trained_a is not None and self.trained_b is not None:
            dropped = F.dropout(x, self.dropout, self.training)
            hidden = F.linear(dropped, self.trained_a.to(x.dtype))
            if self.factor != 1:
                hidden = hidden * self.factor
            if active.trained is not None:
                column = min(self.block, active.trained.shape[1] - 1)
                hidden = hidden * active.trained[:, column, None, None].to(hidden)
            output = _accumulate(output, hidden, self.trained_b.to(x.dtype))
            if active.pool is not None:
                self.input_mean = active.pooled(x)
        return output


def _accumulate(output: Tensor, hidden: Tensor, b: Tensor) -> Tensor:
    """`output + hidden b^T` in one product, for (B, T, out), (B, T, rows) and (out, rows)."""
    if hidden.dtype != output.dtype:  # autocast, or a quantised base that answers in another dtype
        return output + F.linear(hidden, b).to(output.dtype)
    flat, b = output.flatten(0, 1), b.to(hidden.dtype).t()
    if torch.is_grad_enabled():
        return torch.addmm(flat, hidden.flatten(0, 1), b).view_as(output)
    # In place: the linear has just made this tensor, and writing it once more costs a third of what experts cost.
    return flat.addmm_(hidden.flatten(0, 1), b).view_as(output)
