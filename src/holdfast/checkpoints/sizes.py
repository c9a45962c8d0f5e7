"""Whether a configuration can be that of these weights, asked before anything of its size is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from holdfast.checkpoints.reader import CheckpointReader
from holdfast.errors import CheckpointError, ModelError

# Far beyond any model; what is larger would be allocated as tables, or counted up to.
_LARGEST = 2**40
_MOST_PATCHES = 2**24
_COUNTS = ("layers", "depth", "depths", "blocks")


def require_plausible_sizes(config: Mapping[str, Any], folder: Path) -> None:
    """Raise ModelError where `config` speaks of more layers than the folder has tensors, or of impossible sizes."""
    try:
        with CheckpointReader(folder) as reader:
            tensors = len(reader.entries)
    except CheckpointError:
        return  # no weights here, or damaged ones: whoever loads them says so
    where = folder / "config.json"
    for name, value in _numbers(config):
        key = name.rpartition(".")[2]
        words = key.split("_")
        # A bound is no count: Qwen's max_window_layers stays at its default where a model has fewer layers.
        if words[0] != "max" and any(word in words for word in _COUNTS) and value > tensors:
            raise ModelError(
                f"{where}: {name} is {value}, and the weights beside it are {tensors} tensors; every layer has one at "
                "least. The configuration belongs to another model, or is damaged."
            )
        if abs(value) > _LARGEST:
            raise ModelError(f"{where}: {name} is {value}; no model has such a size. The file is damaged.")
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        size, patch = part.get("image_size"), part.get("patch_size")
        if isinstance(size, int) and isinstance(patch, int) and patch > 0 and (size // patch) ** 2 > _MOST_PATCHES:
            raise ModelError(
                f"{where}: image_size {size} in patches of {patch} makes {(size // patch) ** 2} of them; no model has "
                "such a size. The file is damaged."
            )


def _numbers(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int) and not isinstance(value, bool):
            yield f"{prefix}{key}", value
