"""Glue of penalties on a LoRA: its factors while it is being trained, and those of earlier tasks from their files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from holdfast.checkpoints.adapter import LoraAdapter
from holdfast.errors import AdapterError
from holdfast.files import atomic_path
from holdfast.stream.protocol import TaskContext

_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Factors:
    """One layer's update: scaling * b @ a, with a (rank, c) and b (r, rank). name: as in the model without PEFT."""

    name: str
    a: Tensor
    b: Tensor
    scaling: float

    def update(self) -> Tensor:
        """The change of the weight (r, c)."""
        return self.scaling * (self.b @ self.a)


def live_factors(model: nn.Module) -> Iterator[Factors]:
    """Factors of every LoRA layer of a PEFT model, with their gradients."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and module.lora_A:
            (adapter,) = module.active_adapters
            a, b = module.lora_A[adapter], module.lora_B[adapter]
            assert isinstance(a, nn.Linear) and isinstance(b, nn.Linear)  # what `training` puts there
            yield Factors(name.removeprefix(_PEFT_PREFIX), a.weight, b.weight, float(module.scaling[adapter]))


class Remembered:
    """Per-layer tensors that a penalty needs, moved once to where the model is; `live` walks the layers once."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self._layers: list[Factors] | None = None

    def layers(self, model: nn.Module) -> Iterator[tuple[Factors, Tensor]]:
        """(live factors, remembered tensor) of every layer that has both."""
        if self._layers is None:
            self._layers = [f for f in live_factors(model) if f.name in self._tensors]
            self._tensors = {f.name: self._tensors[f.name].to(f.a.device) for f in self._layers}
        return ((f, self._tensors[f.name]) for f in self._layers)


def read_adapter(folder: str | Path) -> Iterator[Factors]:
    """Factors of every layer of an adapter on disk, fp32. Raises AdapterError: it holds more than those."""
    adapter = LoraAdapter(Path(folder))
    try:
        if adapter.dense:
            raise AdapterError(f"{folder} holds more than LoRA factors of linear layers: {next(iter(adapter.dense))}.")
        for name, entry in adapter.modules.items():
            a, b = adapter.read_factors(name)
            yield Factors(name, a, b, entry.scaling)
    finally:
        adapter.close()


def carried(ctx: TaskContext, file: str) -> dict[str, Tensor]:
    """What the step before left in its carry folder under `file`; {} at the first task.

    Tensors of any shape, by name, such as one layer's A (rank, in).
    """
    path = ctx.previous_carry_dir / file if ctx.previous_carry_dir is not None else None
    return load_file(path) if path is not None and path.is_file() else {}


def carry(ctx: TaskContext, file: str, make: Callable[[], Mapping[str, Tensor]]) -> None:
    """Leave tensors for the next step, once: a phase that is called again finds them made.

    make: tensors of any shape, by name, such as one layer's A (rank, in).
    """
    keep(ctx.carry_dir / file, make)


def keep(path: Path, make: Callable[[], Mapping[str, Tensor]]) -> None:
    """Write tensors of any shape, by name, to `path`, where they are not there already."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in make().items()}, temporary)
