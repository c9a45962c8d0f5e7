"""RegLoRA (SEFE, Chen et al., ICML 2025): protect the few entries in which an earlier task's knowledge sits.

After a task the top share of the entries of |B A| is marked per layer; later updates pay for changing marked entries.
As in the released code, the penalty is on B A as the factors stand, without LoRA's alpha / r: its weight then means the
same at any alpha; and an entry that two tasks marked counts twice in its layer's mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import ConfigError
from holdfast.methods._glue.lora_layers import Remembered, carried, carry, read_adapter
from holdfast.methods.seqft import SeqFT, SeqFTConfig
from holdfast.stream.protocol import Checkpoint, TaskContext

_FILE = "marked.safetensors"


@dataclass(frozen=True, kw_only=True)
class RegLoraConfig(SeqFTConfig):
    """share: of a layer's entries marked after each task, 0..1. weight: of the penalty on changing them."""

    share: float = 0.02
    weight: float = 2.5e3

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or not 0 <= self.weight < math.inf:
            raise ConfigError(f"share {self.share} and weight {self.weight}; expected a share in (0, 1] and >= 0.")


class RegLora(SeqFT):
    """SeqFT with a penalty on the entries that earlier tasks changed most."""

    Config = RegLoraConfig
    config: RegLoraConfig

    def training_options(self, ctx: TaskContext) -> dict[str, Any]:
        """The penalty on moving entries that mattered before."""
        marked = Remembered(carried(ctx, _FILE))

        def penalty(model: nn.Module, inputs: Mapping[str, Tensor], outputs: Any) -> Tensor:
            total = outputs.logits.new_zeros((), dtype=torch.float32)
            layers = 0
            for factors, entries in marked.layers(model):
                total = total + (factors.b @ factors.a).flatten()[entries].abs().float().mean()
                layers += 1
            return self.config.weight * total / max(1, layers)

        return {"penalty": penalty}

    def end_task(self, ctx: TaskContext, trained: Checkpoint) -> Checkpoint:
        """Carry on which entries mattered, then write the tuned weights."""
        before = carried(ctx, _FILE)

        def marked() -> dict[str, Tensor]:
            found = {}
            for factors in read_adapter(trained.adapters[-1]):
                size = (factors.b @ factors.a).abs().flatten()
                top = size.topk(max(1, int(self.config.share * size.numel())), sorted=False).indices
                found[factors.name] = torch.cat([top, before[factors.name]]) if factors.name in before else top
            return found

        carry(ctx, _FILE, marked)
        return super().end_task(ctx, trained)
