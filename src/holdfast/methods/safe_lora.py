"""SafeLoRA (Hsu et al., NeurIPS 2024): project the update of a layer onto the alignment's directions where it strays.

With V = W_aligned - W_unaligned and C = V V^T / ||V||: where cos(C B A, B A) is at most a threshold, B A becomes C B A.
It needs the model before its alignment, which a user names (`unaligned`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdfast.checkpoints.merged import MergedCheckpoint, open_checkpoint
from holdfast.errors import ConfigError
from holdfast.functional.rivals import safelora
from holdfast.methods.seqft import SeqFT, SeqFTConfig
from holdfast.rules.base import DenseEdit, EditRule, Layer
from holdfast.stream.protocol import Checkpoint, TaskContext


@dataclass(frozen=True, kw_only=True)
class SafeLoraConfig(SeqFTConfig):
    """unaligned: folder or hub id of the model before its alignment. threshold: of the cosine, -1..1."""

    unaligned: str
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not -1 <= self.threshold <= 1:
            raise ConfigError(f"threshold is {self.threshold}; expected a cosine, -1..1.")


@dataclass(frozen=True)
class SafeLoraRule:
    """One layer's projection. aligned, unaligned: open checkpoints that the alignment's change is read from."""

    config: SafeLoraConfig
    aligned: MergedCheckpoint
    unaligned: MergedCheckpoint
    name = "safe_lora"
    needs_curvature = False

    def settings(self) -> Mapping[str, Any]:
        return {"unaligned": self.config.unaligned, "threshold": self.config.threshold}

    def edit(self, layer: Layer, w_prev: Tensor, w_new: Tensor) -> DenseEdit:
        key = f"{layer.name}.weight"
        alignment = self.aligned.read_float(key) - self.unaligned.read_float(key)
        delta = w_new.float() - w_prev.float()
        # The update itself as B, the identity as A: the merged change has no factors any more.
        done = safelora(torch.eye(delta.shape[1]), delta, alignment, threshold=self.config.threshold)
        row = {
            "cosine": done.cosine,
            "projected": done.projected,
            "change": float(torch.linalg.vector_norm(delta, dtype=torch.float64)),
            "distance": float(torch.linalg.vector_norm(done.lora_b, dtype=torch.float64)),
        }
        return DenseEdit(weight=w_prev.float() + done.lora_b, row=row)


class SafeLora(SeqFT):
    """SafeLoRA: an update that leaves the direction of alignment is projected onto it."""

    Config = SafeLoraConfig
    config: SafeLoraConfig

    def end_task(self, ctx: TaskContext, trained: Checkpoint) -> Checkpoint:
        """Project what strays, with the aligned and the unaligned model open."""
        with open_checkpoint(ctx.theta_0) as aligned, open_checkpoint(self.config.unaligned) as unaligned:
            self._rule = SafeLoraRule(self.config, aligned, unaligned)
            return super().end_task(ctx, trained)

    def step_rule(self, ctx: TaskContext) -> EditRule:
        """The projection of the step at hand."""
        return self._rule
