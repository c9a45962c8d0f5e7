"""Which checkpoint is this? A content fingerprint in milliseconds, without reading all bytes.

sha256 over every tensor's name, type and shape and over 1 KiB from its start, middle and end; of an adapter also over
what its configuration makes of the tensors. Training and merging touch whole tensors, so a changed tensor shows; a
single flipped byte in between does not: this identifies, it does not authenticate. The same weights in other shard
sizes have the same fingerprint. Whether files are still those of an hour ago, their size and time say: `file_stamps`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from holdfast.checkpoints.tensor_file import TensorEntry

_SAMPLE_BYTES = 1024


class Readable(Protocol):
    """An open `CheckpointReader` or `LoraAdapter`."""

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Every tensor, by its key."""
        ...

    @property
    def meaning(self) -> Mapping[str, Any]:
        """What the configuration says that changes what the weights compute."""
        ...

    def read_range(self, key: str, buffer: Tensor, start: int, stop: int) -> Tensor:
        """Bytes start..stop of a tensor at the beginning of `buffer`, (n,) uint8; returns that part of it, (stop -
        start,).
        """
        ...


def fingerprint(checkpoint: Readable) -> str:
    """64 hex digits for the weights of an open checkpoint or adapter."""
    digest = hashlib.sha256()
    buffer = torch.empty(_SAMPLE_BYTES, dtype=torch.uint8)
    for key in sorted(checkpoint.entries):
        entry = checkpoint.entries[key]
        digest.update(f"\0{key}\0{entry.dtype}\0{list(entry.shape)}\0".encode())
        last = max(0, entry.nbytes - _SAMPLE_BYTES)
        for start in sorted({0, last // 2, last}):
            piece = checkpoint.read_range(key, buffer, start, min(start + _SAMPLE_BYTES, entry.nbytes))
            digest.update(piece.numpy().tobytes())
    if checkpoint.meaning:
        digest.update(json.dumps(checkpoint.meaning, sort_keys=True).encode())
    return digest.hexdigest()


def file_stamps(files: Mapping[str, Path]) -> dict[str, dict[str, int]]:
    """Size and time of change of files, by the names they are given under: as cheap as it is, any rewrite shows."""
    found = {name: path.stat() for name, path in files.items()}
    return {name: {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns} for name, stat in found.items()}
