"""How much memory will these images ask for? An estimate from picture sizes and a model's config.json, before a run.

No model is built. Image tokens follow the model's scheme (one fixed grid, tiles, or one token per patch block);
sequence memory follows from tokens. The figures are for planning: allocators and kernels add their share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.data.source_files import read_json
from holdfast.errors import DataError

# Typical tokenisers make one token of about four characters of English.
CHARACTERS_PER_TOKEN = 4
# Korthikanti et al. 2022, eq. 2: bytes of activations per token and layer of a 16-bit transformer are 34 h, plus
# attention scores that fused kernels do not keep; with gradient checkpointing only the layer's input (2 h) stays.
BYTES_PER_ACTIVATION, BYTES_CHECKPOINTED = 34, 2


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What memory depends on, read from config.json. weight_bytes: of the safetensors files, 0 where there are none."""

    name: str
    layers: int
    hidden: int
    kv_width: int  # key and value heads x head size
    vocabulary: int
    patch: int
    merge: int
    grid: int | None  # tokens of a fixed image grid; None: the size decides
    tiles: int  # 1, or the most tiles of a tiling scheme, overview included
    max_pixels: int | None
    weight_bytes: int

    def image_tokens(self, width: int, height: int) -> int:
        """Tokens of one picture of width x height pixels (the most, for tiling schemes)."""
        if self.grid is not None:
            return self.grid * self.tiles
        pixels = width * height
        if self.max_pixels and pixels > self.max_pixels:
            shrink = math.sqrt(self.max_pixels / pixels)
            width, height = max(1, int(width * shrink)), max(1, int(height * shrink))
        block = self.patch * self.merge
        return max(1, round(width / block)) * max(1, round(height / block))


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes for one batch of the longest sequences seen. decoded: pictures in host memory, 8-bit RGB."""

    tokens: int
    image_tokens: int
    decoded_bytes: int
    weight_bytes: int
    cache_bytes: int
    logit_bytes: int
    training_bytes: int
    checkpointed_bytes: int


def read_shape(folder: Path) -> ModelShape:
    """The shape of the model in `folder` (config.json, preprocessor files, sizes of weights). Raises DataError."""
    try:
        return _read_shape(folder)
    except (TypeError, ValueError, ZeroDivisionError, AttributeError, OverflowError) as error:
        raise DataError(f"{folder / 'config.json'}: the memory estimate cannot use it: {error}.") from error


def _read_shape(folder: Path) -> ModelShape:
    config = read_json(folder / "config.json")
    if not isinstance(config, Mapping):
        raise DataError(f"{folder / 'config.json'} is no object.")
    text, vision = config.get("text_config") or config, config.get("vision_config") or {}
    try:
        heads, hidden = int(text["num_attention_heads"]), int(text["hidden_size"])
        layers, vocabulary = int(text["num_hidden_layers"]), int(text["vocab_size"])
    except KeyError as error:
        raise DataError(f"{folder / 'config.json'} names no {error.args[0]}; the memory estimate needs it.") from None
    head = int(text.get("head_dim") or hidden // heads)
    patch, merge = _side(vision.get("patch_size")) or 14, int(vision.get("spatial_merge_size") or 1)
    size = _side(vision.get("image_size"))
    fixed = isinstance(size, int) and "spatial_merge_size" not in vision
    return ModelShape(
        name=folder.name,
        layers=layers,
        hidden=hidden,
        kv_width=int(text.get("num_key_value_heads") or heads) * head,
        vocabulary=vocabulary,
        patch=patch,
        merge=merge,
        grid=_grid(config, size // patch) if fixed and isinstance(size, int) else None,
        tiles=_tiles(folder, config, size),
        max_pixels=_max_pixels(folder),
        weight_bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
    )


def _side(size: object) -> int | None:
    """Pixels of a side: a number, or the longer of (height, width), as some families write it. None: not said."""
    if isinstance(size, list | tuple) and size:
        return max(int(one) for one in size)
    return None if size is None or isinstance(size, Mapping) else int(size)  # type: ignore[call-overload, no-any-return]


def estimate(
    shape: ModelShape, pictures: Sequence[Sequence[tuple[int, int]]], characters: Sequence[int], *, batch_size: int
) -> Estimate:
    """The batch of the `batch_size` most demanding samples.

    pictures: sizes of the pictures of each sample; characters: length of each sample's text, answer included.
    """
    images = [sum(shape.image_tokens(*size) for size in sizes) for sizes in pictures]
    tokens = [i + math.ceil(c / CHARACTERS_PER_TOKEN) for i, c in zip(images, characters, strict=True)]
    decoded = sorted((sum(3 * w * h for w, h in sizes) for sizes in pictures), reverse=True)[:batch_size]
    longest = max(tokens, default=0)
    total = longest * batch_size  # a batch is padded to its longest sequence
    logits = total * shape.vocabulary * 4
    fixed = shape.weight_bytes + logits
    return Estimate(
        tokens=longest,
        image_tokens=max(images, default=0),
        decoded_bytes=sum(decoded),
        weight_bytes=shape.weight_bytes,
        cache_bytes=total * 2 * shape.layers * shape.kv_width * 2,
        logit_bytes=logits,
        training_bytes=fixed + total * shape.layers * shape.hidden * BYTES_PER_ACTIVATION,
        checkpointed_bytes=fixed + total * shape.hidden * (shape.layers * BYTES_CHECKPOINTED + BYTES_PER_ACTIVATION),
    )


def _grid(config: Mapping[str, Any], side: int) -> int:
    """Tokens of one grid of side x side patches after the connector's pixel shuffle."""
    factor = int(config.get("scale_factor") or 1)  # Idefics3, SmolVLM
    ratio = float(config.get("downsample_ratio") or 1.0)  # InternVL
    return max(1, int(side * side * ratio * ratio) // factor**2)


def _tiles(folder: Path, config: Mapping[str, Any], size: Any) -> int:
    """Most tiles of a tiling scheme, the overview included; 1 without one."""
    processor = _processor(folder)
    pinpoints = config.get("image_grid_pinpoints")
    if isinstance(pinpoints, list) and isinstance(size, int) and size:  # LLaVA-NeXT, LLaVA-OneVision
        return 1 + max((math.ceil(w / size) * math.ceil(h / size) for w, h in pinpoints), default=0)
    if processor.get("do_image_splitting"):  # Idefics3, SmolVLM
        longest = (processor.get("size") or {}).get("longest_edge") or 1
        tile = (processor.get("max_image_size") or {}).get("longest_edge") or longest
        return 1 + math.ceil(longest / tile) ** 2
    if processor.get("crop_to_patches") or "max_dynamic_patch" in config:  # InternVL
        return 1 + int(processor.get("max_patches") or config.get("max_dynamic_patch") or 0)
    return 1


def _max_pixels(folder: Path) -> int | None:
    """Pixel budget of a dynamic-resolution processor (Qwen-VL); None where it has none."""
    processor = _processor(folder)
    size = processor.get("size")
    limit = processor.get("max_pixels")
    if limit is None and isinstance(size, Mapping) and "shortest_edge" in size:
        limit = size.get("longest_edge")  # newer files keep the budget under this name
    # A longest edge in pixels of length stays far below any budget in pixels of area.
    return limit if isinstance(limit, int) and limit > 10_000 else None


def _processor(folder: Path) -> Mapping[str, Any]:
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).exists():
            data = read_json(folder / name)
            if isinstance(data, Mapping):
                inner = data.get("image_processor")
                return inner if isinstance(inner, Mapping) else data
    return {}
