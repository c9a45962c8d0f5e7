"""O-LoRA (Wang et al., Findings of EMNLP 2023): a new task's LoRA stays orthogonal to those of earlier tasks.

The rows of A span the inputs that an update reads. The penalty is the sum of |A_i A_t^T| over all earlier A_i, so that
the new update reads from directions that no earlier one uses. A second term, the sum of the norms of the new A's and
B's, keeps the update small. The paper keeps all adapters; here they are merged after each task, and only their A's are
carried.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import ConfigError
from holdfast.methods._glue.lora_layers import Remembered, carried, carry, live_factors, read_adapter
from holdfast.methods.seqft import SeqFT, SeqFTConfig
from holdfast.stream.protocol import Checkpoint, TaskContext

_FILE = "rows.safetensors"


@dataclass(frozen=True, kw_only=True)
class OLoraConfig(SeqFTConfig):
    """weight: of the orthogonality penalty (lambda_1). norm_weight: of the sum of the norms of every new A and B
    (lambda_2); the released scripts have 0 for streams of four tasks, and 0 to 0.3, by task, for one of fifteen.
    """

    weight: float = 0.5
    norm_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("weight", "norm_weight"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 0 or more.")


class OLora(SeqFT):
    """SeqFT with an orthogonality penalty on A."""

    Config = OLoraConfig
    config: OLoraConfig

    def training_options(self, ctx: TaskContext) -> dict[str, Any]:
        """The penalty on A's overlap with the rows of earlier tasks' A, and on the size of the new factors."""
        rows = Remembered(carried(ctx, _FILE))

        def penalty(model: nn.Module, inputs: Mapping[str, Tensor], outputs: Any) -> Tensor:
            total = outputs.logits.new_zeros((), dtype=torch.float32)
            for factors, earlier in rows.layers(model):
                total = total + (earlier @ factors.a.float().T).abs().sum()
            total = self.config.weight * total
            if self.config.norm_weight:
                # From the first task on: there is nothing to be orthogonal to yet, but something to keep small.
                sizes = [_norm(f) for factors in live_factors(model) for f in (factors.a, factors.b)]
                total = total + self.config.norm_weight * torch.stack(sizes).sum()
            return total

        return {"penalty": penalty}

    def end_task(self, ctx: TaskContext, trained: Checkpoint) -> Checkpoint:
        """Carry this task's A on beside the earlier ones, then write the tuned weights."""
        before = carried(ctx, _FILE)

        def rows() -> dict[str, Tensor]:
            own = {factors.name: factors.a for factors in read_adapter(trained.adapters[-1])}
            return {name: torch.cat([before[name], a]) if name in before else a for name, a in own.items()}

        carry(ctx, _FILE, rows)
        return super().end_task(ctx, trained)


def _norm(factor: Tensor) -> Tensor:
    """Its Frobenius norm, with gradient 0 where it is 0 (B at the first step)."""
    return torch.linalg.vector_norm(factor.float())
