"""A base and the LoRA adapters on top of it, read as one checkpoint: sums in fp32, cast once, nothing written."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdfast.checkpoints.adapter import LoraAdapter, LoraEntry
from holdfast.checkpoints.contents import require_model_folder
from holdfast.checkpoints.dense_update import DenseUpdate
from holdfast.checkpoints.naming import NameIndex, normalised
from holdfast.checkpoints.quantised import dequantised_config, find_quantised
from holdfast.checkpoints.reader import CheckpointReader
from holdfast.checkpoints.tensor_file import EDITABLE_DTYPES, TensorEntry
from holdfast.checkpoints.tied import (
    EMBEDDING,
    HEAD,
    Tied,
    find_tied,
    is_resized,
    resized_config,
    untied_config,
)
from holdfast.checkpoints.value import Checkpoint, Source, as_checkpoint
from holdfast.errors import AdapterError, CheckpointError

# Rows at a time when a weight is summed: 64 x 11008 fp32 values stay in the processor's cache.
ROW_CHUNK = 64

# What a checkpoint consists of; pickled weights are not even downloaded.
_SNAPSHOT_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")


# The name until version 0.2.
CheckpointLike = Checkpoint


class MergedCheckpoint:
    """A base checkpoint under zero or more LoRA adapters, applied in order.

    `entries` say what each key reads as (type, shape): the base's, but for what is dequantised, resized by an adapter,
    or the other end of a tied pair. `stored(key)` is what has to be read for it, `value(key, ...)` what that makes.
    `read_as[key]` is a type that a value is rounded to before anything is computed with it. `replaced[key]` names the
    last adapter that replaces a whole tensor (`modules_to_save`); `updates[key]` lists the adapters that change a
    weight after that, in order.

    Where the base ties its head to its input embedding and an adapter changes one end only, `untied` is True: `entries`
    then has both ends (the one that no file stores starts as the other), and `config()` says that they are two.

    Raises: AdapterError: an adapter for other modules or shapes.
    """

    def __init__(self, base: CheckpointReader, adapters: Sequence[LoraAdapter] = ()) -> None:
        self.base = base
        self.adapters = tuple(adapters)
        self.updates: dict[str, list[tuple[LoraAdapter, LoraEntry | DenseUpdate]]] = {}
        self.replaced: dict[str, tuple[LoraAdapter, str]] = {}
        self.read_as: dict[str, torch.dtype] = {}
        what = f"checkpoint {base.folder}"
        config = base.config() if (base.folder / "config.json").is_file() else {}
        self.entries, self.quantised = find_quantised(base.entries, config, what=what)
        self.names: NameIndex = base.names if not self.quantised else NameIndex(self.entries, what=what)
        self._recorded = "quantization_config" in config
        self.untied = False
        self._tied = self._find_tied()
        for adapter in self.adapters:
            self._add(adapter)

    def _find_tied(self) -> Tied | None:
        """The tied ends of the base, where an adapter touches one; `entries` then has both."""
        touched = {normalised(weight) for adapter in self.adapters for _, weight in adapter.weight_names()}
        if not touched & {EMBEDDING, HEAD}:
            return None
        tied = find_tied(self.entries, self.base.config())
        if tied is not None:
            self.untied = any(
                normalised(weight) in (EMBEDDING, HEAD) and adapter.changes_one_end(name)
                for adapter in self.adapters
                for name, weight in adapter.weight_names()
            )
            if tied.missing is not None and self.untied:
                stored = self.entries[tied.embedding if tied.missing == tied.head else tied.head]
                self.entries = {**self.entries, tied.missing: stored}
                self.names = NameIndex(self.entries, what=f"checkpoint {self.base.folder}")
        return tied

    def _key(self, adapter: LoraAdapter, name: str) -> str:
        """The key of a name of an adapter; the end that a tied base does not store is the one it does."""
        if self._tied is not None and self._tied.missing is not None and not self.untied:
            ends: dict[tuple[str, ...], str] = {EMBEDDING: self._tied.embedding, HEAD: self._tied.head}
            if ends.get(normalised(name)) == self._tied.missing:
                return str(self._tied.other(self._tied.missing))
        return (
            adapter.key_of_saved(name, self.names)
            if name in adapter.saved
            else self.names.require(name, error=AdapterError)
        )

    def keys_of(self, adapter: LoraAdapter) -> dict[str, str]:
        """Module of one of the adapters, dense ones too -> the key of the weight that it updates."""
        return {module: self._key(adapter, f"{module}.weight") for module in (*adapter.modules, *adapter.dense)}

    def _add(self, adapter: LoraAdapter) -> None:
        replaced = {name: self._key(adapter, name) for name in adapter.saved}
        updated = self.keys_of(adapter)
        done: set[str] = set()
        for name, key in replaced.items():
            saved, entry = adapter.saved[name], self.entries[key]
            if saved.shape != entry.shape and not is_resized(key, saved.shape, entry.shape):
                raise AdapterError(
                    f"{adapter.folder}: {name} is {saved.shape} in the adapter and {entry.shape} in "
                    f"{self.base.folder}; only an embedding or a head may have another number of rows. The adapter was "
                    "trained on another model."
                )
            if key in updated.values() and name not in adapter.base_parameters:
                raise AdapterError(f"{adapter.folder} both replaces and updates {name}; merge it with PEFT first.")
            if key in updated.values() and normalised(key) not in (EMBEDDING, HEAD):
                raise AdapterError(f"{adapter.folder} both replaces and updates {name}; merge it with PEFT first.")
            for end in self._ends(adapter, name, key, replaced.values()):
                # What earlier adapters made of it is replaced too: this one was trained on top of them.
                self.updates.pop(end, None)
                self.replaced[end] = (adapter, name)
                if saved.shape != entry.shape:
                    self.entries = {**self.entries, end: self._resized(end, saved.shape)}
        if any(self.entries[key].shape != self.base.entries[self.entries[key].name].shape for key in replaced.values()):
            self._require_equal_rows(adapter)
        for module, key in updated.items():
            lora = adapter.modules[module] if module in adapter.modules else adapter.dense[module]
            _check_fit(adapter, lora, self.entries[key])
            # Factors of a pair that is kept tied are one; where a file has two, PEFT loads the head's last.
            for end in self._ends(adapter, module, key, () if adapter.ties else updated.values()):
                if end in done:
                    continue
                done.add(end)
                self.updates.setdefault(end, []).append((adapter, lora))

    def _ends(self, adapter: LoraAdapter, name: str, key: str, own: Collection[str]) -> list[str]:
        """The keys that a change of `name` reaches: its own, and the tied one that nothing else in the adapter sets."""
        other = self._tied.other(key) if self._tied is not None else None
        if other is None or other not in self.entries or other in own or adapter.changes_one_end(name):
            return [key]
        return [key, other]

    def _resized(self, key: str, shape: tuple[int, ...]) -> TensorEntry:
        entry = self.entries[key]
        return replace(entry, shape=shape, nbytes=math.prod(shape) * entry.itemsize)

    def _require_equal_rows(self, adapter: LoraAdapter) -> None:
        """Both ends have one vocabulary: raise where an adapter resizes one of them and leaves the other."""
        ends = {normalised(key): key for key in self.entries if normalised(key) in (EMBEDDING, HEAD)}
        rows = {key: self.entries[key].shape[0] for key in ends.values()}
        if len(set(rows.values())) > 1:
            listed = ", ".join(f"{key} {count}" for key, count in rows.items())
            raise AdapterError(
                f"{adapter.folder} resizes one end of the vocabulary only ({listed} rows). Save the adapter with both "
                "(`save_embedding_layers=True`), or merge it into its base with the tool that trained it."
            )

    @property
    def vocabulary(self) -> int | None:
        """Rows of the input embedding, where an adapter resized it; else None."""
        for key in self.entries:
            stored = self.base.entries.get(self.entries[key].name)
            if normalised(key) == EMBEDDING and stored is not None and stored.shape != self.entries[key].shape:
                return self.entries[key].shape[0]
        return None

    def config(self) -> dict[str, Any]:
        """`config.json` of the merged model: the base's, untied where the two ends differ, with its vocabulary."""
        config = self.base.config()
        config = untied_config(config) if self.untied else config
        # A record that outlived its weights goes as well: loaders would go by it.
        config = dequantised_config(config) if "quantization_config" in config else config
        return config if self.vocabulary is None else resized_config(config, self.vocabulary)

    @property
    def has_own_config(self) -> bool:
        """Whether `config()` says something else than the base's file."""
        return self.untied or self._recorded or self.vocabulary is not None

    @property
    def folder(self) -> Path:
        """The base's folder."""
        return self.base.folder

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def files(self) -> dict[str, Path]:
        """Every file that holds weights: shards by their names, an adapter's under its place in the order."""
        found = {path.name: path for path in self.base.shard_paths}
        for place, adapter in enumerate(self.adapters, 1):
            found |= {f"adapter {place}: {path.name}": path for path in adapter.files}
        return found

    def is_plain(self, key: str) -> bool:
        """Whether the tensor is the base's own, bytes and all."""
        return not any(key in found for found in (self.updates, self.replaced, self.quantised, self.read_as))

    def stored(self, key: str) -> tuple[TensorEntry, ...]:
        """The entries of the base's files that `value` takes, in its order."""
        quantised = self.quantised.get(key)
        if quantised is not None:
            return (quantised.stored, quantised.scale)
        return (self.base.entries[self.entries[key].name],)

    def value(self, key: str, *stored: Tensor, out: Tensor | None = None) -> Tensor:
        """One tensor, dequantised, merged and rounded to `read_as`, from what lies on disk.

        stored: the tensors of `stored(key)`, of any shape. out: of the shape of `entries[key]`: the result is cast once
        into it; without, it is fp32 or wider.
        """
        quantised = self.quantised.get(key)
        weight = stored[0] if quantised is None else quantised.read(*stored)
        rounded = self.read_as.get(key)
        if rounded is None:
            return self.merge(key, weight, out=out)
        value = self.merge(key, weight).to(rounded)
        return value.to(torch.promote_types(rounded, torch.float32)) if out is None else out.copy_(value)

    def merge(self, key: str, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """The merged value of `weight`, the base's tensor under `key`; `out` may be `weight` itself.

        Without `out` the result is fp32 (fp64 for an fp64 base); with it, the sum is cast once into `out`.

        weight, out: of the stored shape, (out, in) for a linear.
        """
        if key in self.replaced:
            adapter, name = self.replaced[key]
            weight = adapter.read_saved(name).to(weight.device)
        if out is None:
            out = torch.empty(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32))
        pending: list[tuple[Tensor, Tensor, LoraEntry, Tensor | None]] = []
        for adapter, update in self.updates.get(key, ()):
            if isinstance(update, LoraEntry):
                pending.append((*adapter.read_factors(update.module), update, adapter.read_scale(update.module)))
                continue
            # What is no sum comes after all that is below it, in fp32 or wider.
            if pending:
                wide = torch.empty(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32))
                weight = add_updates(weight, pending, wide)
                pending = []
            weight = adapter.apply_dense(update.module, weight)
        return add_updates(weight, pending, out) if pending else out.copy_(weight)

    def read_float(self, key: str) -> Tensor:
        """One tensor, merged, in fp32 or wider: what an edit computes with.

        Of the stored shape, (out, in) for a linear.

        Raises: CheckpointError: stored as integers or in 8 bits.
        """
        key = self.names.require(key)
        entry = self.entries[key]
        if entry.dtype not in EDITABLE_DTYPES:
            raise CheckpointError(
                f"{key} in {self.folder} is stored as {entry.dtype}; expected F16, BF16 or F32. Dequantise it first."
            )
        return self.value(key, *self._read_stored(key))

    def read(self, key: str) -> Tensor:
        """One tensor, merged, cast once to its stored type.

        Of the stored shape, (out, in) for a linear.
        """
        key = self.names.require(key)
        stored = self._read_stored(key)
        entry = self.entries[key]
        if self.is_plain(key):
            return stored[0]
        fits = stored[0].dtype == entry.torch_dtype and tuple(stored[0].shape) == entry.shape
        out = stored[0] if fits else torch.empty(entry.shape, dtype=entry.torch_dtype)
        return self.value(key, *stored, out=out)

    def _read_stored(self, key: str) -> list[Tensor]:
        return [self.base.read(entry.name) for entry in self.stored(key)]

    def close(self) -> None:
        """Close base and adapters."""
        self.base.close()
        for adapter in self.adapters:
            adapter.close()

    def __enter__(self) -> MergedCheckpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def add_updates(
    weight: Tensor, updates: Sequence[tuple[Tensor, Tensor, LoraEntry, Tensor | None]], out: Tensor
) -> Tensor:
    """out = (weight * scale) + s B A for each (A, B, entry, scale), in fp32 or wider, cast once; rows at a time.

    Columns that no update touches are copied bit for bit. `out` may be `weight`: a row is read before it is written.
    """
    target = out
    if any(entry.transposed for _, _, entry, _ in updates):
        weight, target = weight.t(), out.t()
    wide = torch.promote_types(weight.dtype, torch.float32)
    device = weight.device
    scaled = [
        (a.to(device, wide), b.to(device, wide) * entry.scaling, None if scale is None else scale.to(device))
        for a, b, entry, scale in updates
    ]
    # 0 + -0.0 is 0.0: a sum would not leave an untouched column as it was.
    untouched = torch.ones(weight.shape[1], dtype=torch.bool, device=device)
    for a, _, scale in scaled:
        untouched &= (a == 0).all(0)
        if scale is not None:
            untouched &= scale == 1
    some_untouched = bool(untouched.any())
    for start in range(0, weight.shape[0], ROW_CHUNK):
        rows = slice(start, start + ROW_CHUNK)
        old = weight[rows].to(wide)
        total = old.clone()
        for a, b, scale in scaled:
            if scale is not None:
                total *= scale
            total.addmm_(b[rows], a)
        target[rows] = torch.where(untouched, old, total) if some_untouched else total
    return out


