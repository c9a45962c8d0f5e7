"""SafeLoRA (Hsu et al., NeurIPS 2024): project the update of a layer onto the alignment's directions where it strays.

With V = W_aligned - W_unaligned and C = V V^T / ||V||: where cos(C B A, B A) is at most a threshold, B A becomes C B A.
It needs the model before its alignment, which a user names (`unaligned`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.checkpoints.merged import MergedCheckpoint
from holdfast.errors import ConfigError
from holdfast.functional.rivals import safelora
from holdfast.rules.base import DenseEdit, Layer, Rule, norms


@dataclass(frozen=True, kw_only=True)
class SafeLoraOptions:
    """unaligned: folder or hub id of the model before its alignment. threshold: of the cosine, -1..1.

    Raises: ConfigError: a threshold that is no cosine.
    """

    unaligned: str
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not -1 <= self.threshold <= 1:
            raise ConfigError(f"threshold is {self.threshold}; expected a cosine, -1..1.")


@dataclass(frozen=True)
class SafeLoraRule(Rule):
    """One layer's projection. aligned, unaligned: open checkpoints that the alignment's change is read from."""

    config: SafeLoraOptions
    aligned: MergedCheckpoint
    unaligned: MergedCheckpoint
    Config = SafeLoraOptions
    name = "safe_lora"
    inputs = ("aligned", "unaligned")

    def edit(self, layer: Layer, w_prev: Tensor, w_new: Tensor) -> DenseEdit:
        """The change, projected where it strays. w_prev, w_new: (r, c)."""
        key = f"{layer.name}.weight"
        alignment = self.aligned.read_float(key) - self.unaligned.read_float(key)
        delta = w_new.float() - w_prev.float()
        # The update itself as B, the identity as A: the merged change has no factors any more.
        done = safelora(torch.eye(delta.shape[1]), delta, alignment, threshold=self.config.threshold)
        row = {"alignment_cosine": done.cosine, "projected": done.projected, **norms(delta, done.lora_b)}
        return DenseEdit(weight=w_prev.float() + done.lora_b, row=row)
