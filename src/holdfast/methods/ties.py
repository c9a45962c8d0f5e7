"""TIES (Yadav et al., NeurIPS 2023) over a stream: trim each change, elect a sign per entry, average what agrees.

Tasks are learned one after another, as by SeqFT; the released model is theta_0 plus the merge of all changes so far,
and the next task starts from it. The changes are kept as adapters, so the merge always sees every task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdfast.checkpoints.merged import MergedCheckpoint, open_checkpoint
from holdfast.errors import ConfigError
from holdfast.functional.rivals import ties
from holdfast.methods._glue.lora_layers import carried, carry, read_adapter
from holdfast.methods.seqft import SeqFT, SeqFTConfig
from holdfast.rules.base import DenseEdit, EditRule, Layer
from holdfast.stream.protocol import Checkpoint, TaskContext

_FILE = "updates.safetensors"


@dataclass(frozen=True, kw_only=True)
class TiesConfig(SeqFTConfig):
    """density: share of each change that survives the trimming. weight: of the merged change (lambda)."""

    density: float = 0.2
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ConfigError(f"density is {self.density}; expected a share in (0, 1].")


@dataclass
class TiesRule:
    """W_hat = W_0 + weight * ties(changes of all tasks). updates: `<layer>.<task>.{a,b}` with the scaling in b."""

    config: TiesConfig
    theta_0: MergedCheckpoint
    updates: Mapping[str, Tensor]
    name = "ties"
    needs_curvature = False

    def settings(self) -> Mapping[str, Any]:
        return {"density": self.config.density, "weight": self.config.weight}

    def edit(self, layer: Layer, w_prev: Tensor, w_new: Tensor) -> DenseEdit:
        tasks = sorted(
            int(k.split("/")[1]) for k in self.updates if k.startswith(f"{layer.name}/") and k.endswith("/a")
        )
        deltas = [self.updates[f"{layer.name}/{t}/b"] @ self.updates[f"{layer.name}/{t}/a"] for t in tasks]
        merged = self.config.weight * ties(deltas, density=self.config.density)
        weight = self.theta_0.read_float(f"{layer.name}.weight") + merged
        row = {
            "change": float(torch.linalg.vector_norm(w_new - w_prev, dtype=torch.float64)),
            "distance": float(torch.linalg.vector_norm(weight - w_prev, dtype=torch.float64)),
        }
        return DenseEdit(weight=weight, row=row)


class Ties(SeqFT):
    """TIES: theta_0 plus the merge of all changes so far, each trimmed, signs elected entry by entry."""

    Config = TiesConfig
    config: TiesConfig

    def end_task(self, ctx: TaskContext, trained: Checkpoint) -> Checkpoint:
        """Carry this task's update on beside the earlier ones, then merge them all into theta_0."""

        def updates() -> dict[str, Tensor]:
            found = dict(carried(ctx, _FILE))
            for factors in read_adapter(trained.adapters[-1]):
                found[f"{factors.name}/{ctx.step}/a"] = factors.a
                found[f"{factors.name}/{ctx.step}/b"] = factors.b * factors.scaling
            return found

        carry(ctx, _FILE, updates)
        with open_checkpoint(ctx.theta_0) as theta_0:
            self._theta_0 = theta_0
            return super().end_task(ctx, trained)

    def step_rule(self, ctx: TaskContext) -> EditRule:
        """TIES over every update so far."""
        from safetensors.torch import load_file

        return TiesRule(self.config, self._theta_0, load_file(ctx.carry_dir / _FILE))
