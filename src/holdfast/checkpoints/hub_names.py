"""Tensor names as released checkpoints carry them: what vLLM, mergekit and older transformers look for.

transformers 5 reads both spellings, but writes a CLIP or SigLIP tower that is part of a larger model without its
`vision_model.`, and tools that save a model's own `state_dict` write its names in memory
(`model.language_model.layers.0` for `language_model.model.layers.0`). Servers map from the released names only. What is
written here is renamed to those; families whose released names are the ones in memory (Qwen3-VL, GLM-4V, Idefics3)
stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from holdfast.errors import CheckpointError

# Towers that their own class wraps in `vision_model`, by the model_type of the tower's configuration.
_WRAPPED_TOWERS = frozenset({"clip_vision_model", "siglip_vision_model", "siglip2_vision_model"})
_TOWER_PARTS = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.", "head.")
# In memory -> released, first match wins; by the model_type of the whole. Released before the two were the same.
_LLAVA = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
)
_QWEN = (("model.language_model.", "model."), ("model.visual.", "visual."))
_PREFIXES: Mapping[str, tuple[tuple[str, str], ...]] = {
    **dict.fromkeys(
        (
            *("llava", "llava_next", "llava_next_video", "llava_onevision", "vipllava", "internvl", "got_ocr2"),
            *("gemma3", "paligemma", "mistral3", "aya_vision", "aria"),
        ),
        _LLAVA,
    ),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
}


def hub_name(key: str, config: Mapping[str, Any]) -> str:
    """The released name of a tensor. config: the checkpoint's config.json."""
    for old, new in _PREFIXES.get(str(config.get("model_type")), ()):
        if key.startswith(old):
            key = new + key.removeprefix(old)
            break
    head, tower, rest = key.rpartition("vision_tower.")
    vision = config.get("vision_config")
    kind = vision.get("model_type") if isinstance(vision, Mapping) else None
    if tower and not head and kind in _WRAPPED_TOWERS and rest.startswith(_TOWER_PARTS):
        return f"{tower}vision_model.{rest}"
    return key


def memory_name(name: str, config: Mapping[str, Any]) -> str:
    """The name in memory (transformers 5) of a module or tensor that is spelled as in a released checkpoint.

    What is spelled so already stays. config: the checkpoint's config.json.
    """
    prefixes = _PREFIXES.get(str(config.get("model_type")), ())
    whole = f"{name}."  # a module may be all of a prefix
    # All of memory first: Qwen's released `model.` begins its names in memory too, `model.visual.` among them.
    if not whole.startswith(tuple(memory for memory, _ in prefixes)):
        for memory, released in prefixes:
            if whole.startswith(released):
                whole = memory + whole.removeprefix(released)
                break
    name = whole.removesuffix(".")
    return name.replace("vision_tower.vision_model.", "vision_tower.") if prefixes else name


def hub_names(keys: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Key -> released name, in the order of `keys`.

    Raises: CheckpointError: two keys would get one name, so the checkpoint holds one tensor twice.
    """
    found: dict[str, str] = {}
    taken: dict[str, str] = {}
    for key in keys:
        name = found[key] = hub_name(key, config)
        if name in taken:
            raise CheckpointError(
                f"{taken[name]} and {key} are one tensor in two spellings ({name} in released checkpoints); remove the "
                "one that is out of date."
            )
        taken[name] = key
    return found


__all__ = ["hub_name", "hub_names", "memory_name"]
