"""Joint training: theta_0 tuned on all tasks so far at once, which needs all their data. An upper bound, not a rival.

Where the steps of a task are given (`training.max_steps`), the joint tuning of t tasks has t times as many, so that it
sees of each task what a method that learns them one after another does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from holdfast.data.types import Sample
from holdfast.methods.seqft import SeqFT
from holdfast.stream.protocol import Checkpoint, TaskContext
from holdfast.training.training_config import TrainingConfig


class Joint(SeqFT):
    """A LoRA on theta_0, tuned on the training samples of every task so far, mixed."""

    def samples(self, ctx: TaskContext) -> Sequence[Sample]:
        """Every sample of every task so far."""
        return [sample for task in ctx.stream.tasks[: ctx.step + 1] for sample in task.train]

    def training_config(self, ctx: TaskContext) -> TrainingConfig:
        """As many steps as the tasks so far have together."""
        config = self.config.training
        return config if config.max_steps is None else replace(config, max_steps=config.max_steps * (ctx.step + 1))

    @property
    def together(self) -> frozenset[str]:
        """As plain tuning: only what is learned from differs."""
        return frozenset({"copies", "shards"})

    def train_task(self, ctx: TaskContext) -> Checkpoint:
        """theta_0 under one adapter of all tasks so far."""
        return super().train_task(replace(ctx, previous=ctx.theta_0))

    def end_task(self, ctx: TaskContext, trained: Checkpoint) -> Checkpoint:
        """The tuned weights as one plain checkpoint."""
        return super().end_task(replace(ctx, previous=ctx.theta_0), trained)
