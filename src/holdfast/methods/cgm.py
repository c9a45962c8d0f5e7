"""CGM (arXiv 2606.24963) after each task: an entry keeps its change as far as the new task needs it more than the old.

Both merges are those of the released code: W_hat = W_prev + D F / (F + alpha F_prev), entry by entry, or (CGM+, `kept`)
the whole change of the entries of each output whose (alpha F_prev - F) D^2 is lowest. F is the mean squared gradient of
the tuned model's loss on the task's samples.

OUR READING of a stream: that code merges one tuned model with the one before it, whose F_prev it takes on the data that
model was made from. Here F_prev is the sum of the F of earlier tasks, taken when they were learned; the first task has
none. Every layer that was tuned is merged (there: blocks 20 to 31 of 32, projector and head). What that code computes
as F is zero everywhere, for the line that adds is commented out. r x c values per layer are carried. The edit of a
layer: `holdfast.rules.cgm`.
"""

from __future__ import annotations

from dataclasses import dataclass

from safetensors.torch import load_file
from torch import Tensor

from holdfast.errors import ConfigError
from holdfast.methods._glue.lora_layers import carried, carry, keep
from holdfast.methods._glue.rule_options import part_of
from holdfast.methods._glue.sample_gradients import mean_squared_gradients
from holdfast.methods.seqft import SeqFT, SeqFTConfig, draw, step_seed
from holdfast.rules.base import EditRule
from holdfast.rules.cgm import CgmOptions, CgmRule
from holdfast.stream.protocol import Checkpoint, TaskContext

_OWN, _ALL = "importance.safetensors", "importances.safetensors"


@dataclass(frozen=True, kw_only=True)
class CgmConfig(SeqFTConfig, CgmOptions):
    """Options of CGM in a stream: the edit's, over those of tuning.

    importance_samples: of the task, drawn by seed, whose gradients are squared.
    """

    importance_samples: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.importance_samples < 1:
            raise ConfigError(f"importance_samples is {self.importance_samples}; expected 1 or more.")


class Cgm(SeqFT):
    """CGM and CGM+ (arXiv 2606.24963): an entry keeps its change as far as the new task needs it more."""

    Config = CgmConfig
    config: CgmConfig

    def end_task(self, ctx: TaskContext, trained: Checkpoint) -> Checkpoint:
        """Estimate what the task needs, merge, and carry on what all tasks so far need."""
        own = ctx.scratch_dir / _OWN  # no later step asks for it
        keep(own, lambda: self._importance(ctx, trained))
        self._before, self._own = carried(ctx, _ALL), load_file(own)

        def together() -> dict[str, Tensor]:
            return {k: v + self._before[k] if k in self._before else v for k, v in self._own.items()}

        carry(ctx, _ALL, together)
        return super().end_task(ctx, trained)

    def step_rule(self, ctx: TaskContext) -> EditRule:
        """The merge of the step at hand."""
        return CgmRule(part_of(self.config, CgmOptions), self._own, self._before)

    def _importance(self, ctx: TaskContext, trained: Checkpoint) -> dict[str, Tensor]:
        samples = draw(self.learned(ctx), self.config.importance_samples, step_seed(ctx))
        return mean_squared_gradients(ctx, trained, samples, cut_at=self.config.training.max_length)


__all__ = ["Cgm", "CgmConfig", "CgmRule"]
