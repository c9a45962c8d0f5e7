"""What transformers builds of a checkpoint, asked of a model without weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from holdfast.checkpoints.naming import normalised
from holdfast.models.settings import quiet_transformers, read_config


def module_names(folder: Path) -> list[str]:
    """Names of all modules of the model that a folder's config.json describes, as they are in memory.

    Raises: ModelError: no vision-language model.
    """
    config = read_config(str(folder))
    with quiet_transformers(), init_empty_weights():
        model = AutoModelForImageTextToText.from_config(config)
    return [name for name, _ in model.named_modules() if name]


def built_keys(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Those of some keys, as files spell them, that transformers loads into the model; it ignores the others.

    shapes: key -> shape of its tensor. Nothing is read: transformers' own loader is run over tensors without memory.

    Raises: ModelError: no vision-language model.
    """
    config = read_config(str(folder))
    found: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    cls = found[0] if isinstance(found, tuple) else found
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    with quiet_transformers():
        model, info = cls.from_pretrained(
            None,
            config=config,
            state_dict=state,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    # What a class ignores by name is not even reported; a layer of that name that it has is its own all the same.
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    own = {normalised(key) for key in model.state_dict()}
    # The loader names what it did not expect as it is called in memory, not as the file spells it.
    unexpected = {normalised(key) for key in info["unexpected_keys"]}
    return {
        key
        for key in shapes
        if normalised(key) in own
        or (normalised(key) not in unexpected and all(re.search(pattern, key) is None for pattern in patterns))
    }


__all__ = ["built_keys", "module_names"]
