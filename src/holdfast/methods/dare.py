"""DARE (Yu et al., ICML 2024): drop entries of the task's change at random, scale the others up. Seeded per layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdfast.errors import ConfigError
from holdfast.functional.rivals import dare
from holdfast.methods.seqft import SeqFT, SeqFTConfig
from holdfast.rules.base import DenseEdit, EditRule, Layer


@dataclass(frozen=True, kw_only=True)
class DareConfig(SeqFTConfig):
    """drop: probability that an entry returns to its old value. rescale: keep the expected change."""

    drop: float = 0.5
    rescale: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise ConfigError(f"drop is {self.drop}; expected a probability in 0..1, below 1.")


@dataclass(frozen=True)
class DareRule:
    """W_hat = W_prev + dare(W_new - W_prev)."""

    config: DareConfig
    name = "dare"
    needs_curvature = False

    def settings(self) -> Mapping[str, Any]:
        return {"drop": self.config.drop, "rescale": self.config.rescale}

    def edit(self, layer: Layer, w_prev: Tensor, w_new: Tensor) -> DenseEdit:
        delta = w_new.float() - w_prev.float()
        kept = dare(delta, drop=self.config.drop, generator=layer.generator(), rescale=self.config.rescale)
        row = {
            "change": float(torch.linalg.vector_norm(delta, dtype=torch.float64)),
            "distance": float(torch.linalg.vector_norm(kept, dtype=torch.float64)),
        }
        return DenseEdit(weight=w_prev.float() + kept, row=row)


class Dare(SeqFT):
    """DARE: entries of the change return at random, the others are scaled up."""

    Config = DareConfig
    config: DareConfig

    def rule(self) -> EditRule:
        """DARE with this method's options."""
        return DareRule(self.config)