def locate(source: str | Path) -> Path:
    """The folder of a checkpoint: itself, or the local snapshot of a hub id (`HF_HUB_OFFLINE=1` is respected).

    Raises: CheckpointError: neither a folder nor a hub id that can be reached or is cached.
    """
    if not str(source).strip():
        # As a path it would be the folder that one stands in.
        raise CheckpointError("A model is named by an empty text; expected a folder or a hub id.")
    folder = Path(source)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                str(source),
                allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.md", "LICENSE*"],
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{source} is neither a folder nor a hub id that can be reached (or is cached, when HF_HUB_OFFLINE=1): "
            f"{error}"
        ) from error


def weight_bytes(source: str | Path) -> int:
    """Bytes of the weights of a checkpoint on disk. Raises: CheckpointError: as `locate`."""
    return sum(path.stat().st_size for path in locate(source).glob("*.safetensors") if path.is_file())


def open_checkpoint(source: Source) -> MergedCheckpoint:
    """Open a folder, a hub id or a checkpoint value with adapters.

    Raises: CheckpointError, AdapterError: see `CheckpointReader`, `LoraAdapter`, `locate`.
    """
    value = as_checkpoint(source)
    folder = locate(value.base)
    require_model_folder(folder)
    reader = CheckpointReader(folder)
    opened: list[LoraAdapter] = []
    try:
        for name in value.adapters:
            opened.append(LoraAdapter(locate(name)))
        return MergedCheckpoint(reader, opened)
    except BaseException:
        reader.close()
        for adapter in opened:
            adapter.close()
        raise


def _check_fit(adapter: LoraAdapter, update: LoraEntry | DenseUpdate, base: TensorEntry) -> None:
    expected: tuple[int, ...]
    if isinstance(update, LoraEntry):
        expected = update.shape[::-1] if update.transposed else update.shape
        fits = base.shape == expected
    else:
        expected, fits = update.shape, update.fits(base.shape)
    if not fits:
        groups = isinstance(update, DenseUpdate) and update.kind == "conv"
        raise AdapterError(
            f"{adapter.folder} updates {update.module} as {expected}, but {base.name} is {base.shape} in the base; "
            "the adapter was trained on another model"
            + (", or on a convolution with groups, which is not handled." if groups else ".")
        )
    if base.dtype not in EDITABLE_DTYPES:
        raise AdapterError(
            f"{base.name} in the base is stored as {base.dtype}; expected F16, BF16 or F32. Dequantise the base first."
        )
