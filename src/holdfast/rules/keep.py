"""The edit that changes nothing: what plain tuning does after a task."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from holdfast.rules.base import DenseEdit, Layer, LoraEdit, Rule


@dataclass(frozen=True, kw_only=True)
class KeepOptions:
    """There is nothing to choose."""


@dataclass(frozen=True)
class KeepUpdate(Rule):
    """W_hat = W_new."""

    config: KeepOptions = field(default_factory=KeepOptions)
    Config = KeepOptions
    name = "keep"
    reads_base = False

    def edit(self, layer: Layer, w_prev: Tensor, w_new: Tensor) -> DenseEdit:
        """`w_new` (r, c) as it is; w_prev: (r, c)."""
        return DenseEdit(weight=w_new)

    def edit_lora(
        self, layer: Layer, w_prev: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
    ) -> LoraEdit:
        """`lora_a` (rank, c) as it is; lora_b: (r, rank). The base is not read."""
        return LoraEdit(lora_a=lora_a)
