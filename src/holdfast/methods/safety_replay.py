"""Safety replay: a few refusals are learned beside every task's samples (Bianchi et al., ICLR 2024).

The simplest remedy there is: theta_0's own answers to forbidden requests, the stream's safety calibration, are mixed
into the task's training samples. It needs gradients on safety data, which the edits here do without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.data.types import Sample, Stream
from holdfast.errors import ConfigError
from holdfast.methods._glue.refusals import refusals
from holdfast.methods.seqft import SeqFT, SeqFTConfig, draw
from holdfast.stream.protocol import TaskContext


@dataclass(frozen=True, kw_only=True)
class SafetyReplayConfig(SeqFTConfig):
    """refusals: theta_0's safe answers mixed into each task, at most as many as the stream has; drawn once by seed.

    repeat: how often each stands in the mixture.
    """

    refusals: int = 100
    repeat: int = 1

    def __post_init__(self) -> None:
        for name in ("refusals", "repeat"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 1 or more.")


class SafetyReplay(SeqFT):
    """SeqFT on the task's samples and a few refusals."""

    Config = SafetyReplayConfig
    config: SafetyReplayConfig

    def check_stream(self, stream: Stream) -> None:
        """Raises CalibrationError: the stream has no safe answers to mix in."""
        refusals(stream, self.name)

    def learned(self, ctx: TaskContext) -> Sequence[Sample]:
        """The task's samples, screened where the options say so, and the refusals."""
        # Seeded by the run, not by the step: every task is mixed with the same ones.
        mixed = draw(refusals(ctx.stream, self.name), self.config.refusals, ctx.seed)
        return [*super().learned(ctx), *(mixed * self.config.repeat)]
