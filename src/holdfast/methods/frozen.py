"""The frozen base: nothing is learned. What every other method's forgetting and loss of refusals is counted from."""

from __future__ import annotations

from holdfast.methods.seqft import SeqFT
from holdfast.stream.protocol import Checkpoint, TaskContext


class Frozen(SeqFT):
    """theta_0 after every task. It has the options of tuning, so that one run file serves it too, and uses none.

    learns: read by `holdfast.experiment.plan`, which counts no training of a method that says False.
    """

    learns = False

    @property
    def together(self) -> frozenset[str]:
        """Nothing is learned, in however many processes."""
        return frozenset({"copies", "shards"})

    def train_task(self, ctx: TaskContext) -> Checkpoint:
        """theta_0 as it is."""
        return ctx.theta_0

    def end_task(self, ctx: TaskContext, trained: Checkpoint) -> Checkpoint:
        """theta_0 as it is."""
        return ctx.theta_0
