"""MAny's low-rank parameter merging (arXiv 2604.14016, our reading): one update that answers as each task's own did."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.checkpoints.merged import MergedCheckpoint
from holdfast.errors import ConfigError
from holdfast.functional.rivals import least_squares_merge
from holdfast.rules.base import DenseEdit, Layer, Rule, norms


@dataclass(frozen=True, kw_only=True)
class ManyOptions:
    """ridge: keeps the merged update small where no task reads, relative to the mean square of the tasks' rows; > 0.

    Raises: ConfigError: a ridge that is not above 0.
    """

    ridge: float = 1e-2

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ridge) and self.ridge > 0):
            raise ConfigError(f"ridge is {self.ridge}; expected a finite number above 0.")


@dataclass(frozen=True)
class ManyRule(Rule):
    """W_hat = W_0 + the merge of all tasks' updates; what a layer was before this task is not looked at.

    theta_0: W_0, open. updates: `<layer>/<task>/a` (rank, c) and `/b` (r, rank), with the scaling in b.
    """

    config: ManyOptions
    theta_0: MergedCheckpoint
    updates: Mapping[str, Tensor]
    Config = ManyOptions
    name = "many"
    inputs = ("theta_0", "updates")

    def edit(self, layer: Layer, w_prev: Tensor, w_new: Tensor) -> DenseEdit:
        """theta_0 plus the merge of every task's update so far. w_prev, w_new: (r, c)."""
        steps = sorted(
            int(k.split("/")[1]) for k in self.updates if k.startswith(f"{layer.name}/") and k.endswith("/a")
        )
        rows = [self.updates[f"{layer.name}/{step}/a"] for step in steps]
        columns = [self.updates[f"{layer.name}/{step}/b"] for step in steps]
        merged = least_squares_merge(rows, columns, ridge=self.config.ridge)
        weight = self.theta_0.read_float(f"{layer.name}.weight") + merged.to(torch.float32)
        return DenseEdit(weight=weight, row=norms(w_new - w_prev, weight - w_prev))
