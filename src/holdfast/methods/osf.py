"""OSF, orthogonal subspace fine-tuning (Nayak et al., arXiv 2504.07097), by PEFT: only weak directions are tuned.

Every weight is split by its singular values. The strong directions, where earlier knowledge is taken to sit, are
frozen, and PEFT keeps the gradient of the others orthogonal to them (the gradient, not the step: AdamW scales it entry
by entry). The update has twice the tuned rank and is written as an ordinary LoRA of that rank, exact; it is then merged
as any other, and the next task splits what came out. The paper keeps more directions from task to task; PEFT's default,
half of them, stays the same here. `training.rank` and alpha are not used: every weight's weak half is tuned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import OSFConfig as PeftConfig
from peft import PeftModel, get_peft_model
from peft.tuners.osf.layer import OSFLayer
from torch import Tensor

from holdfast.errors import ConfigError
from holdfast.methods.seqft import SeqFT, SeqFTConfig
from holdfast.models.families import editable_linears
from holdfast.models.load import load
from holdfast.models.loaded import LoadedModel
from holdfast.stream.protocol import Checkpoint, TaskContext
from holdfast.training.supervised import quiet_peft
from holdfast.training.training_config import TrainingConfig
from holdfast.tuners.folders import base_of
from holdfast.tuners.lora_folder import save_lora

_PREFIX, _ADAPTER = "base_model.model.", "default"


@dataclass(frozen=True, kw_only=True)
class OsfConfig(SeqFTConfig):
    """kept: share of a weight's singular directions, the strongest, that are frozen; between 0 and 1."""

    kept: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.kept < 1:
            raise ConfigError(f"kept is {self.kept}; expected a share between 0 and 1.")


class Osf(SeqFT):
    """OSF (arXiv 2504.07097), by PEFT: the strong singular directions of every weight are frozen."""

    Config = OsfConfig
    config: OsfConfig

    def training_options(self, ctx: TaskContext) -> dict[str, Any]:
        """OSF's adapter."""
        return {"adapter": self._adapter}

    def train_task(self, ctx: TaskContext) -> Checkpoint:
        """The previous checkpoint under what OSF changed, as an ordinary LoRA."""
        trained = super().train_task(ctx)
        out = ctx.scratch_dir / "lora"
        if not out.exists():
            # In the dtype it was trained in: the split is made anew, and must be the one that the training saw.
            loaded = load(ctx.previous, dtype=self.config.train_dtype)
            base = base_of(loaded)["base"]
            model = self._adapter(loaded, self.config.training)
            first = split_of(model)
            with quiet_peft():
                model.load_adapter(trained.adapters[-1], _ADAPTER)
            save_lora(out, {name: (a, b) for name, a, b in lora_factors(first, split_of(model))}, base=base)
        return Checkpoint(base=trained.base, adapters=(*trained.adapters[:-1], str(out)))

    def _adapter(self, loaded: LoadedModel, config: TrainingConfig) -> PeftModel:
        linears = editable_linears(loaded.model)
        for name, linear in linears.items():
            directions = min(linear.in_features, linear.out_features)
            if not 1 <= int(self.config.kept * directions) < directions:
                raise ConfigError(
                    f"kept is {self.config.kept}, and {name} has {directions} singular directions: expected at least "
                    "one that is kept and one that is tuned."
                )
        osf = PeftConfig(effective_rank=self.config.kept, target_modules=list(linears))
        with quiet_peft():
            return get_peft_model(loaded.model, osf)  # type: ignore[return-value]


def split_of(model: PeftModel) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Linear name -> what is tuned of it: U (out, r), S (r,), V (r, in), copied to the CPU in fp32."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, OSFLayer):
            parts: Any = layer.osf_svd_params[_ADAPTER]
            u, s, v = (parts[key].detach().to("cpu", torch.float32, copy=True) for key in ("U_low", "S_low", "V_low"))
            found[name.removeprefix(_PREFIX)] = (u, s, v)
    return found


def lora_factors(
    first: Mapping[str, tuple[Tensor, Tensor, Tensor]], now: Mapping[str, tuple[Tensor, Tensor, Tensor]]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(linear name, A (2 r, in), B (out, 2 r)) of every layer's change: B A is U S V now minus what it was at first.

    r: the tuned rank of a layer.
    """
    for name, (u, s, v) in now.items():
        u0, s0, v0 = first[name]
        yield name, torch.cat([v, v0]), torch.cat([u * s, -u0 * s0], dim=1)
