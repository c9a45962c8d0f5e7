"""Safe Delta (Lu et al., ICML 2025): admit tuned entries, least sensitive first, within a safety budget; compensate.

One safety Gram per layer (of theta_{t-1} on its own safe answers); entries of the update are admitted while the
estimated loss of safety stays within a budget, later columns make up for the error. The mathematics, and what differs
from the released code: `holdfast.functional.rivals.safe_delta`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from holdfast.data.types import Sample
from holdfast.errors import ConfigError
from holdfast.functional.rivals import RivalEdit, safe_delta
from holdfast.methods._glue.gram_sweep import GramSweep
from holdfast.methods.seqft import EditingConfig
from holdfast.stream.protocol import Checkpoint, TaskContext


@dataclass(frozen=True, kw_only=True)
class SafeDeltaConfig(EditingConfig):
    """strength: the paper's s, not scale-free (updates under about 0.4 % of a weight pass whole).

    protected_share: of the entries, the most sensitive, never admitted. Of the options of a calibration this rival
    has a use for `safety_samples`, and for damping, tokens, normalization and batch_size of `calibration`.
    """

    strength: float = 0.1
    protected_share: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise ConfigError(f"strength is {self.strength}; expected a finite number, 0 or more.")
        if not 0 <= self.protected_share < 1:
            raise ConfigError(f"protected_share is {self.protected_share}; expected a share in [0, 1), such as 0.15.")


class SafeDelta(GramSweep):
    """Safe Delta: tuned entries are admitted within a safety budget, later columns compensate."""

    Config = SafeDeltaConfig
    config: SafeDeltaConfig

    needs_safety_answers = True

    def gram_source(self, ctx: TaskContext, trained: Checkpoint) -> tuple[Checkpoint, Sequence[Sample], int | None]:
        """The model before the task, and theta_0's own safe answers, which nothing cut."""
        return ctx.previous, self.safety_samples(ctx), None

    def edit_layer(self, w_prev: Tensor, w_new: Tensor, inverse_factor: Tensor) -> RivalEdit:
        """Safe Delta of one layer; weights (r, c), inverse_factor (c, c)."""
        return safe_delta(
            w_prev,
            w_new,
            inverse_factor,
            strength=self.config.strength,
            protected_share=self.config.protected_share,
        )
