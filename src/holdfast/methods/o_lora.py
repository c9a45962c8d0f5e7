"""O-LoRA (Wang et al., Findings of EMNLP 2023): a new task's LoRA stays orthogonal to those of earlier tasks.

The rows of A span the inputs that an update reads. The penalty is the sum of |A_i A_t^T| over all earlier A_i, so that
the new update reads from directions that no earlier one uses. The paper keeps all adapters; here they are merged after
each task, and only their A's are carried.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import ConfigError
from holdfast.methods._glue.lora_layers import Remembered, carried, carry, read_adapter
from holdfast.methods.seqft import SeqFT, SeqFTConfig
from holdfast.stream.protocol import Checkpoint, TaskContext

_FILE = "rows.safetensors"


@dataclass(frozen=True, kw_only=True)
class OLoraConfig(SeqFTConfig):
    """weight: of the orthogonality penalty (the paper's lambda_1)."""

    weight: float = 0.5

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ConfigError(f"weight is {self.weight}; expected 0 or more.")


class OLora(SeqFT):
    """SeqFT with an orthogonality penalty on A."""

    Config = OLoraConfig
    config: OLoraConfig

    def training_options(self, ctx: TaskContext) -> dict[str, Any]:
        """The penalty on A's overlap with the rows of earlier tasks' A."""
        rows = Remembered(carried(ctx, _FILE))

        def penalty(model: nn.Module, inputs: Mapping[str, Tensor], outputs: Any) -> Tensor:
            total = outputs.logits.new_zeros((), dtype=torch.float32)
            for factors, earlier in rows.layers(model):
                total = total + (earlier @ factors.a.float().T).abs().sum()
            return self.config.weight * total

        return {"penalty": penalty}

    def end_task(self, ctx: TaskContext, trained: Checkpoint) -> Checkpoint:
        """Carry this task's A on beside the earlier ones, then write the tuned weights."""
        before = carried(ctx, _FILE)

        def rows() -> dict[str, Tensor]:
            own = {factors.name: factors.a for factors in read_adapter(trained.adapters[-1])}
            return {name: torch.cat([before[name], a]) if name in before else a for name, a in own.items()}

        carry(ctx, _FILE, rows)
        return super().end_task(ctx, trained)
