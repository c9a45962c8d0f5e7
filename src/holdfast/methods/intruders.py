"""Intruder dimensions reduced (Shuttleworth et al., arXiv 2410.21228), by PEFT: an edit of the task's adapter.

A LoRA brings singular directions that the old weight has nothing like; they cost what was known. PEFT's own
`reduce_intruder_dimension` takes a part of them out of the adapter. Nothing but the adapter and the weights is needed.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from peft.tuners.lora.intruders import reduce_intruder_dimension
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

from holdfast.checkpoints.adapter import WEIGHTS_FILE
from holdfast.errors import ConfigError
from holdfast.methods.seqft import SeqFT, SeqFTConfig
from holdfast.models.load import load
from holdfast.stream.protocol import Checkpoint, TaskContext
from holdfast.training.supervised import quiet_peft

_REDUCED = "reduced"


@dataclass(frozen=True, kw_only=True)
class IntrudersConfig(SeqFTConfig):
    """top: how many of a tuned weight's strongest directions are looked at. threshold: below this largest cosine with
    an old direction, 0..1, one is an intruder. keep: what is left of an intruder, 0..1; PEFT's `mitigation_lambda`, of
    which its text says that it is taken out and its code that it stays. Defaults are PEFT's.
    """

    top: int = 10
    threshold: float = 0.5
    keep: float = 0.75

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ConfigError(f"top is {self.top}; expected 1 or more directions.")
        for name in ("threshold", "keep"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a share in 0..1.")


def pad_rank(file: Path, rank: int) -> None:
    """Give every A and B of a PEFT file `rank` rows and columns, zeros where there are fewer: their product stays.

    PEFT writes a reduced layer with no more of them than the layer's smaller side has, and the configuration with r.
    """
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if ".lora_A." in name:
            tensors[name] = pad(tensor, (0, 0, 0, rank - tensor.shape[0]))
        elif ".lora_B." in name:
            tensors[name] = pad(tensor, (0, rank - tensor.shape[1]))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


class Intruders(SeqFT):
    """Intruder dimensions of the adapter reduced after each task (arXiv 2410.21228), by PEFT."""

    Config = IntrudersConfig
    config: IntrudersConfig

    def end_task(self, ctx: TaskContext, trained: Checkpoint) -> Checkpoint:
        """Reduce, then write the tuned weights."""
        folder = ctx.scratch_dir / _REDUCED
        if not folder.exists():
            self._reduce(ctx, Path(trained.adapters[-1]), folder)
        return super().end_task(ctx, Checkpoint(base=trained.base, adapters=(*trained.adapters[:-1], str(folder))))

    def _reduce(self, ctx: TaskContext, adapter: Path, folder: Path) -> None:
        model = load(ctx.previous, dtype="float32").model
        with quiet_peft():
            tuned = PeftModel.from_pretrained(model, str(adapter))
            reduce_intruder_dimension(
                tuned,
                new_adapter_name=_REDUCED,
                top_k=self.config.top,
                threshold_epsilon=self.config.threshold,
                mitigation_lambda=self.config.keep,
                logging_sink=None,
            )
            temporary = folder.with_name(f".{_REDUCED}.part")
            shutil.rmtree(temporary, ignore_errors=True)
            # PEFT puts an adapter that is not called "default" into a folder of its name.
            tuned.save_pretrained(str(temporary), selected_adapters=[_REDUCED])
        pad_rank(temporary / _REDUCED / WEIGHTS_FILE, tuned.peft_config[_REDUCED].r)  # type: ignore[attr-defined]
        (temporary / _REDUCED).replace(folder)
        shutil.rmtree(temporary)
