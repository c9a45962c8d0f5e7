"""EWC, elastic weight consolidation (Kirkpatrick et al., PNAS 2017), online (Schwarz et al. 2018), on merged weights.

After a task the diagonal Fisher matrix of every tuned weight is estimated on the task's samples and added to what is
carried; in the next task the change of a weight costs weight / 2 * F * change^2. The change of a LoRA is scaling * B A,
so r x c is formed per layer and step: meant for small models, and as a yardstick.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import ConfigError
from holdfast.methods._glue.lora_layers import Remembered, carried, carry
from holdfast.methods._glue.sample_gradients import mean_squared_gradients
from holdfast.methods.seqft import SeqFT, SeqFTConfig, draw, step_seed
from holdfast.stream.protocol import Checkpoint, TaskContext

_FILE = "fisher.safetensors"


@dataclass(frozen=True, kw_only=True)
class EwcConfig(SeqFTConfig):
    """weight: of the penalty. decay: of the carried Fisher at each task. fisher_samples: of the task, drawn by seed."""

    weight: float = 1e4
    decay: float = 1.0
    fisher_samples: int = 128

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf or not 0 <= self.decay <= 1 or self.fisher_samples < 1:
            raise ConfigError(
                f"weight {self.weight}, decay {self.decay}, fisher_samples {self.fisher_samples}; expected >= 0, "
                "0..1 and 1 or more."
            )


class Ewc(SeqFT):
    """SeqFT with a quadratic penalty on what earlier tasks were sensitive to."""

    Config = EwcConfig
    config: EwcConfig

    def training_options(self, ctx: TaskContext) -> dict[str, Any]:
        """The quadratic penalty around the previous weights, by the carried Fisher."""
        fisher = Remembered(carried(ctx, _FILE))

        def penalty(model: nn.Module, inputs: Mapping[str, Tensor], outputs: Any) -> Tensor:
            total = outputs.logits.new_zeros((), dtype=torch.float32)
            for factors, importance in fisher.layers(model):
                total = total + (importance * factors.update().float().square()).sum()
            return self.config.weight / 2 * total

        return {"penalty": penalty}

    def end_task(self, ctx: TaskContext, trained: Checkpoint) -> Checkpoint:
        """Carry the Fisher on, then write the tuned weights."""
        merged = super().end_task(ctx, trained)
        carry(ctx, _FILE, lambda: self._fisher(ctx, merged))
        return merged

    def _fisher(self, ctx: TaskContext, merged: Checkpoint) -> dict[str, Tensor]:
        samples = draw(self.learned(ctx), self.config.fisher_samples, step_seed(ctx))
        before = carried(ctx, _FILE)
        found = mean_squared_gradients(ctx, merged, samples, cut_at=self.config.training.max_length)
        return {
            name: mean + self.config.decay * before[name] if name in before else mean for name, mean in found.items()
        }
