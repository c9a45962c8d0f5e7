"""RESTA (Bhardwaj et al., ACL 2024, arXiv 2402.11746): W_hat = W_new + alpha (W_aligned - W_unaligned)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from holdfast.checkpoints.merged import MergedCheckpoint
from holdfast.errors import ConfigError
from holdfast.rules.base import DenseEdit, Layer, Rule, norms


@dataclass(frozen=True, kw_only=True)
class RestaOptions:
    """unaligned: folder or hub id of the model without its alignment. alpha: share of the safety vector to add.

    Raises: ConfigError: an alpha below 0.
    """

    unaligned: str
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ConfigError(f"alpha is {self.alpha}; expected a finite number, 0 or more.")


@dataclass(frozen=True)
class RestaRule(Rule):
    """One layer's addition. aligned, unaligned: open checkpoints, whose difference is the safety vector."""

    config: RestaOptions
    aligned: MergedCheckpoint
    unaligned: MergedCheckpoint
    Config = RestaOptions
    name = "resta"
    inputs = ("aligned", "unaligned")

    def edit(self, layer: Layer, w_prev: Tensor, w_new: Tensor) -> DenseEdit:
        """The tuned weight plus its part of the safety vector. w_prev, w_new: (r, c)."""
        key = f"{layer.name}.weight"
        vector = self.config.alpha * (self.aligned.read_float(key) - self.unaligned.read_float(key))
        old, new = w_prev.float(), w_new.float()
        weight = new + vector
        return DenseEdit(weight=weight, row={"added": float(vector.norm()), **norms(new - old, weight - old)})
