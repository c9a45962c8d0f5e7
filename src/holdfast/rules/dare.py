"""DARE (Yu et al., ICML 2024): drop entries of a change at random, scale the others up. Seeded per layer."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from holdfast.errors import ConfigError
from holdfast.functional.rivals import dare
from holdfast.rules.base import DenseEdit, Layer, Rule, norms


@dataclass(frozen=True, kw_only=True)
class DareOptions:
    """drop: probability that an entry returns to its old value, the paper's 0.9. rescale: keep the expected change.

    Raises: ConfigError: a probability outside 0..1, or of 1.
    """

    drop: float = 0.9
    rescale: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise ConfigError(f"drop is {self.drop}; expected a probability in 0..1, below 1.")


@dataclass(frozen=True)
class DareRule(Rule):
    """W_hat = W_prev + dare(W_new - W_prev)."""

    config: DareOptions = field(default_factory=DareOptions)
    Config = DareOptions
    name = "dare"

    def edit(self, layer: Layer, w_prev: Tensor, w_new: Tensor) -> DenseEdit:
        """W_prev plus what is left of the change, scaled up. w_prev, w_new: (r, c)."""
        delta = w_new.float() - w_prev.float()
        kept = dare(delta, drop=self.config.drop, generator=layer.generator(), rescale=self.config.rescale)
        return DenseEdit(weight=w_prev.float() + kept, row=norms(delta, kept))
