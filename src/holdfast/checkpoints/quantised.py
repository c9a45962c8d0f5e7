"""Quantised checkpoints: which can be read as plain weights, how, and by what sentence the others are refused.

fp8 with stored scales (DeepSeek, Qwen3-FP8: `quant_method: fp8`; compressed-tensors `float-quantized`) is a product of
the stored value and its scale: one scale per block of (128, 128), per row, or for the whole matrix. All else needs the
library that wrote it (bitsandbytes, GPTQ, AWQ, ...).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from holdfast.checkpoints.support import quantisation_kind
from holdfast.checkpoints.tensor_file import TensorEntry
from holdfast.errors import CheckpointError

# In the order in which they are looked for beside `X.weight`. `_inv` is DeepSeek's name; it multiplies all the same.
_SCALES = ("weight_scale_inv", "weight_scale")
# Of activations or of a cache: no part of a weight.
_OTHER_SCALES = ("input_scale", "activation_scale", "output_scale", "k_scale", "v_scale")
_FP8 = ("F8_E4M3", "F8_E5M2")
_BFLOAT16_BYTES = 2
_DEFAULT_BLOCK = (128, 128)


@dataclass(frozen=True, slots=True)
class Quantised:
    """One weight that is stored as fp8 values and scales, and reads as bf16. block: (rows, columns) of a scale."""

    stored: TensorEntry
    scale: TensorEntry
    block: tuple[int, int]

    @property
    def in_blocks(self) -> bool:
        """Whether the scale is of blocks, and not of rows or of the whole matrix."""
        return self.scale.shape == _blocks(self.stored.shape, self.block)

    def read(self, values: Tensor, scale: Tensor) -> Tensor:
        """values * scale. values: (r, c) fp8. scale: (), (1,), (r, 1), (r,), or one per block. Returns: (r, c) bf16."""
        wide, factor = values.to(torch.float32), scale.to(torch.float32)
        if not self.in_blocks:
            return (wide * (factor.reshape(-1, 1) if factor.numel() > 1 else factor.reshape(()))).bfloat16()
        rows, columns = self.block
        # Blocks at the lower and right edge may be cut off.
        full = factor.repeat_interleave(rows, 0)[: wide.shape[0]].repeat_interleave(columns, 1)[:, : wide.shape[1]]
        return (wide * full).bfloat16()


def find_quantised(
    entries: Mapping[str, TensorEntry], config: Mapping[str, Any], *, what: str
) -> tuple[dict[str, TensorEntry], dict[str, Quantised]]:
    """The entries that a quantised checkpoint reads as, and which of them are computed from what is stored.

    config: config.json. what: what errors call the checkpoint.

    Raises: CheckpointError: a kind that is not read here, by its name; fp8 without its scale.
    """
    record = config.get("quantization_config")
    quantised = [key for key, entry in entries.items() if entry.dtype in _FP8]
    if not isinstance(record, Mapping):
        packed = next((key for key in entries if key.endswith((".qweight", ".quant_state.bitsandbytes__nf4"))), None)
        if packed is not None:
            raise CheckpointError(f"{what} holds {packed}, {quantisation_kind('other').sentence}")
        return dict(entries), {}
    method = str(record.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in record else "unknown")).lower()
    if not quantised:
        # A configuration that outlived its weights: merged and saved dequantised.
        if all(entry.dtype not in ("U8", "I8", "I32") for entry in entries.values()):
            return dict(entries), {}
        raise CheckpointError(f"{what} is quantised ({method}), {quantisation_kind(method).sentence}")
    found: dict[str, Quantised] = {}
    used: set[str] = set()
    for key in quantised:
        owner = key.removesuffix("weight")
        scale = next((f"{owner}{name}" for name in _SCALES if f"{owner}{name}" in entries), None)
        if not key.endswith(".weight") or scale is None:
            raise CheckpointError(
                f"{what} stores {key} as {entries[key].dtype} without a scale ({_SCALES[0]}) beside it, so its values "
                "are not known. Save the model dequantised."
            )
        found[key] = Quantised(entries[key], entries[scale], _block_size(record))
        _require_fit(found[key], what)
        used.add(scale)
    left = {
        key: entry
        for key, entry in entries.items()
        if key not in used and not key.endswith(tuple(f".{name}" for name in _OTHER_SCALES))
    }
    for key in found:
        left[key] = replace(left[key], dtype="BF16", nbytes=left[key].numel * _BFLOAT16_BYTES)
    return left, found


def dequantised_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` of a model whose weights are plain: without a quantisation's record, at every level."""
    return {
        key: dequantised_config(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key != "quantization_config"
    }


def _block_size(record: Mapping[str, Any]) -> tuple[int, int]:
    """(rows, columns) that share a scale: `weight_block_size`, or `block_structure` of compressed-tensors."""
    found = record.get("weight_block_size")
    groups = record.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        found = found or (weights or {}).get("block_structure")
    if isinstance(found, str):
        found = [int(size) for size in found.split("x") if size.isdecimal()]
    if isinstance(found, list | tuple) and len(found) == 2 and all(isinstance(n, int) and n > 0 for n in found):
        return (found[0], found[1])
    return _DEFAULT_BLOCK


def _blocks(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    return tuple(-(-size // length) for size, length in zip(shape, block, strict=False))


def _require_fit(found: Quantised, what: str) -> None:
    weight, scale = found.stored, found.scale
    whole = scale.numel == 1 or scale.shape in ((weight.shape[0],), (weight.shape[0], 1))
    if len(weight.shape) != 2 or not (whole or found.in_blocks):
        raise CheckpointError(
            f"{what}: {weight.name} is {weight.shape} and its scale {scale.name} {scale.shape}; expected a matrix and "
            f"one scale in all, per row, or per block of {found.block}. Save the model dequantised."
        )


__all__ = ["Quantised", "dequantised_config", "find_quantised"]
