"""GuardSpace (Zhang et al., ICLR 2026, arXiv 2510.14301): a LoRA that begins where safety is not, and cannot reach it.

OUR READING, of the abstract and of summaries: the adapter starts as the part of each weight that the inputs of
forbidden requests use least (a singular value decomposition of W C, C their Gram matrix), and its update is projected,
in every forward pass, on input directions that they do not have. So W + s (B A - B_0 A_0) P equals W at first, and
always does what W did on those requests, up to the energy that the projector leaves. The Gram matrices are taken anew
from the model that each task starts from, on theta_0's safe answers. The mathematics: `holdfast.functional.guardspace`.

A released program has the same start and the same update; it takes the projector from a second set of (toxic) prompts
and lets an update read what is numerically nothing of them (`null_below: 1.0e-6`), has rank 128 without alpha / r, and
finds both once, on theta_0, for it tunes once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from holdfast.calibration.walk import LayerGram, walk_grams
from holdfast.checkpoints.merged import MergedCheckpoint, open_checkpoint
from holdfast.errors import ConfigError
from holdfast.files import atomic_path
from holdfast.functional.guardspace import guarded_start, unseen
from holdfast.methods.seqft import EditingConfig, SeqFT
from holdfast.models.families import editable_linears
from holdfast.models.held import load
from holdfast.models.loaded import LoadedModel
from holdfast.models.trained_state import TrainedState
from holdfast.stream.protocol import Checkpoint, TaskContext
from holdfast.training.training_config import TrainingConfig
from holdfast.tuners.folders import base_of
from holdfast.tuners.lora_folder import save_lora


@dataclass(frozen=True, kw_only=True)
class GuardSpaceConfig(EditingConfig):
    """energy: share of what the inputs of forbidden requests hold that no update may read, 0 up to 1.

    null_below: instead: directions of which they hold at most this share of what the strongest has may be read, no
        others (1e-6 in the released code); null: `energy` decides.

    Of the options of a calibration this rival has a use for `safety_samples`, and for tokens, normalization and
    batch_size of `calibration`.
    """

    energy: float = 0.99
    null_below: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.energy < 1:
            raise ConfigError(f"energy is {self.energy}; expected a share in [0, 1).")
        if self.null_below is not None and not 0 < self.null_below < 1:
            raise ConfigError(f"null_below is {self.null_below}; expected more than 0 and less than 1, or null.")


class GuardSpace(SeqFT):
    """GuardSpace (arXiv 2510.14301, our reading): a LoRA that begins where safety is not, and cannot reach it."""

    Config = GuardSpaceConfig
    config: GuardSpaceConfig

    needs_safety_answers = True

    def train_task(self, ctx: TaskContext) -> Checkpoint:
        """Find where each layer's adapter starts and what it must not read, then tune."""
        folder = ctx.scratch_dir / "guarded"
        folder.mkdir(parents=True, exist_ok=True)
        with open_checkpoint(ctx.previous) as weights:
            walk_grams(
                load(ctx.previous, dtype=self.config.calibration_dtype),
                self.safety_samples(ctx),
                lambda gram: self._start(gram, weights, folder),
                tokens=self.config.calibration.tokens,
                normalization=self.config.calibration.normalization,
                batch_size=self.config.calibration.batch_size,
                progress=lambda event, done, total, **rest: ctx.progress("calibrate", done=done, total=total),
            )
        return super().train_task(ctx)

    def training_options(self, ctx: TaskContext) -> dict[str, Any]:
        """The guarded adapter."""
        folder = ctx.scratch_dir / "guarded"
        return {"adapter": lambda loaded, config: GuardedLora(loaded, folder, config)}

    def _start(self, gram: LayerGram, weights: MergedCheckpoint, folder: Path) -> None:
        for module in gram.modules:
            path = folder / f"{module}.safetensors"
            if path.is_file():
                continue
            weight = weights.read_float(f"{module}.weight")
            start = guarded_start(
                weight,
                gram.gram.hessian().cpu(),
                rank=min(self.config.training.rank, *weight.shape),
                energy=self.config.energy,
                null_below=self.config.null_below,
            )
            with atomic_path(path) as temporary:
                save_file({"a": start.lora_a, "b": start.lora_b, "seen": start.seen}, temporary)


class GuardedLora(TrainedState):
    """The model with a guarded adapter in it; what the training loop needs of PEFT's interface.

    folder: `<linear>.safetensors` with "a" (k, in), "b" (out, k) and "seen" (in, m), of every linear that is tuned.
    """

    def __init__(self, loaded: LoadedModel, folder: Path, config: TrainingConfig) -> None:
        super().__init__()
        self.model = loaded.model
        self.config = loaded.model.config
        self.model.requires_grad_(False)
        self.scaling, self._base = float(config.alpha) / config.rank, base_of(loaded)["base"]
        linears = editable_linears(loaded.model)
        made = {}
        for name, linear in linears.items():
            start = {k: v.to(linear.weight.device) for k, v in load_file(folder / f"{name}.safetensors").items()}
            made[name] = _Guarded(start, self.scaling, config.dropout)
        self._hooks = [linears[name].register_forward_hook(layer.extend) for name, layer in made.items()]
        self.layers, self._by_name = nn.ModuleList(made.values()), made

    def forward(self, **inputs: Any) -> Any:
        """The model's forward pass; the adapter is in its linears."""
        return self.model(**inputs)

    def save_pretrained(self, folder: str) -> None:
        """What the adapter changes, as an ordinary LoRA of twice its rank."""
        factors = {name: layer.factors() for name, layer in self._by_name.items()}
        save_lora(Path(folder), factors, base=self._base)

    def unload(self) -> nn.Module:
        """Take the adapter off the model."""
        for hook in self._hooks:
            hook.remove()
        return self.model

    def trained(self) -> dict[str, nn.Parameter]:
        """A (k, in) and B (out, k) of every layer."""
        return {n: p for n, p in self.named_parameters() if n.startswith("layers.")}


class _Guarded(nn.Module):
    """One linear's adapter: x -> s (B A - B_0 A_0) (I - Q Q^T) x."""

    a0: Tensor
    b0: Tensor
    seen: Tensor

    def __init__(self, start: Mapping[str, Tensor], scaling: float, dropout: float) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(start["a"].clone()), nn.Parameter(start["b"].clone())
        self.register_buffer("a0", unseen(start["a"], start["seen"]), persistent=False)
        self.register_buffer("b0", start["b"], persistent=False)
        self.register_buffer("seen", start["seen"], persistent=False)
        self.scaling, self.dropout = scaling, dropout

    def extend(self, linear: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook. args[0]: (..., in). output: (..., out)."""
        del linear
        x = nn.functional.dropout(args[0], self.dropout, self.training)
        a = torch.cat([unseen(self.a, self.seen), self.a0]).to(x.dtype)
        b = torch.cat([self.b, -self.b0], dim=1).to(x.dtype)
        return output + self.scaling * nn.functional.linear(nn.functional.linear(x, a), b).to(output.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (2 k, in) and B (out, 2 k) of the change, with the scaling in B; fp32 on the CPU."""
        a = torch.cat([unseen(self.a.detach(), self.seen), self.a0])
        b = torch.cat([self.b.detach(), -self.b0], dim=1) * self.scaling
        return a.float().cpu(), b.float().cpu()


__all__ = ["GuardSpace", "GuardSpaceConfig", "GuardedLora"]
