"""CGM and CGM+ (arXiv 2606.24963): an entry keeps its change as far as the new task needs it more than the old ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from holdfast.errors import ConfigError
from holdfast.functional.rivals import cgm, cgm_plus
from holdfast.rules.base import DenseEdit, Layer, Rule, norms


@dataclass(frozen=True, kw_only=True)
class CgmOptions:
    """alpha: weight of what earlier tasks need, 0 or more.

    kept: share of each output's entries that keep their whole change, the others none (CGM+; 0.95 in its released
        code, with alpha 1); null: every entry keeps a share of its own (CGM).

    Raises: ConfigError: an alpha below 0, or a share outside of 0..1.
    """

    alpha: float = 0.2
    kept: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ConfigError(f"alpha is {self.alpha}; expected a finite number, 0 or more.")
        if self.kept is not None and not 0 <= self.kept <= 1:
            raise ConfigError(f"kept is {self.kept}; expected a share, 0 to 1, or null.")


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
        """The change, weighed or chosen entry by entry. w_prev, w_new: (r, c)."""
        old = w_prev.float()
        delta = w_new.float() - old
        own = self.importance[layer.name].float()
        before = self.previous.get(layer.name)
        before = own.new_zeros(own.shape) if before is None else before.float()
        if self.config.kept is None:
            kept = cgm(delta, own, before, alpha=self.config.alpha)
        else:
            kept = cgm_plus(delta, own, before, alpha=self.config.alpha, kept=self.config.kept)
        return DenseEdit(weight=old + kept, row=norms(delta, kept))
