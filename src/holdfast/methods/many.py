"""MAny (Gao et al., arXiv 2604.14016): tasks are tuned apart and merged in closed form after each.

OUR READING, of the abstract: every task's LoRA is tuned on theta_0, and the merged update M is the least-squares answer
to "for what a task's A reads, do what its B A did", sum over tasks of ||(M - B_t A_t) A_t^T||^2. The paper solves it by
recursive least squares; the same minimum is solved at once here, from the factors that are carried. Its other half, the
merging of tuned projectors by visual prototypes, is left out: no projector is tuned here. The edit of a layer:
`holdfast.rules.many`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from safetensors.torch import load_file
from torch import Tensor

from holdfast.checkpoints.merged import open_checkpoint
from holdfast.methods._glue.lora_layers import carried, carry, read_adapter
from holdfast.methods._glue.rule_options import part_of
from holdfast.methods.seqft import SeqFT, SeqFTConfig
from holdfast.rules.base import EditRule
from holdfast.rules.many import ManyOptions, ManyRule
from holdfast.stream.protocol import Checkpoint, TaskContext

_FILE = "updates.safetensors"


@dataclass(frozen=True, kw_only=True)
class ManyConfig(SeqFTConfig, ManyOptions):
    """Options of MAny in a stream: the merge's, over those of tuning."""


class Many(SeqFT):
    """MAny (arXiv 2604.14016, our reading): tasks are tuned apart and merged by least squares after each."""

    Config = ManyConfig
    config: ManyConfig

    def train_task(self, ctx: TaskContext) -> Checkpoint:
        """theta_0 under this task's adapter alone."""
        return super().train_task(replace(ctx, previous=ctx.theta_0))

    def end_task(self, ctx: TaskContext, trained: Checkpoint) -> Checkpoint:
        """Carry this task's factors on beside the earlier ones, then merge them all into theta_0."""

        def updates() -> dict[str, Tensor]:
            found = dict(carried(ctx, _FILE))
            for factors in read_adapter(trained.adapters[-1]):
                found[f"{factors.name}/{ctx.step}/a"] = factors.a
                found[f"{factors.name}/{ctx.step}/b"] = factors.b * factors.scaling
            return found

        carry(ctx, _FILE, updates)
        with open_checkpoint(ctx.theta_0) as theta_0:
            self._theta_0 = theta_0
            return super().end_task(replace(ctx, previous=ctx.theta_0), trained)

    def step_rule(self, ctx: TaskContext) -> EditRule:
        """The merge of every task's update so far."""
        return ManyRule(part_of(self.config, ManyOptions), self._theta_0, load_file(ctx.carry_dir / _FILE))


__all__ = ["Many", "ManyConfig", "ManyRule"]
