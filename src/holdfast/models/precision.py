"""Where a model computes, and in which numbers: the device, and the dtype of weights and products."""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Any

import torch

from holdfast.checkpoints.merged import locate
from holdfast.checkpoints.reader import CheckpointReader
from holdfast.errors import CheckpointError, ModelError
from holdfast.models.memory import usable_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_device() -> torch.device:
    """The accelerator where there is one, else the CPU. One process uses one device; that there are more is said."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and (count := torch.accelerator.device_count()) > 1:
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        if alone:
            _say_one_device(accelerator.type, count)
    return accelerator or torch.device("cpu")


@cache
def _say_one_device(kind: str, count: int) -> None:
    logging.getLogger("holdfast").warning(
        f"{count} {kind} devices are in sight; this process uses one of them, which CUDA_VISIBLE_DEVICES chooses. "
        "`holdfast run`, `calibrate` and `evaluate` use all under `accelerate launch`."
    )


def parse_dtype(name: torch.dtype | str) -> torch.dtype:
    """A dtype from its name. Raises ModelError."""
    if isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise ModelError(f"dtype {name!r} is not one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def resolve_dtype(dtype: torch.dtype | str | None, config: Any, device: torch.device) -> torch.dtype:
    """The dtype to compute in: the one asked for, else the checkpoint's.

    On a CPU fp16 becomes fp32, and so does a checkpoint's bf16 where the CPU has no instructions for it and nobody
    asked for it: a matrix product is emulated there, tens of times slower (`benchmarks/bf16_on_cpu.py`).
    """
    wanted = dtype if dtype is not None else config.dtype or config.get_text_config().dtype or torch.float32
    resolved = parse_dtype(wanted)
    if device.type != "cpu":
        return resolved
    emulated = resolved is torch.bfloat16 and dtype is None and not cpu_has_bf16()
    return torch.float32 if emulated or resolved is torch.float16 else resolved


def stays_narrow(base: str, dtype: torch.dtype | str | None, config: Any, device: torch.device) -> torch.dtype | None:
    """The 16-bit type in which weights stay in memory while fp32 is computed with; None where they are widened whole.

    That is where nobody asked for a type, fp32 is chosen for a 16-bit checkpoint, and it would not fit.
    """
    wide = resolve_dtype(dtype, config, device)
    stored = config.dtype or config.get_text_config().dtype
    if dtype is not None or wide is not torch.float32 or stored not in (torch.bfloat16, torch.float16):
        return None
    try:
        with CheckpointReader(locate(base)) as reader:
            elements = sum(entry.numel for entry in reader.entries.values())
    except CheckpointError:
        return None  # whoever loads it says what is wrong
    return stored if elements * wide.itemsize > usable_bytes(device) else None


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices itself."""
    ask = getattr(torch.cpu, "get_capabilities", None)  # torch 2.11 cannot be asked
    known = ask() if ask is not None else {}
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
