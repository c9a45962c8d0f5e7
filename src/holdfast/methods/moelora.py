"""MoELoRA, as the CoIN benchmark has it (arXiv 2403.08350): one mixture of LoRA experts, tuned task after task.

Every linear of the language model gets a few small experts and a router. A token's state says how much of each expert
it gets (a softmax over all of them), and experts and routers go on learning from task to task on the frozen base; the
rank is shared out over the experts. The arithmetic is that of the released code: scale alpha / r with the whole rank,
dropout before the experts and not before the router, no loss that balances them.

What a token gets depends on the token, so nothing is merged: the checkpoint is theta_0 under a folder of its own
(`holdfast.tuners.moelora`), and edits of weights do not apply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from holdfast.errors import ConfigError
from holdfast.methods.seqft import SeqFT, SeqFTConfig, step_seed
from holdfast.models.loaded import LoadedModel
from holdfast.stream.protocol import Checkpoint, TaskContext
from holdfast.training.training_config import TrainingConfig
from holdfast.tuners.moelora import MixtureTraining, fresh, load_mixtures


@dataclass(frozen=True, kw_only=True)
class MoeLoraConfig(SeqFTConfig):
    """experts: that share `training.rank`, which must be a multiple of their number."""

    experts: int = 8

    def __post_init__(self) -> None:
        if self.experts < 2:
            raise ConfigError(f"experts is {self.experts}; expected 2 or more.")
        if self.training.rank % self.experts:
            raise ConfigError(
                f"training.rank {self.training.rank} cannot be shared out evenly over {self.experts} experts. Make it "
                f"a multiple of {self.experts}, or change experts."
            )


class MoeLora(SeqFT):
    """MoELoRA (CoIN, arXiv 2403.08350): one mixture of LoRA experts with a router over tokens, tuned on and on.

    Files in the step's folder: moelora/ (the checkpoint's adapter folder), training.json.
    """

    Config = MoeLoraConfig
    config: MoeLoraConfig

    @property
    def together(self) -> frozenset[str]:
        """Each process with a copy of the base, which a tuner's folder asks for."""
        return frozenset({"copies"})

    def train_task(self, ctx: TaskContext) -> Checkpoint:
        """theta_0 under the mixtures, which learned the task after all those before."""
        return self.learn(replace(ctx, previous=ctx.theta_0))

    def end_task(self, ctx: TaskContext, trained: Checkpoint) -> Checkpoint:
        """What was learned, as it is."""
        return trained

    def training_options(self, ctx: TaskContext) -> dict[str, Any]:
        """The mixtures of the step before, or fresh ones; published in the step's own folder."""
        return {"adapter": self._adapter(ctx), "out": self.learned_folder(ctx)}

    def learned_folder(self, ctx: TaskContext) -> Path:
        """The step's own folder: the checkpoint is what it holds."""
        return ctx.work_dir / "moelora"

    def _adapter(self, ctx: TaskContext) -> Callable[[LoadedModel, TrainingConfig], Any]:
        before = ctx.previous_work_dir / "moelora" if ctx.previous_work_dir is not None else None

        def make(loaded: LoadedModel, config: TrainingConfig) -> Any:
            mixtures = (
                fresh(
                    loaded,
                    experts=self.config.experts,
                    rank=config.rank // self.config.experts,
                    scaling=config.alpha / config.rank,
                    seed=step_seed(ctx),
                )
                if before is None
                else load_mixtures(before, loaded)
            )
            return MixtureTraining(loaded, mixtures, config.dropout)

        return make


__all__ = ["MoeLora", "MoeLoraConfig"]
