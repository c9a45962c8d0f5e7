"""Boxes: intersection over union of a box written in text with the gold box."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from holdfast.errors import ConfigError
from holdfast.scorers.base import Mode, Score
from holdfast.scorers.match import shown
from holdfast.scorers.sample import SampleScorer

Box = tuple[float, float, float, float]
Parser = Literal["legacy", "prism"]
UNPARSABLE = "no box can be read"

_NUMBER = re.compile(r"-?\d*\.?\d+(?:[eE][-+]?\d+)?")


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2) in one unit; 0 when the union has no area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def parse_legacy(text: str, *, prediction: bool) -> Box | None:
    """CoIN's reading: brackets removed, then of a prediction *the first and last character dropped*, split at commas.

    A bare "[0.12,...,0.89]" so loses a digit at either end, and a blank before it takes the first digit's place;
    numbers published with CoIN were computed this way.
    """
    text = text.replace("[", "").replace("]", "")
    try:
        values = [float(part) for part in (text[1:-1] if prediction else text).split(",")]
    except ValueError:
        return None
    return (values[0], values[1], values[2], values[3]) if len(values) == 4 else None


def parse_prism(text: str) -> Box | None:
    """Prism's reading: the first four numbers found anywhere."""
    values = [float(number) for number in _NUMBER.findall(text)[:4]]
    return (values[0], values[1], values[2], values[3]) if len(values) == 4 else None


def parse_strict(text: str) -> Box | None:
    """Exactly four finite numbers with x1 < x2 and y1 < y2."""
    values = [float(number) for number in _NUMBER.findall(text)]
    if len(values) != 4 or not all(math.isfinite(value) for value in values):
        return None
    box = (values[0], values[1], values[2], values[3])
    return box if box[0] < box[2] and box[1] < box[3] else None


class Grounding(SampleScorer):
    """Share of boxes with IoU above `threshold`. A prediction without a box is wrong, a gold without one unscored.

    Gold: the reference, "[x1,y1,x2,y2]" as fractions of the longer side after padding to a square; `meta["size"]` is
    [width, height] in pixels and scales both boxes, which changes the IoU by rounding only.
    paper: parser "legacy" (CoIN, SEFE) or "prism". strict: exactly four numbers in order.
    """

    name: ClassVar[str] = "grounding"

    def __init__(self, *, mode: Mode = "strict", parser: Parser = "legacy", threshold: float = 0.5) -> None:
        super().__init__(mode=mode)
        if parser not in ("legacy", "prism"):
            raise ConfigError(f"{self.name}: parser is {parser!r}; expected 'legacy' or 'prism'.")
        if not 0.0 <= threshold < 1.0:
            raise ConfigError(f"{self.name}: threshold is {threshold}; expected 0 up to, not including, 1.")
        self.parser: Parser = parser
        self.threshold = threshold

    def parse(self, text: str, *, prediction: bool) -> Box | None:
        """The box in `text` by this scorer's parser, or None."""
        if self.mode == "strict":
            return parse_strict(text)
        return parse_legacy(text, prediction=prediction) if self.parser == "legacy" else parse_prism(text)

    def value(self, overlap: float) -> float:
        """Credit for an IoU (0..1): 1 above the threshold, else 0."""
        return float(overlap > self.threshold)

    def compare(self, prediction: str, references: Sequence[str], meta: Mapping[str, Any]) -> Score:
        """Credit for the IoU of the two boxes; 0 without a predicted box, None without a gold one."""
        gold = self.parse(references[0], prediction=False)
        if gold is None:
            return Score(value=None, evidence=f"gold box {shown(references[0])} cannot be read")
        found = self.parse(prediction, prediction=True)
        if found is None:
            return Score(value=0.0, evidence=f"{UNPARSABLE} in {shown(prediction)}")
        scale = _scale(meta.get("size"))
        overlap = iou(_scaled(found, scale), _scaled(gold, scale))
        return Score(value=self.value(overlap), evidence=f"IoU {overlap:.4f} of {found} with {gold}")

    def figures(self, scores: Sequence[Score], metas: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
        """How many predictions held no box."""
        del metas
        return {"unparsable": sum(score.evidence.startswith(UNPARSABLE) for score in scores)}


class Iou(Grounding):
    """Mean intersection over union itself; the same parsers, no threshold."""

    name: ClassVar[str] = "iou"

    def __init__(self, *, mode: Mode = "strict", parser: Parser = "legacy") -> None:
        super().__init__(mode=mode, parser=parser)

    def value(self, overlap: float) -> float:
        """The IoU itself, 0..1."""
        return overlap


def _scale(size: Any) -> float:
    if isinstance(size, Sequence) and not isinstance(size, str) and size:
        return float(max(size))
    return 1.0


def _scaled(box: Box, scale: float) -> Box:
    return (box[0] * scale, box[1] * scale, box[2] * scale, box[3] * scale)
