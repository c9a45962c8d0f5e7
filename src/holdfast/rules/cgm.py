"""CGM (arXiv 2606.24963, our reading): W_hat = W_prev + D F / (F + alpha F_prev) entry by entry, or all or nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from holdfast.errors import ConfigError
from holdfast.functional.rivals import cgm
from holdfast.rules.base import DenseEdit, Layer, Rule, norms


@dataclass(frozen=True, kw_only=True)
class CgmOptions:
    """alpha: weight of what earlier tasks need, 0 or more. hard: a change is kept whole or not at all.

    Raises: ConfigError: an alpha below 0.
    """

    alpha: float = 1.0
    hard: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ConfigError(f"alpha is {self.alpha}; expected a finite number, 0 or more.")


@dataclass(frozen=True)
class CgmRule(Rule):
    """One layer's merge. importance, previous: layer -> F and F_prev (r, c); a layer without an F_prev has zeros."""

    config: CgmOptions
    importance: Mapping[str, Tensor]
    previous: Mapping[str, Tensor]
    Config = CgmOptions
    name = "cgm"
    inputs = ("importance", "previous")

    def edit(self, layer: Layer, w_prev: Tensor, w_new: Tensor) -> DenseEdit:
        """The change, weighed entry by entry. w_prev, w_new: (r, c)."""
        old = w_prev.float()
        delta = w_new.float() - old
        own = self.importance[layer.name].float()
        before = self.previous.get(layer.name)
        before = own.new_zeros(own.shape) if before is None else before.float()
        kept = cgm(delta, own, before, alpha=self.config.alpha, hard=self.config.hard)
        return DenseEdit(weight=old + kept, row=norms(delta, kept))
