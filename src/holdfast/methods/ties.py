"""TIES (Yadav et al., NeurIPS 2023) over a stream: trim each change, elect a sign per entry, average what agrees.

Tasks are learned one after another, as by SeqFT; the released model is theta_0 plus the merge of all changes so far,
and the next task starts from it. The changes are kept as adapters, so the merge always sees every task. The edit of a
layer: `holdfast.rules.ties`.
"""

from __future__ import annotations

from dataclasses import dataclass

from safetensors.torch import load_file
from torch import Tensor

from holdfast.checkpoints.merged import open_checkpoint
from holdfast.methods._glue.lora_layers import carried, carry, read_adapter
from holdfast.methods._glue.rule_options import part_of
from holdfast.methods.seqft import SeqFT, SeqFTConfig
from holdfast.rules.base import EditRule
from holdfast.rules.ties import TiesOptions, TiesRule
from holdfast.stream.protocol import Checkpoint, TaskContext

_FILE = "updates.safetensors"


@dataclass(frozen=True, kw_only=True)
class TiesConfig(SeqFTConfig, TiesOptions):
    """Options of TIES in a stream: the merge's, over those of tuning."""


class Ties(SeqFT):
    """TIES: theta_0 plus the merge of all changes so far, each trimmed, signs elected entry by entry."""

    Config = TiesConfig
    config: TiesConfig

    def end_task(self, ctx: TaskContext, trained: Checkpoint) -> Checkpoint:
        """Carry this task's update on beside the earlier ones, then merge them all into theta_0."""

        def updates() -> dict[str, Tensor]:
            found = dict(carried(ctx, _FILE))
            for factors in read_adapter(trained.adapters[-1]):
                found[f"{factors.name}/{ctx.step}/a"] = factors.a
                found[f"{factors.name}/{ctx.step}/b"] = factors.b * factors.scaling
            return found

        carry(ctx, _FILE, updates)
        with open_checkpoint(ctx.theta_0) as theta_0:
            self._theta_0 = theta_0
            return super().end_task(ctx, trained)

    def step_rule(self, ctx: TaskContext) -> EditRule:
        """TIES over every update so far."""
        return TiesRule(part_of(self.config, TiesOptions), self._theta_0, load_file(ctx.carry_dir / _FILE))


__all__ = ["Ties", "TiesConfig", "TiesRule"]
