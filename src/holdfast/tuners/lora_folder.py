"""Low-rank factors as a stock PEFT LoRA folder, and back: an expert, and what a method tuned in another way."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from holdfast.checkpoints.adapter import WEIGHTS_FILE, LoraAdapter
from holdfast.checkpoints.adapter_config import settle_adapter_config
from holdfast.errors import AdapterError
from holdfast.files import write_json
from holdfast.tuners.folders import new_folder

Factors = Mapping[str, tuple[Tensor, Tensor]]  # linear name -> A (r, in), B (out, r)


def save_lora(
    folder: Path,
    factors: Factors,
    *,
    base: str,
    base_config: Mapping[str, Any] | None = None,
    beside: Mapping[str, Any] | None = None,
) -> None:
    """A stock PEFT LoRA folder: `alpha = r`, so its scale is 1 whatever the rank of a linear.

    base: hub id or folder. base_config: of the base, so that `AutoPeftModel` finds its class. beside: JSON files to
    write next to it, name -> plain data.

    factors: linear name -> A (rank, in), B (out, rank).

    Raises: AdapterError: no linear. StorageError: the disk is full or the folder cannot be written.
    """
    if not factors:
        raise AdapterError(f"{folder}: an adapter without any linear cannot be saved.")
    ranks = {name: a.shape[0] for name, (a, _) in factors.items()}
    rank = max(ranks.values())
    # Full names, escaped: PEFT reads these keys as regular expressions.
    pattern = {re.escape(name): r for name, r in ranks.items() if r != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=sorted(ranks),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        base_model_name_or_path=base,
        inference_mode=True,
        bias="none",
    )
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.detach().cpu().contiguous()
    with new_folder(folder) as temporary:
        config.save_pretrained(str(temporary))
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        settle_adapter_config(temporary, base=base, base_config=base_config)
        for name, value in (beside or {}).items():
            write_json(temporary / name, value)


def load_lora(folder: Path) -> Factors:
    """Factors of a LoRA folder, fp32 on the CPU; any scale is folded into B.

    Raises: AdapterError: no LoRA folder, or one that also replaces tensors or scales the base's input columns.
    """
    adapter = LoraAdapter(folder)
    try:
        if more := [*adapter.saved, *adapter.dense, *adapter.input_scale]:
            raise AdapterError(
                f"{folder} holds more than LoRA factors ({more[0]}): what is read here only adds to linear layers. "
                "Train it without modules_to_save, or edit it with the coefficient dropped."
            )
        factors = {}
        for name, entry in adapter.modules.items():
            a, b = adapter.read_factors(name)
            factors[name] = (a, b if entry.scaling == 1 else b * entry.scaling)
        return factors
    finally:
        adapter.close()
