"""Model Tailor (Zhu et al., ICML 2024): keep the tenth of the tuned entries that matters, reset the rest, compensate.

One task Gram per layer (of theta_t on the task's samples); the score of an entry is half its change and half its
sensitivity. The mathematics: `holdfast.functional.rivals.model_tailor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from holdfast.data.types import Sample
from holdfast.functional.rivals import RivalEdit, model_tailor
from holdfast.methods._glue.gram_sweep import GramSweep
from holdfast.methods.seqft import EditingConfig, draw, step_seed
from holdfast.stream.protocol import Checkpoint, TaskContext


@dataclass(frozen=True, kw_only=True)
class ModelTailorConfig(EditingConfig):
    """tuned_share: of the entries that stay tuned. compensation: "released" has the sign of the published code."""

    tuned_share: float = 0.1
    compensation: Literal["sparsegpt", "released", "none"] = "sparsegpt"


class ModelTailor(GramSweep):
    """Model Tailor: a few tuned entries stay, the rest returns, later columns compensate."""

    Config = ModelTailorConfig
    config: ModelTailorConfig

    def gram_source(self, ctx: TaskContext, trained: Checkpoint) -> tuple[Checkpoint, Sequence[Sample]]:
        """The tuned model, and samples of the task at hand drawn by the step's seed."""
        return trained, draw(self.learned(ctx), self.config.task_samples, step_seed(ctx))

    def edit_layer(self, w_prev: Tensor, w_new: Tensor, inverse_factor: Tensor) -> RivalEdit:
        """Model Tailor of one layer; weights (r, c), inverse_factor (c, c)."""
        return model_tailor(
            w_prev,
            w_new,
            inverse_factor,
            tuned_share=self.config.tuned_share,
            compensation=self.config.compensation,
        )
