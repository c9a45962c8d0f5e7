"""One-shot safety repair (Zhang et al., ICLR 2026, arXiv 2601.01887) after each task: tuned again on one refusal.

The tuned model learns one general refusal for ten epochs at a learning rate of 2e-5, and is safe again, by the paper.
The authors tune all weights; here it is a second LoRA like the task's, at the same rate unless told otherwise. The
refusal is theta_0's own answer to one of the stream's safety calibration prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.data.types import Stream
from holdfast.errors import ConfigError
from holdfast.methods._glue.refusals import refusals
from holdfast.methods._glue.repair import repaired
from holdfast.methods.seqft import SeqFT, SeqFTConfig, draw
from holdfast.stream.protocol import Checkpoint, TaskContext


@dataclass(frozen=True, kw_only=True)
class OneShotConfig(SeqFTConfig):
    """refusals: how many are learned, drawn once by seed; the paper's is one. epochs, learning_rate: of the repair."""

    refusals: int = 1
    epochs: int = 10
    learning_rate: float = 2e-5

    def __post_init__(self) -> None:
        for name in ("refusals", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 1 or more.")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate is {self.learning_rate}; expected more than 0.")


class OneShot(SeqFT):
    """One-shot safety repair (arXiv 2601.01887): SeqFT, and after it the same tuning on one refusal."""

    Config = OneShotConfig
    config: OneShotConfig

    def check_stream(self, stream: Stream) -> None:
        """Raises CalibrationError: the stream has no safe answer to learn."""
        refusals(stream, self.name)

    def train_task(self, ctx: TaskContext) -> Checkpoint:
        """The previous checkpoint under the task's adapter and that of the repair."""
        tuned = super().train_task(ctx)
        shots = draw(refusals(ctx.stream, self.name), self.config.refusals, ctx.seed)
        learning_rate = self.config.learning_rate
        return repaired(
            ctx, tuned, shots, self.config, steps=self.config.epochs, batch_size=len(shots), learning_rate=learning_rate
        )
