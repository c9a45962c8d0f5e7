"""RESTA (Bhardwaj et al., ACL 2024) after each task: the safety vector is added back to the tuned model.

The safety vector is what theta_0 has and a model without its alignment, which a user names (`unaligned`), has not. In a
stream it is added after every task, as the authors add it to one tuned model. The edit of a layer:
`holdfast.rules.resta`.
"""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.checkpoints.merged import open_checkpoint
from holdfast.methods._glue.rule_options import part_of
from holdfast.methods._glue.unaligned import require_fit
from holdfast.methods.seqft import SeqFT, SeqFTConfig
from holdfast.rules.base import EditRule
from holdfast.rules.resta import RestaOptions, RestaRule
from holdfast.stream.protocol import Checkpoint, TaskContext


@dataclass(frozen=True, kw_only=True)
class RestaConfig(SeqFTConfig, RestaOptions):
    """Options of RESTA in a stream: the edit's, over those of tuning."""


class Resta(SeqFT):
    """RESTA (arXiv 2402.11746): the tuned weights plus a share of what alignment once changed."""

    Config = RestaConfig
    config: RestaConfig

    def require(self, ctx: TaskContext) -> None:
        """Raises ConfigError: the unaligned model is not theta_0 before its alignment. ModelError: it is not there."""
        require_fit(ctx, self.config.unaligned, self.name)

    def end_task(self, ctx: TaskContext, trained: Checkpoint) -> Checkpoint:
        """Add the safety vector, with the aligned and the unaligned model open."""
        with open_checkpoint(ctx.theta_0) as aligned, open_checkpoint(self.config.unaligned) as unaligned:
            self._rule = RestaRule(part_of(self.config, RestaOptions), aligned, unaligned)
            return super().end_task(ctx, trained)

    def step_rule(self, ctx: TaskContext) -> EditRule:
        """The addition of the step at hand."""
        return self._rule


__all__ = ["Resta", "RestaConfig", "RestaRule"]
