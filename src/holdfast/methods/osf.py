"""OSF, orthogonal subspace fine-tuning (Nayak et al., arXiv 2504.07097), by PEFT: only weak directions are tuned.

Every weight is split by its singular values. The strong directions, where earlier knowledge is taken to sit, are
frozen, and PEFT keeps the gradient of the others orthogonal to them (the gradient, not the step: AdamW scales it entry
by entry). The update has twice the tuned rank and is written as an ordinary LoRA of that rank, exact; it is then merged
as any other, and the next task splits what came out. The paper keeps more directions from task to task; PEFT's default,
half of them, stays the same here. `training.rank` and alpha are not used: every weight's weak half is tuned.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
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
from holdfast.training.training_config import TrainingConfig
from holdfast.tuners.cram.folder import base_of, save_expert

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
            with _quiet():
                tuned = PeftModel.from_pretrained(loaded.model, trained.adapters[-1])
            save_expert(out, {name: (a, b) for name, a, b in lora_factors(tuned)}, base=base)
        return Checkpoint(base=trained.base, adapters=(*trained.adapters[:-1], str(out)))

    def _adapter(self, loaded: LoadedModel, config: TrainingConfig) -> PeftModel:
        osf = PeftConfig(effective_rank=self.config.kept, target_modules=list(editable_linears(loaded.model)))
        with _quiet():
            return get_peft_model(loaded.model, osf)  # type: ignore[return-value]


def lora_factors(model: PeftModel) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(linear name, A (2 r, in), B (out, 2 r)) of every layer's change: B A is U S V minus what it was at first.

    r: the tuned rank of a layer. In fp32 on the CPU.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, OSFLayer):
            continue
        now: Any = layer.osf_svd_params[_ADAPTER]
        u, s, v = (now[key].detach().float().cpu() for key in ("U_low", "S_low", "V_low"))
        first = (layer._osf_U_low_init, layer._osf_S_low_init, layer._osf_V_low_init)
        u0, s0, v0 = (kept[_ADAPTER].detach().float().cpu() for kept in first)
        yield name.removeprefix(_PREFIX), torch.cat([v, v0]), torch.cat([u * s, -u0 * s0], dim=1)


class _quiet(warnings.catch_warnings):  # noqa: N801 (a context manager, used as a function)
    """Without the warning of PEFT's that `training.supervised` silences too."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        return entered
