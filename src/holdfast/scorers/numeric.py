"""Relaxed accuracy (ChartQA): numbers may be off by 5 %, texts must agree."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from holdfast.errors import ConfigError
from holdfast.scorers.base import Mode, Score
from holdfast.scorers.match import shown
from holdfast.scorers.sample import SampleScorer

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


class RelaxedAccuracy(SampleScorer):
    """Within `tolerance` relative to the gold number, else equality of lower-cased texts ("%" divides by 100).

    paper (Pix2Struct, lmms-eval): a gold 0 is compared as text, and nothing is stripped. strict: outer white space, a
    final full stop, a currency sign and thousands separators are ignored; a gold 0 needs exactly 0; infinite and
    undefined numbers are texts.
    """

    name: ClassVar[str] = "relaxed_accuracy"

    def __init__(self, *, mode: Mode = "strict", tolerance: float = 0.05) -> None:
        super().__init__(mode=mode)
        if not 0.0 <= tolerance < 1.0:
            raise ConfigError(f"relaxed_accuracy: tolerance is {tolerance}; expected 0 up to, not including, 1.")
        self.tolerance = tolerance

    def number(self, text: str) -> float | None:
        """The number that `text` writes, or None."""
        if self.mode == "strict":
            text = _THOUSANDS.sub("", text.strip().removesuffix(".").lstrip("$€£").strip())
        try:
            value = float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
        except ValueError:
            return None
        return value if self.mode == "paper" or math.isfinite(value) else None

    def compare(self, prediction: str, references: Sequence[str], meta: Mapping[str, Any]) -> Score:
        """1 within the tolerance of one of the gold numbers, or equal to a gold text, else 0."""
        del meta
        reasons = []
        for gold in references:
            right, reason = self._agrees(prediction, gold)
            if right:
                return Score(value=1.0, evidence=reason)
            reasons.append(reason)
        return Score(value=0.0, evidence="; ".join(reasons[:3]))

    def _agrees(self, prediction: str, gold: str) -> tuple[bool, str]:
        found, target = self.number(prediction), self.number(gold)
        if found is not None and target:
            off = abs(found - target) / abs(target)
            return off <= self.tolerance, f"{found:g} is off {target:g} by {off:.2%}"
        if self.mode == "strict":
            if found is not None and target is not None:
                return found == target, f"{found:g} against {target:g}"
            prediction, gold = prediction.strip().removesuffix("."), gold.strip().removesuffix(".")
        right = prediction.lower() == gold.lower()
        return right, f"{shown(prediction)} {'equals' if right else 'is not'} {shown(gold)}"
