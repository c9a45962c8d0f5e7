"""A mixture of LoRA experts on a frozen base: its folder, the model that carries it, and what a training loop sees.

holdfast_tuner.json        which tuner reads this folder
moelora.json               number and rank of the experts, scaling, base
moelora.safetensors        per linear: router (experts, in), lora_A (experts * rank, in), lora_B (out, experts * rank);
                           a few values of every weight of the base

Every token weighs the experts anew, so no weight of the base, nor an ordinary LoRA, can say the same: the folder is
neither merged nor edited, and loads with holdfast alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from holdfast.data.types import Sample
from holdfast.errors import AdapterError
from holdfast.files import read_json, write_json
from holdfast.functional.mixture import mixture_update, start_of_mixture, token_gates
from holdfast.models.encode import encode_request
from holdfast.models.families import editable_linears
from holdfast.models.loaded import LoadedModel
from holdfast.models.trained_state import TrainedState
from holdfast.models.tuner import MARKER
from holdfast.tuners.folders import base_of, new_folder
from holdfast.tuners.same_weights import block_weights, compare_probe, probe

NAME, FORMAT = "moelora", 1
RECORD, TENSORS = "moelora.json", "moelora.safetensors"
_PARTS = ("router", "lora_A", "lora_B")
_PROBE = "base.probe."


@dataclass(frozen=True, kw_only=True)
class Mixtures:
    """What a folder holds: per linear (router, A, B), see the module; experts in each; scaling of what they add."""

    layers: Mapping[str, tuple[Tensor, Tensor, Tensor]]
    experts: int
    scaling: float


def fresh(loaded: LoadedModel, *, experts: int, rank: int, scaling: float, seed: int) -> Mixtures:
    """Mixtures on every linear of the language model's blocks that add nothing yet. rank: of each expert."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: start_of_mixture(
            int(linear.in_features), int(linear.out_features), experts=experts, rank=rank, generator=generator
        )
        for name, linear in editable_linears(loaded.model).items()
    }
    return Mixtures(layers=layers, experts=experts, scaling=scaling)


def save_mixtures(folder: Path, mixtures: Mixtures, loaded: LoadedModel) -> None:
    """Publish a folder, in one rename. Raises: StorageError: it exists, or the disk is full."""
    tensors = {
        f"{name}.{part}": value.detach().float().cpu().contiguous()
        for name, values in mixtures.layers.items()
        for part, value in zip(_PARTS, values, strict=True)
    }
    tensors |= {_PROBE + name: values for name, values in probe(block_weights(loaded)).items()}
    record = {"format": FORMAT, "base": base_of(loaded), "experts": mixtures.experts, "scaling": mixtures.scaling}
    with new_folder(folder) as temporary:
        save_file(tensors, temporary / TENSORS)
        write_json(temporary / RECORD, record)
        write_json(temporary / MARKER, {"tuner": NAME, "format": FORMAT})


