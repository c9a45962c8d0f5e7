"""SafeLoRA (Hsu et al., NeurIPS 2024): project the update of a layer onto the alignment's directions where it strays.

With V = W_aligned - W_unaligned and C = V V^T / ||V||: where cos(C B A, B A) is at most a threshold, B A becomes C B A.
The threshold is a number, or that of the layers with the lowest cosines (the released default: ten of them). It needs
the model before its alignment, which a user names (`unaligned`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from holdfast.checkpoints.merged import MergedCheckpoint
from holdfast.errors import ConfigError
from holdfast.functional.rivals import safelora
from holdfast.rules.base import DenseEdit, Layer, Rule, norms


@dataclass(frozen=True, kw_only=True)
class SafeLoraOptions:
    """unaligned: folder or hub id of the model before its alignment.

    lowest: as many layers with the lowest cosines are projected, as by default in the released code. threshold: project
        every layer whose cosine is at most this, -1..1, instead; null: `lowest` decides.

    Raises: ConfigError: a threshold that is no cosine, or no layer to project.
    """

    unaligned: str
    lowest: int = 10
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise ConfigError(f"threshold is {self.threshold}; expected a cosine, -1..1, or null for the `lowest`.")
        if self.lowest < 1:
            raise ConfigError(f"lowest is {self.lowest}; expected 1 or more layers.")


@dataclass(frozen=True)
class SafeLoraRule(Rule):
    """One layer's projection. aligned, unaligned: open checkpoints that the alignment's change is read from.

    lowest: names of the layers to project where the options have no threshold; see `lowest_of`.
    """

    config: SafeLoraOptions
    aligned: MergedCheckpoint
    unaligned: MergedCheckpoint
    lowest: Collection[str] | None = None
    Config = SafeLoraOptions
    name = "safe_lora"
    inputs = ("aligned", "unaligned")

    def edit(self, layer: Layer, w_prev: Tensor, w_new: Tensor) -> DenseEdit:
        """The change, projected where it strays. w_prev, w_new: (r, c).

        Raises: ConfigError: there is no threshold, and nobody has looked which layers stray most.
        """
        threshold = self.config.threshold
        if threshold is None:
            if self.lowest is None:
                raise ConfigError(
                    f"safe_lora projects the {self.config.lowest} layers with the lowest cosines, and a layer alone "
                    "does not know whether it is one. Use the method of a stream, which looks at all of them, or set "
                    "a threshold."
                )
            threshold = math.inf if layer.name in self.lowest else -math.inf
        alignment = alignment_of(layer.name, self.aligned, self.unaligned)
        delta = w_new.float() - w_prev.float()
        if not alignment.any():  # the alignment left this layer alone: it has no directions to project on
            row = {"alignment_cosine": None, "projected": False, **norms(delta, delta)}
            return DenseEdit(weight=w_prev.float() + delta, row=row)
        done = safelora(None, delta, alignment, threshold=threshold)  # what was merged has no factors any more
        row = {"alignment_cosine": done.cosine, "projected": done.projected, **norms(delta, done.lora_b)}
        return DenseEdit(weight=w_prev.float() + done.lora_b, row=row)


def alignment_of(name: str, aligned: MergedCheckpoint, unaligned: MergedCheckpoint) -> Tensor:
    """What alignment changed in the weight of the layer `name`, (r, c) in fp32."""
    return aligned.read_float(f"{name}.weight") - unaligned.read_float(f"{name}.weight")


def lowest_of(cosines: Mapping[str, float], count: int) -> frozenset[str]:
    """The `count` layers with the lowest cosines, and those that equal the last of them to five places.

    So the released code compares them.
    """
    cut = sorted(round(cosine, 5) for cosine in cosines.values())[:count][-1]
    return frozenset(name for name, cosine in cosines.items() if round(cosine, 5) <= cut)
