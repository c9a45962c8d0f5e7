"""SafeLoRA (Hsu et al., NeurIPS 2024) after each task: updates are projected onto the alignment's directions.

The alignment is what theta_0 has and the model before its alignment, which a user names (`unaligned`), has not. Which
layers are projected is known after a look at the adapter alone: the ten that stray most, as in the released code. The
edit of a layer: `holdfast.rules.safe_lora`.
"""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.checkpoints.merged import MergedCheckpoint, open_checkpoint
from holdfast.errors import ConfigError
from holdfast.functional.rivals import safelora
from holdfast.methods._glue.lora_layers import read_adapter
from holdfast.methods._glue.rule_options import part_of
from holdfast.methods._glue.unaligned import require_fit
from holdfast.methods.seqft import SeqFT, SeqFTConfig
from holdfast.rules.base import EditRule
from holdfast.rules.safe_lora import SafeLoraOptions, SafeLoraRule, alignment_of, lowest_of
from holdfast.stream.protocol import Checkpoint, TaskContext


@dataclass(frozen=True, kw_only=True)
class SafeLoraConfig(SeqFTConfig, SafeLoraOptions):
    """Options of SafeLoRA in a stream: the edit's, over those of tuning."""


class SafeLora(SeqFT):
    """SafeLoRA: an update that leaves the direction of alignment is projected onto it."""

    Config = SafeLoraConfig
    config: SafeLoraConfig

    def require(self, ctx: TaskContext) -> None:
        """Raises ConfigError: the unaligned model is not theta_0 before its alignment. ModelError: it is not there."""
        require_fit(ctx, self.config.unaligned, self.name)

    def end_task(self, ctx: TaskContext, trained: Checkpoint) -> Checkpoint:
        """Project what strays, with the aligned and the unaligned model open."""
        with open_checkpoint(ctx.theta_0) as aligned, open_checkpoint(self.config.unaligned) as unaligned:
            lowest = self._lowest(trained, aligned, unaligned) if self.config.threshold is None else None
            self._rule = SafeLoraRule(part_of(self.config, SafeLoraOptions), aligned, unaligned, lowest)
            return super().end_task(ctx, trained)

    def _lowest(self, trained: Checkpoint, aligned: MergedCheckpoint, unaligned: MergedCheckpoint) -> frozenset[str]:
        cosines = {}
        for factors in read_adapter(trained.adapters[-1]):
            alignment = alignment_of(factors.name, aligned, unaligned)
            if alignment.any():  # alignment says nothing of a layer that it left alone
                cosines[factors.name] = safelora(factors.a, factors.b, alignment).cosine
        if not cosines:
            raise ConfigError(
                f"{self.name}: {self.config.unaligned} has the weights of the model that is tuned in every layer that "
                "was tuned. Name the model as it was before its alignment."
            )
        return lowest_of(cosines, self.config.lowest)

    def step_rule(self, ctx: TaskContext) -> EditRule:
        """The projection of the step at hand."""
        return self._rule


__all__ = ["SafeLora", "SafeLoraConfig", "SafeLoraRule"]
