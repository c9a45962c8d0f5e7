"""Two sample sets and a model before and after a task -> one number per input column, layer and set."""

from __future__ import annotations

import gc
import hashlib
import platform
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from holdfast.calibration.walk import LayerGram, Progress, Tokens, WalkReport, has_answer, walk_grams
from holdfast.checkpoints.curvature_file import Curvature
from holdfast.checkpoints.fingerprint import fingerprint
from holdfast.checkpoints.merged import open_checkpoint
from holdfast.checkpoints.value import Checkpoint, as_checkpoint
from holdfast.config import encode
from holdfast.data.images import current_pictures
from holdfast.data.types import Sample
from holdfast.errors import CalibrationError, ConfigError, NumericalError
from holdfast.files import sha256
from holdfast.functional.hessian import Normalization
from holdfast.functional.inverse import OnFailure
from holdfast.models.families import decoder_blocks, editable_linears
from holdfast.models.held import held, let_go, load
from holdfast.models.loaded import LoadedModel
from holdfast.models.memory import find_device, usable_bytes
from holdfast.models.precision import default_device, parse_dtype, resolve_dtype, stays_narrow
from holdfast.models.settings import read_config
from holdfast.models.streaming import load_streamed

Activations = Literal["each", "old", "new"]
Source = str | Path | Checkpoint | LoadedModel

# Weights above this share of the budget stay on disk and come block by block.
_RESIDENT_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """What a calibration measures. The defaults are HPA's readings (arXiv 2511.20158).

    damping: lam as a share of the mean diagonal of H. shrinkage: weight of H's own diagonal, for few tokens.
    normalization: mean over sequences, over tokens, or a plain sum. tokens: which positions count.
    activations: "each" takes H_s from the model before the task, H_t from the one after; "old", "new": both from one
        ("old" is also what is recorded where no second model was given).
    on_failure: "retry" raises the damping of a Gram that cannot be factorised, and records it; "error" stops.
    batch_size: samples per forward pass.
    """

    damping: float = 0.01
    shrinkage: float = 0.0
    normalization: Normalization = "sequence"
    tokens: Tokens = "all"
    activations: Activations = "each"
    on_failure: OnFailure = "error"
    batch_size: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise ConfigError(f"damping is {self.damping}; expected a share in (0, 1], such as 0.01.")
        if not 0 <= self.shrinkage < 1:
            raise ConfigError(f"shrinkage is {self.shrinkage}; expected a weight in [0, 1).")
        for name, choices in (
            ("normalization", Normalization),
            ("tokens", Tokens),
            ("activations", Activations),
            ("on_failure", OnFailure),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(get_args(choices))}.")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}; expected at least 1.")


