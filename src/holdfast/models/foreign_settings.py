"""Bounds on what a checkpoint's tokenizer and image processor may make of a text and of a picture.

Both run outside Python: a normalizer that writes fifty characters for one, eight times in a row, or pictures of a
million pixels a side end in a process that the system kills. The settings say beforehand how far they go.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers.image_utils import SizeDict

from holdfast.data.images import MAX_PIXELS
from holdfast.errors import ModelError

# Tokenizers that are in use write at most three bytes for one.
MOST_GROWTH = 1000
MOST_PIECES = 1000  # of a post-processor's template
# No setting of an image processor but a number of pixels is larger; ids of tokens are smaller too.
_LARGEST = 2**20
_SIDE = math.isqrt(MAX_PIXELS)
# Under the names of edges Qwen-VL and GLM-4V keep numbers of pixels of a whole picture (see `encode`).
_PIXELS_FROM = 10_000
_PARTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}


def require_bounded(processor: Any, base: str) -> None:
    """Raise ModelError where the tokenizer's or the image processor's settings multiply what they are given.

    base: what the error calls the checkpoint.
    """
    backend = getattr(getattr(processor, "tokenizer", None), "backend_tokenizer", None)
    if backend is not None:
        for part in _PARTS:
            growth = _growth(_state(getattr(backend, part)), part)
            if growth > MOST_GROWTH:
                raise ModelError(
                    f"{base}: the tokenizer's {part} may make a text {_shown(growth)} times as long; at most "
                    f"{MOST_GROWTH} times is read. No tokenizer in use does that: the file is damaged, or made to harm."
                )
        pieces = _pieces(_state(backend.post_processor))
        if pieces > MOST_PIECES:
            raise ModelError(
                f"{base}: the tokenizer's post-processor puts {pieces} parts around a text; at most {MOST_PIECES} are "
                "read. The file is damaged, or made to harm."
            )
    for name, holder in (("processor", processor), ("image processor", getattr(processor, "image_processor", None))):
        for key, value in _settings(holder):
            if (fault := _fault(value, key)) is not None:
                raise ModelError(f"{base}: the {name}'s {key} is {fault}. The file is damaged, or made to harm.")


def _state(part: Any) -> Any:
    """The settings of a part of a fast tokenizer, as its file has them; None where there is no such part."""
    return None if part is None else json.loads(part.__getstate__())


def _growth(node: Any, part: str) -> float:
    """How many times as long a text may become; infinity where that is beyond counting."""
    if not isinstance(node, Mapping):
        return 1.0
    kind = node.get("type")
    if kind == "Sequence":
        return math.prod(_growth(inner, part) for inner in node.get(_PARTS[part], ()))
    if kind == "ByteLevel" and part != "decoder":
        return 2.0  # a byte becomes a character of two
    if kind == "Prepend":
        return 1.0 + len(node.get("prepend", "").encode())
    if kind != "Replace":
        return 1.0
    content = len(node.get("content", "").encode())
    found = node.get("pattern", {}).get("String")
    # A regular expression may match between any two characters.
    return 1.0 + content if found is None else max(1.0, content / max(1, len(found.encode())))


def _pieces(node: Any) -> int:
    if not isinstance(node, Mapping):
        return 0
    if node.get("type") == "Sequence":
        return sum(_pieces(inner) for inner in node.get("processors", ()))
    return (
        max(len(node.get("single", ())), len(node.get("pair", ()))) if node.get("type") == "TemplateProcessing" else 0
    )


def _settings(holder: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of the plain attributes of a processor."""
    for key, value in vars(holder).items() if holder is not None else ():
        if key.startswith("_") or isinstance(value, str):
            continue
        if isinstance(value, SizeDict):
            yield key, dict(value)
        elif isinstance(value, int | float | Mapping | Sequence):
            yield key, value


def _fault(value: Any, key: str) -> str | None:
    """What is wrong with a setting, for a sentence; None for what is within bounds."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return None
    if isinstance(value, int | float):
        most = 2**28 if "pixels" in key else _LARGEST
        return None if abs(value) <= most else f"{value:g}; at most {most} is read"
    if isinstance(value, Mapping):
        return _size_fault(value)
    for inner in value if isinstance(value, Sequence) else ():
        # Resolutions that a picture may be cut into.
        pair = isinstance(inner, Sequence) and len(inner) == 2 and all(isinstance(n, int) for n in inner)
        if pair and inner[0] * inner[1] > MAX_PIXELS:
            return f"a list with {list(inner)}; at most {MAX_PIXELS} pixels are made of a picture"
    return None


def _size_fault(size: Mapping[str, Any]) -> str | None:
    numbers = {key: value for key, value in size.items() if isinstance(value, int | float)}
    height = max(numbers.get("height", 1), numbers.get("max_height", 1))
    width = max(numbers.get("width", 1), numbers.get("max_width", 1))
    long, short = numbers.get("longest_edge", 0), numbers.get("shortest_edge", 0)
    pixels = max(height * width, max(long, short) if long >= _PIXELS_FROM else 0)
    if pixels > MAX_PIXELS or (long < _PIXELS_FROM and short > _SIDE):
        return f"{numbers}; at most {MAX_PIXELS} pixels are made of a picture"
    return None


def _shown(growth: float) -> str:
    return f"{growth:.3g}" if math.isfinite(growth) else "endlessly many"


__all__ = ["require_bounded"]
