"""Experience replay: a share of every earlier task's training samples is learned again beside the new ones.

The only method here that keeps data; the upper bound of what a method without data can hope for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.data.types import Sample
from holdfast.errors import ConfigError
from holdfast.methods.seqft import SeqFT, SeqFTConfig, draw
from holdfast.stream.protocol import TaskContext


@dataclass(frozen=True, kw_only=True)
class ReplayConfig(SeqFTConfig):
    """share: of each earlier task's training samples that the buffer holds, drawn once by seed (rounded up)."""

    share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"share is {self.share}; expected a share in (0, 1].")


class Replay(SeqFT):
    """SeqFT on the new task's samples and the buffer."""

    Config = ReplayConfig
    config: ReplayConfig

    def samples(self, ctx: TaskContext) -> Sequence[Sample]:
        """The task's samples with the buffer of every earlier task."""
        learned = list(ctx.stream.tasks[ctx.step].train)
        for step, task in enumerate(ctx.stream.tasks[: ctx.step]):
            # Seeded by the task, not by the step that asks: the buffer of a task never changes.
            learned += draw(task.train, math.ceil(self.config.share * len(task.train)), ctx.seed * 1000 + step)
        return learned