def collect_curvature(
    before: Source,
    after: Source,
    safety: Sequence[Sample],
    task: Sequence[Sample],
    *,
    config: CalibrationConfig | None = None,
    memory_bytes: int | None = None,
    blocks: Collection[int] | None = None,
    adapted_only: bool = False,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    cut_at: int | None = None,
    progress: Progress | None = None,
    seconds: dict[str, float] | None = None,
) -> Curvature:
    """Diagonals of the inverse damped Grams: of the safety set through `before`, of the task set through `after`.

    Models are loaded one after the other; one whose weights exceed half of `memory_bytes`, or what is free without it,
    is streamed block by block.

    Args:
        before, after: folder, hub id, checkpoint value, or a model that is loaded already.
        safety: requests with the aligned model's own safe answers. task: samples of the task just learned.
        memory_bytes: bound on what the process (or the GPU) holds; None takes most of what is free.
        blocks: decoder blocks to calibrate, 0-based; None: all.
        adapted_only: where `after` is `before` under adapters, only the layers that they change: all that an edit of
            that update needs. An adapter on attention alone saves the widest and slowest Gram of every block.
        cut_at: tokens at which answers of the task were cut when it was learned (`max_length`); None: none was.
        seconds: receives the time of each phase; kept out of the result, whose bytes depend on its inputs alone.

    Raises: CalibrationError: an empty set, a safety sample without an answer, NaN or inf, a Gram that cannot be
        factorised. ConfigError: a device that is not there. ModelError, DataError: as loading and encoding.
    """
    config = measured_config(before, after, config or CalibrationConfig())
    for name, samples in (("safety", safety), ("task", task)):
        if not samples:
            other = "task" if name == "safety" else "safety"
            raise CalibrationError(f"The {name} calibration set is empty; the edit weighs it against the {other} set.")
    mute = [sample.id for sample in safety if not has_answer(sample)]
    if mute:
        raise CalibrationError(
            f"{len(mute)} of {len(safety)} safety calibration samples have no answer ({mute[0]!r} is the first); "
            "expected requests with the aligned model's own safe answers, for those are what must be kept. Let the "
            "model answer them with `holdfast calibrate-data`."
        )
    if config.normalization == "sum" and not 0.5 <= len(safety) / len(task) <= 2:
        warnings.warn(
            f"normalization='sum' with {len(safety)} safety and {len(task)} task samples: the larger set drowns the "
            "other, and alpha sticks at its bound. Use 'sequence' or 'token', or sets of like size.",
            stacklevel=2,
        )
    if after is not before and not isinstance(before, LoadedModel) and not isinstance(after, LoadedModel):
        # A tuned model is often saved without its processor.
        after = as_checkpoint(after).lent(as_checkpoint(before).base)
    sources = {"each": (before, after), "old": (before, before), "new": (after, after)}[config.activations]
    sides: dict[str, _Side] = {}
    held: LoadedModel | None = None
    structure: dict[str, Any] = {}
    changed = adapted_layers(before, after) if adapted_only else None
    for (name, samples), source in zip((("safety", safety), ("task", task)), sources, strict=True):
        began = time.perf_counter()
        if held is None or source is not sources[0]:
            held = None
            gc.collect()
            held = open_model(source, dtype=dtype, device=device, memory_bytes=memory_bytes)
        loading = time.perf_counter() - began
        side = _Side(config)
        side.report = walk_grams(
            held,
            samples,
            side.consume,
            tokens=config.tokens,
            normalization=config.normalization,
            batch_size=config.batch_size,
            memory_bytes=memory_bytes,
            blocks=blocks,
            linears=None if changed is None else changed(editable_linears(held.model, blocks)),
            cut_at=cut_at if name == "task" else None,
            progress=progress,
        )
        side.samples = samples
        if seconds is not None:
            for phase, spent in {**side.report.seconds, "load": side.report.seconds["load"] + loading}.items():
                seconds[phase] = seconds.get(phase, 0.0) + spent
        sides[name] = side
        if not structure:
            structure = {
                "block_count": len(decoder_blocks(held.model)),
                "model_type": held.model.config.model_type,
                "dtype": str(held.dtype).removeprefix("torch."),
                "device": str(held.device),
            }
    one, two = sides["safety"], sides["task"]
    if set(one.diagonals) != set(two.diagonals):
        odd = sorted(set(one.diagonals) ^ set(two.diagonals))[0]
        raise CalibrationError(f"{odd} exists in one of the two models only; both must be checkpoints of one model.")
    meta = {
        **structure,
        "blocks": one.blocks,
        "inputs": one.inputs,
        "weight_keys": _weight_keys(before, list(one.diagonals)),
        "config": encode(config),
        "pictures": encode(current_pictures()),
        "sets": {name: side.describe() for name, side in sides.items()},
        "model": {"before": model_identity(before), "after": model_identity(after)},
        "versions": _versions(),
    }
    return Curvature(safety=one.diagonals, task=two.diagonals, meta=meta)


def adapted_layers(before: Source, after: Source) -> Callable[[Iterable[str]], list[str]] | None:
    """Which of some linear layers the adapters of `after` change, or None where it is not `before` under adapters."""
    old, new = (s.source if isinstance(s, LoadedModel) else s for s in (before, after))
    if old is None or new is None:
        return None
    below, above = as_checkpoint(old), as_checkpoint(new)
    if not above.own_adapters(below):
        return None
    with open_checkpoint(above) as checkpoint:
        names, own = checkpoint.names, checkpoint.adapters[len(below.adapters) :]
        keys = {key for adapter in own for key in checkpoint.keys_of(adapter).values()}
        # Whole tensors of an adapter; those of its own, which the base has not, are no linear's weight.
        keys |= {key for adapter in own for name in adapter.saved if (key := names.find(name)) is not None}

    def changed(linears: Iterable[str]) -> list[str]:
        found = [linear for linear in linears if names.find(f"{linear}.weight") in keys]
        if not found:
            raise CalibrationError(
                f"{above.adapters[-1]} changes no linear layer of the blocks to calibrate; there is nothing to measure."
            )
        return found

    return changed


def measured_config(before: Source, after: Source, config: CalibrationConfig) -> CalibrationConfig:
    """What is recorded: "each" of two models that are one is "old"."""
    named = isinstance(before, str | Path) and isinstance(after, str | Path)
    one = before is after or (named and str(before) == str(after))
    return replace(config, activations="old") if one and config.activations == "each" else config


def is_calibration_of(
    curvature: Curvature,
    before: Source,
    after: Source,
    safety: Sequence[Sample],
    task: Sequence[Sample],
    config: CalibrationConfig,
) -> bool:
    """Whether `collect_curvature` of the same arguments made it: by content of models and samples, and by options."""
    meta = curvature.meta
    if meta.get("config") != encode(measured_config(before, after, config)):
        return False
    for side, source in (("before", before), ("after", after)):
        found, wanted = meta.get("model", {}).get(side, {}), model_identity(source)
        if wanted["fingerprint"] is None or _hashes(found) != _hashes(wanted):
            return False
    return all(
        meta.get("sets", {}).get(name, {}).get("data_sha256") == samples_sha256(samples)
        for name, samples in (("safety", safety), ("task", task))
    )


