"""TIES (Yadav et al., NeurIPS 2023): trim each change, elect a sign per entry, average what agrees with it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from holdfast.checkpoints.merged import MergedCheckpoint
from holdfast.errors import ConfigError
from holdfast.functional.rivals import shared_threshold, ties
from holdfast.rules.base import DenseEdit, Layer, Rule, norms


@dataclass(frozen=True, kw_only=True)
class TiesOptions:
    """density: share of each change that survives the trimming, 0..1. weight: of the merged change (lambda).

    trim: the density is that of a change over all its layers together ("all", the original), or of each layer.

    Raises: ConfigError: a density outside (0, 1].
    """

    density: float = 0.2
    weight: float = 1.0
    trim: Literal["all", "layer"] = "all"

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ConfigError(f"density is {self.density}; expected a share in (0, 1].")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ConfigError(f"weight is {self.weight}; expected a finite number, 0 or more.")


@dataclass(frozen=True)
class TiesRule(Rule):
    """W_hat = W_0 + weight * ties(changes of all tasks); what a layer was before this task is not looked at.

    theta_0: W_0, open. updates: `<layer>/<task>` (r, c), what the model tuned on a task is away from W_0; or its
    factors `<layer>/<task>/a` (rank, c) and `/b` (r, rank), with the scaling in b. thresholds: task -> the magnitude
    that survives where layers are trimmed together; None: it is found from all of `updates`.
    """

    config: TiesOptions
    theta_0: MergedCheckpoint
    updates: Mapping[str, Tensor]
    thresholds: Mapping[int, float] | None = None
    Config = TiesOptions
    name = "ties"
    inputs = ("theta_0", "updates")

    def edit(self, layer: Layer, w_prev: Tensor, w_new: Tensor) -> DenseEdit:
        """theta_0 plus the merge of every task's update so far. w_prev, w_new: (r, c)."""
        tasks = self._tasks(layer.name)
        shared = None
        if self.config.trim == "all":
            shared = [self.threshold(task) if self.thresholds is None else self.thresholds[task] for task in tasks]
        deltas = [self._change(layer.name, task) for task in tasks]
        merged = self.config.weight * ties(deltas, density=self.config.density, thresholds=shared)
        weight = self.theta_0.read_float(f"{layer.name}.weight") + merged
        return DenseEdit(weight=weight, row=norms(w_new - w_prev, weight - w_prev))

    def threshold(self, task: int) -> float:
        """The magnitude that survives in the change of `task` where its layers are trimmed together."""

        def changes() -> Iterator[Tensor]:
            layers = dict.fromkeys(key.split("/")[0] for key in self.updates)
            return (self._change(layer, task) for layer in layers if task in self._tasks(layer))

        return shared_threshold(changes, self.config.density)

    def _tasks(self, layer: str) -> list[int]:
        return sorted({int(key.split("/")[1]) for key in self.updates if key.startswith(f"{layer}/")})

    def _change(self, layer: str, task: int) -> Tensor:
        whole = f"{layer}/{task}"
        return self.updates[whole] if whole in self.updates else self.updates[f"{whole}/b"] @ self.updates[f"{whole}/a"]
