"""LwF, learning without forgetting (Li and Hoiem, TPAMI 2018), for a language model.

On the new task's own answers the tuned model stays close to what the model before the task would have said: a KL
divergence between the two distributions over the next token, at a temperature. The adapter switched off is the old
model, so none is kept in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import ConfigError
from holdfast.functional.distill import next_token_kl
from holdfast.methods.seqft import SeqFT, SeqFTConfig
from holdfast.stream.protocol import TaskContext


@dataclass(frozen=True, kw_only=True)
class LwfConfig(SeqFTConfig):
    """weight: of the divergence beside the task's loss. temperature: of both distributions.

    scaled: the divergence times temperature squared, which keeps its gradient's size (Hinton et al. 2015).
    """

    weight: float = 1.0
    temperature: float = 2.0
    scaled: bool = field(default=False, metadata={"before": True})

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf or not 0 < self.temperature < math.inf:
            raise ConfigError(f"weight {self.weight} and temperature {self.temperature}; expected >= 0 and > 0.")


class Lwf(SeqFT):
    """SeqFT with distillation from the model before the task."""

    Config = LwfConfig
    config: LwfConfig

    def training_options(self, ctx: TaskContext) -> dict[str, Any]:
        """The distillation loss against the model before the task."""
        return {"penalty": self._penalty, "penalty_mean": "tokens"}

    def _penalty(self, model: Any, inputs: Mapping[str, Tensor], outputs: Any) -> Tensor:
        shown = {name: value for name, value in inputs.items() if name not in ("labels", "num_items_in_batch")}
        with torch.no_grad(), _without_adapter(model):
            before = model(**shown).logits
        temperature = self.config.temperature
        factor = self.config.weight * (temperature**2 if self.config.scaled else 1.0)
        return factor * next_token_kl(outputs.logits, before, inputs["labels"], temperature=temperature)


class _without_adapter:  # noqa: N801 (a context manager, used as a function)
    """The model without its adapter and without dropout, and back."""

    def __init__(self, model: Any) -> None:
        self.model, self.off = model, model.disable_adapter()

    def __enter__(self) -> None:
        self.training = self.model.training
        self.model.eval()
        self.off.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self.off.__exit__(*exc)
        if isinstance(self.model, nn.Module):
            self.model.train(self.training)
