"""SPPFT, safely partial-parameter fine-tuning (Li et al., ICLR 2025, arXiv 2408.17003): some blocks are not tuned.

A few decoder blocks in the middle decide whether a request is refused ("safety layers"); their gradients are fixed at
zero. For Llama-2-7B-chat the paper finds blocks 6 to 14 of 32, and similar shares of the depth elsewhere; which they
are is an option here, found by nobody for the embedded model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import PeftModel

from holdfast.errors import ConfigError
from holdfast.methods.seqft import SeqFT, SeqFTConfig
from holdfast.models.families import decoder_blocks
from holdfast.models.loaded import LoadedModel
from holdfast.stream.protocol import TaskContext
from holdfast.training.supervised import lora_adapter
from holdfast.training.training_config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class SppftConfig(SeqFTConfig):
    """safety_layers: from where to where, in shares of the depth, blocks are not tuned; [6/32, 15/32) by default."""

    safety_layers: tuple[float, float] = (6 / 32, 15 / 32)

    def __post_init__(self) -> None:
        start, stop = self.safety_layers
        if not 0 <= start < stop <= 1:
            raise ConfigError(f"safety_layers is {list(self.safety_layers)}; expected shares 0 <= start < stop <= 1.")


class Sppft(SeqFT):
    """SPPFT (arXiv 2408.17003): SeqFT with a LoRA on all blocks but the safety layers."""

    Config = SppftConfig
    config: SppftConfig

    def training_options(self, ctx: TaskContext) -> dict[str, Any]:
        """An adapter that leaves the safety layers out."""
        return {"adapter": self._adapter}

    def tuned_blocks(self, count: int) -> list[int]:
        """0-based blocks of `count` that are tuned. At least one block is a safety layer.

        Raises: ConfigError: none is left to tune.
        """
        start, stop = (round(share * count) for share in self.config.safety_layers)
        start = min(start, count - 1)
        fixed = range(start, max(stop, start + 1))
        left = [block for block in range(count) if block not in fixed]
        if not left:
            raise ConfigError(
                f"safety_layers {list(self.config.safety_layers)} are all {count} blocks of the model; nothing is left "
                "to tune. Name a smaller share."
            )
        return left

    def _adapter(self, loaded: LoadedModel, config: TrainingConfig) -> PeftModel:
        return lora_adapter(loaded, config, blocks=self.tuned_blocks(len(decoder_blocks(loaded.model))))
