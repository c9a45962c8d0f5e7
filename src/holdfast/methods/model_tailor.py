"""Model Tailor (Zhu et al., ICML 2024): keep the tenth of the tuned entries that matters, reset the rest, compensate.

One task Gram per layer (of theta_t on the task's samples); the score of an entry is its change and its sensitivity, 0.8
to 0.2 as in the file that the released program imports. As there, the last three eighths of the blocks are edited (20
to 31 of 32), one after another, so that a block's Gram matrices are of what the edited blocks before it give. Earlier
blocks keep what tuning gave them: the authors tune these blocks and the projector only, and take the projector back.
The mathematics, and what differs: `holdfast.functional.rivals.model_tailor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from holdfast.data.types import Sample
from holdfast.errors import ConfigError
from holdfast.functional.rivals import RivalEdit, model_tailor
from holdfast.methods._glue.gram_sweep import GramSweep
from holdfast.methods.seqft import EditingConfig, draw, step_seed
from holdfast.stream.protocol import Checkpoint, TaskContext


@dataclass(frozen=True, kw_only=True)
class ModelTailorConfig(EditingConfig):
    """tuned_share: of the entries that stay tuned. change_weight: of the change in an entry's score, 0..1; the rest is
    of its sensitivity. first_block: edited blocks begin at this share of the depth; 0 edits all.

    compensation: "released" has the sign of the published code, which raises the output error; "sparsegpt" lowers it.
    """

    tuned_share: float = 0.1
    change_weight: float = 0.8
    first_block: float = 0.625
    compensation: Literal["sparsegpt", "released", "none"] = "sparsegpt"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.first_block < 1:
            raise ConfigError(f"first_block is {self.first_block}; expected a share of the depth in [0, 1).")
        for name in ("tuned_share", "change_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a share in 0..1.")


class ModelTailor(GramSweep):
    """Model Tailor: a few tuned entries stay, the rest returns, later columns compensate."""

    Config = ModelTailorConfig
    config: ModelTailorConfig
    sequential = True

    def first_block(self, count: int) -> int:
        """The block at this share of the depth; always one is left."""
        return min(count - 1, round(self.config.first_block * count))

    def gram_source(self, ctx: TaskContext, trained: Checkpoint) -> tuple[Checkpoint, Sequence[Sample], int | None]:
        """The tuned model, and samples of the task at hand drawn by the step's seed, cut as they were learned."""
        samples = draw(self.learned(ctx), self.config.task_samples, step_seed(ctx))
        return trained, samples, self.config.training.max_length

    def edit_layer(self, w_prev: Tensor, w_new: Tensor, inverse_factor: Tensor) -> RivalEdit:
        """Model Tailor of one layer; weights (r, c), inverse_factor (c, c)."""
        return model_tailor(
            w_prev,
            w_new,
            inverse_factor,
            tuned_share=self.config.tuned_share,
            change_weight=self.config.change_weight,
            compensation=self.config.compensation,
        )