def load_mixtures(folder: Path, loaded: LoadedModel) -> Mixtures:
    """The mixtures of a folder, fp32 on the CPU.

    Raises: AdapterError: no such folder, damaged, or trained on another base than `loaded`.
    """
    try:
        record = read_json(folder / RECORD, "the record of a mixture of experts", error=AdapterError)
        if record["format"] != FORMAT:
            raise AdapterError(
                f"{folder} has format {record['format']!r}; this version of holdfast reads format {FORMAT}."
            )
        tensors = load_file(folder / TENSORS)
        experts, scaling, base = int(record["experts"]), float(record["scaling"]), str(record["base"]["base"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise AdapterError(
            f"{folder} is no whole folder of a mixture of experts ({error!r}); expected {RECORD} and {TENSORS}. Copy "
            "it again from where it is intact, or learn the tasks again."
        ) from error
    stored = {k.removeprefix(_PROBE): v for k, v in tensors.items() if k.startswith(_PROBE)}
    compare_probe(
        stored,
        block_weights(loaded),
        f"{folder} was trained on another base ({base}) than {loaded.name}",
        "Its experts are corrections to those weights; load the base they were trained on.",
        places={name for name, _ in loaded.model.named_modules()},
    )
    names = [key.removesuffix(".router") for key in tensors if key.endswith(".router") and not key.startswith(_PROBE)]
    linears = editable_linears(loaded.model)
    layers = {}
    for name in names:
        parts = [tensors.get(f"{name}.{part}") for part in _PARTS]
        linear = linears.get(name)
        if linear is None or not _fits(parts, linear, experts):
            raise AdapterError(
                f"{folder}: the mixture of {name} is incomplete, of other shapes than {experts} experts on this base "
                "have, or of a linear that the base does not have."
            )
        layers[name] = (parts[0], parts[1], parts[2])
    if not layers:
        raise AdapterError(f"{folder}: {TENSORS} holds no mixture.")
    return Mixtures(layers=layers, experts=experts, scaling=scaling)  # type: ignore[arg-type]


def _fits(parts: Sequence[Tensor | None], linear: nn.Module, experts: int) -> bool:
    router, a, b = parts
    if router is None or a is None or b is None or not all(part.ndim == 2 for part in (router, a, b)):
        return False
    width, out = linear.in_features, linear.out_features
    return (
        tuple(router.shape) == (experts, width)
        and a.shape[1] == width
        and b.shape[0] == out
        and a.shape[0] == b.shape[1]
        and a.shape[0] % experts == 0
    )


class MixtureLayer(nn.Module):
    """One linear's router (experts, in) and experts A (experts * rank, in), B (out, experts * rank)."""

    def __init__(self, values: tuple[Tensor, Tensor, Tensor], scaling: float, dropout: float) -> None:
        super().__init__()
        self.router, self.lora_a, self.lora_b = (nn.Parameter(value.clone()) for value in values)
        self.scaling, self.dropout = scaling, dropout
        self.seen: list[Tensor] | None = None  # gates of the passes at hand, where somebody asks for them

    def extend(self, linear: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook: `output` (B, T, out) and what the experts add to it. args[0]: (B, T, in)."""
        del linear
        gates = token_gates(args[0], self.router)
        if self.seen is not None:
            self.seen.append(gates.detach())
        x = nn.functional.dropout(args[0], self.dropout, self.training)
        return output + mixture_update(x, gates, self.lora_a, self.lora_b, self.scaling).to(output.dtype)


def _hook(loaded: LoadedModel, mixtures: Mixtures, dropout: float) -> tuple[dict[str, MixtureLayer], list[Any]]:
    linears = editable_linears(loaded.model)
    layers = {
        name: MixtureLayer(values, mixtures.scaling, dropout).to(linears[name].weight.device)
        for name, values in mixtures.layers.items()
    }
    return layers, [linears[name].register_forward_hook(layer.extend) for name, layer in layers.items()]


class Mixture:
    """The mixtures of a folder on their base (`holdfast.models.loaded.Tuner`)."""

    def __init__(self, loaded: LoadedModel, mixtures: Mixtures) -> None:
        self._loaded, self.experts = loaded, mixtures.experts
        self._layers, self._hooks = _hook(loaded, mixtures, 0.0)
        for layer in self._layers.values():
            layer.eval().requires_grad_(False)

    def serving(self, samples: Sequence[Sample]) -> AbstractContextManager[None]:
        """Nothing is decided per request."""
        del samples
        return nullcontext()

    def explain(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """How much of each expert the tokens of each request get, on average over tokens and layers."""
        names = [f"expert {number + 1}" for number in range(self.experts)]
        rows = []
        for sample in samples:
            inputs = {k: v.to(self._loaded.device) for k, v in encode_request(self._loaded, [sample]).items()}
            with torch.inference_mode(), self._watched() as layers:
                self._loaded.model(**inputs)
                shares = [torch.cat([g.flatten(0, -2) for g in layer.seen or ()]).mean(0).cpu() for layer in layers]
            mean = torch.stack(shares).mean(0).tolist()
            rows.append({"id": sample.id, "weights": dict(zip(names, mean, strict=True)), "abstained": False})
        return rows

    @contextmanager
    def _watched(self) -> Iterator[list[MixtureLayer]]:
        layers = list(self._layers.values())
        for layer in layers:
            layer.seen = []
        try:
            yield layers
        finally:
            for layer in layers:
                layer.seen = None

    def detach(self) -> None:
        """Take the experts off; the model is the base again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def attach(loaded: LoadedModel, folder: Path) -> Mixture:
    """The experts of a folder on their loaded base. Raises: AdapterError: as `load_mixtures`."""
    return Mixture(loaded, load_mixtures(folder, loaded))


class MixtureTraining(TrainedState):
    """The base with mixtures in training; what the training loop needs of PEFT's interface."""

    def __init__(self, loaded: LoadedModel, mixtures: Mixtures, dropout: float) -> None:
        super().__init__()
        self.model, self.config = loaded.model, loaded.model.config
        self.model.requires_grad_(False)
        self._loaded, self._mixtures = [loaded], mixtures
        self._by_name, self._hooks = _hook(loaded, mixtures, dropout)
        self.layers = nn.ModuleList(self._by_name.values())

    def forward(self, **inputs: Any) -> Any:
        """The model's forward pass; the experts are in its linears."""
        return self.model(**inputs)

    def trained(self) -> dict[str, nn.Parameter]:
        """Router (experts, in), A (experts * rank, in) and B (out, experts * rank) of every linear."""
        return {n: p for n, p in self.named_parameters() if n.startswith("layers.")}

    def save_pretrained(self, folder: str) -> None:
        """The folder of these mixtures."""
        layers = {n: (m.router.detach(), m.lora_a.detach(), m.lora_b.detach()) for n, m in self._by_name.items()}
        mixtures = Mixtures(layers=layers, experts=self._mixtures.experts, scaling=self._mixtures.scaling)
        save_mixtures(Path(folder), mixtures, self._loaded[0])

    def unload(self) -> nn.Module:
        """Take the experts off the model."""
        for hook in self._hooks:
            hook.remove()
        return self.model


__all__ = ["Mixture", "MixtureTraining", "Mixtures", "attach", "fresh", "load_mixtures", "save_mixtures"]