def _hashes(identity: Mapping[str, Any]) -> list[Any]:
    return [identity.get("fingerprint"), *(adapter["fingerprint"] for adapter in identity.get("adapters", ()))]


def open_model(
    source: Source,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    memory_bytes: int | None = None,
) -> LoadedModel:
    """The model of `source`, whole, or streamed: when its weights take more than half of `memory_bytes`.

    memory_bytes: None streams what would not fit into the free memory.
    """
    if isinstance(source, LoadedModel):
        return source
    found = held(source, dtype=dtype, device=device)
    if found is not None:
        return found
    let_go()  # before the free memory is measured
    base = as_checkpoint(source).base
    target = find_device(device) if device is not None else default_device()
    config = read_config(base)
    itemsize = resolve_dtype(parse_dtype(dtype) if dtype is not None else None, config, target).itemsize
    if memory_bytes is None:
        # Blocks in 16 bits that are widened as they run are nearer than blocks on disk.
        narrow = stays_narrow(base, dtype, config, target)
        itemsize = itemsize if narrow is None else narrow.itemsize
    with open_checkpoint(base) as checkpoint:
        elements = sum(entry.numel for entry in checkpoint.entries.values())
    room = usable_bytes(target) if memory_bytes is None else _RESIDENT_SHARE * memory_bytes
    if elements * itemsize > room:
        return load_streamed(source, dtype=dtype, device=device)
    return load(source, dtype=dtype, device=device)


@dataclass(eq=False)
class _Side:
    """The diagonals of one set, filled by a walk."""

    config: CalibrationConfig
    diagonals: dict[str, Tensor] = field(default_factory=dict)
    blocks: dict[str, int] = field(default_factory=dict)
    inputs: list[list[str]] = field(default_factory=list)
    over_width: dict[str, float] = field(default_factory=dict)
    fallbacks: dict[str, list[str]] = field(default_factory=dict)
    dead: dict[str, int] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    report: WalkReport | None = None

    def consume(self, layer: LayerGram) -> None:
        try:
            result = layer.gram.reduce(
                self.config.damping, shrinkage=self.config.shrinkage, on_failure=self.config.on_failure
            )
        except NumericalError as error:
            raise CalibrationError(f"{layer.modules[0]} (block {layer.block}): {error}") from error
        values = result.values.cpu()
        for module in layer.modules:
            self.diagonals[module] = values
            self.blocks[module] = layer.block
        self.inputs.append(list(layer.modules))
        first = layer.modules[0]
        self.over_width[first] = round(layer.gram.tokens_over_width, 4)
        if result.fallbacks:
            self.fallbacks[first] = list(result.fallbacks)
        if result.dead_inputs:
            self.dead[first] = result.dead_inputs

    def describe(self) -> dict[str, Any]:
        assert self.report is not None
        return {
            "sequences": self.report.sequences,
            "tokens": self.report.tokens,
            "tokens_over_width": self.over_width,
            "fallbacks": self.fallbacks,
            "dead_inputs": self.dead,
            "data_sha256": samples_sha256(self.samples),
            "passes": [list(p) for p in self.report.passes],
            "batch_size": self.report.batch_size,
        }


def samples_sha256(samples: Sequence[Sample]) -> str:
    """Content hash of samples: ids, turns and image bytes, in order; paths do not count."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr((sample.id, [t.said for t in sample.turns], sample.references)).encode())
        for path in sample.images:
            digest.update(sha256(path).digest())
    return digest.hexdigest()


def _weight_keys(source: Source, modules: list[str]) -> dict[str, str | list[str]]:
    """On-disk key of each module's weight; an empty list where no tensor is that weight."""
    origin = source.source if isinstance(source, LoadedModel) else source
    if origin is None:
        return {module: f"{module}.weight" for module in modules}
    with open_checkpoint(origin) as checkpoint:
        found = {module: checkpoint.names.find(f"{module}.weight") for module in modules}
    # No key: the weight is regrouped when it is loaded. An edit on disk says so; live models can be edited.
    return {module: [] if key is None else key for module, key in found.items()}


def model_identity(source: Source) -> dict[str, Any]:
    """What a record says of a model: name and content fingerprint of its base and of its adapters."""
    origin = source.source if isinstance(source, LoadedModel) else source
    if origin is None:
        return {"name": source.name if isinstance(source, LoadedModel) else str(source), "fingerprint": None}
    with open_checkpoint(origin) as checkpoint:
        return {
            "name": as_checkpoint(origin).base,
            "fingerprint": fingerprint(checkpoint.base),
            "adapters": [{"name": str(a.folder), "fingerprint": fingerprint(a)} for a in checkpoint.adapters],
        }


def _versions() -> dict[str, str]:
    return {
        **{name: metadata.version(name) for name in ("holdfast", "torch", "transformers")},
        "python": platform.python_version(),
    }


__all__ = [
    "Activations",
    "CalibrationConfig",
    "LayerGram",
    "adapted_layers",
    "collect_curvature",
    "model_identity",
    "open_model",
    "samples_sha256",
    "walk_grams",
]
