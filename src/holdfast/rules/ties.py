"""TIES (Yadav et al., NeurIPS 2023): trim each change, elect a sign per entry, average what agrees with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from holdfast.checkpoints.merged import MergedCheckpoint
from holdfast.errors import ConfigError
from holdfast.functional.rivals import ties
from holdfast.rules.base import DenseEdit, Layer, Rule, norms


@dataclass(frozen=True, kw_only=True)
class TiesOptions:
    """density: share of each change that survives the trimming. weight: of the merged change (lambda).

    Raises: ConfigError: a density outside (0, 1].
    """

    density: float = 0.2
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ConfigError(f"density is {self.density}; expected a share in (0, 1].")


@dataclass(frozen=True)
class TiesRule(Rule):
    """W_hat = W_0 + weight * ties(changes of all tasks); what a layer was before this task is not looked at.

    theta_0: W_0, open. updates: `<layer>/<task>/a` (rank, c) and `/b` (r, rank), with the scaling in b.
    """

    config: TiesOptions
    theta_0: MergedCheckpoint
    updates: Mapping[str, Tensor]
    Config = TiesOptions
    name = "ties"
    inputs = ("theta_0", "updates")

    def edit(self, layer: Layer, w_prev: Tensor, w_new: Tensor) -> DenseEdit:
        """theta_0 plus the merge of every task's update so far. w_prev, w_new: (r, c)."""
        tasks = sorted(
            int(k.split("/")[1]) for k in self.updates if k.startswith(f"{layer.name}/") and k.endswith("/a")
        )
        deltas = [self.updates[f"{layer.name}/{t}/b"] @ self.updates[f"{layer.name}/{t}/a"] for t in tasks]
        merged = self.config.weight * ties(deltas, density=self.config.density)
        weight = self.theta_0.read_float(f"{layer.name}.weight") + merged
        return DenseEdit(weight=weight, row=norms(w_new - w_prev, weight - w_prev))
