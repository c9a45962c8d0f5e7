"""A checkpoint in another floating-point type. A stream of small edits in fp16 or bf16 is rounded after every task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdfast.checkpoints.fingerprint import file_stamps, fingerprint
from holdfast.checkpoints.merged import open_checkpoint
from holdfast.checkpoints.reader import INDEX_FILE
from holdfast.checkpoints.rewrite import Compute, Copy, Input, copy_side_files, hash_side_files, rewrite
from holdfast.checkpoints.tensor_file import DTYPE_NAMES, EDITABLE_DTYPES
from holdfast.checkpoints.value import Source
from holdfast.checkpoints.writer import (
    DEFAULT_SHARD_BYTES,
    PROVENANCE_FILE,
    OutputTensor,
    Staging,
    plan_shards,
    shard_index,
)
from holdfast.errors import CheckpointError
from holdfast.files import write_json


def cast_checkpoint(
    source: Source,
    out: Path | str,
    dtype: torch.dtype,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Path:
    """Write `source` (adapters merged) with all floating-point weights in `dtype` as the folder `out`.

    config.json names the new type, so a loader that keeps a checkpoint's type keeps it. Killed and called again, it
    goes on where it stopped; a finished `out` of the same source is left alone.

    Raises: CheckpointError: `dtype` is no type that weights are kept in. StorageError: disk full, `out` exists.
    """
    name = DTYPE_NAMES.get(dtype)
    if name not in EDITABLE_DTYPES:
        raise CheckpointError(f"{dtype} is no type for weights; expected float32, bfloat16, float16 or float64.")
    with open_checkpoint(source) as checkpoint:
        recipe: dict[str, Copy | Compute] = {}
        tensors = []
        for key, entry in checkpoint.entries.items():
            floating = entry.dtype in EDITABLE_DTYPES
            size = entry.numel * dtype.itemsize if floating else entry.nbytes
            tensors.append(OutputTensor(key, name if floating else entry.dtype, entry.shape, size))
            read = tuple(Input(checkpoint.base, stored) for stored in checkpoint.stored(key))
            if floating and (entry.dtype != name or not checkpoint.is_plain(key)):
                recipe[key] = Compute(read, _to(checkpoint, key, dtype))
            else:
                recipe[key] = Copy(read[0])
        shards = plan_shards(tensors, shard_bytes=shard_bytes)
        prints = [fingerprint(checkpoint.base), *(fingerprint(adapter) for adapter in checkpoint.adapters)]
        adapters = [adapter.folder for adapter in checkpoint.adapters]
        plan = {
            "cast": name,
            "fingerprints": prints,
            "side_files": hash_side_files(checkpoint.folder, adapters),
            "shard_bytes": shard_bytes,
        }
        with Staging(Path(out), plan, inputs=file_stamps(checkpoint.files())) as staging:
            if staging.already_published:
                return Path(out)
            rewrite(staging, shards, recipe)
            copy_side_files(checkpoint.folder, staging.folder, adapters)
            write_json(staging.folder / "config.json", _with_dtype(checkpoint.config(), dtype))
            if len(shards) > 1:
                write_json(staging.folder / INDEX_FILE, shard_index(shards))
            write_json(staging.folder / PROVENANCE_FILE, {"plan_hash": staging.plan_hash, "plan": plan})
            staging.publish()
    return Path(out)


def _to(checkpoint: Any, key: str, dtype: torch.dtype) -> Callable[[Tensor], tuple[Tensor, None]]:
    def cast(*stored: Tensor) -> tuple[Tensor, None]:
        wide = stored[0] if checkpoint.is_plain(key) else checkpoint.value(key, *stored)
        return wide.to(dtype), None

    return cast


def _with_dtype(config: Any, dtype: torch.dtype) -> Any:
    """`config` with every `dtype` and `torch_dtype` in it set to `dtype`, and one at the top."""
    name = str(dtype).removeprefix("torch.")

    def renamed(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: name if k in ("dtype", "torch_dtype") and v is not None else renamed(v) for k, v in value.items()}

    found = renamed(dict(config))
    if "dtype" not in found and "torch_dtype" not in found:
        found["dtype"] = name
    return found
