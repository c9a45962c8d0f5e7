"""ANLS: average normalised Levenshtein similarity of document answers, with and without its usual threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from rapidfuzz.distance import Levenshtein

from holdfast.errors import ConfigError
from holdfast.scorers.base import Mode, Score
from holdfast.scorers.match import shown
from holdfast.scorers.sample import SampleScorer


def similarity(prediction: str, gold: str) -> float:
    """1 - lev / max length in 0..1; 1 when both are empty, 0 when one is."""
    if not prediction or not gold:
        return float(prediction == gold)
    return 1.0 - Levenshtein.distance(prediction, gold) / max(len(prediction), len(gold))


class Anls(SampleScorer):
    """Best similarity over the gold answers, lower-cased and stripped.

    paper: TriGap's DocVQA and InfographicVQA, which apply no threshold (threshold 0) and leave inner white space alone.
    strict: the metric as defined (Biten et al. 2019; lmms-eval): inner white space collapsed, below 0.5 counts as 0.
    The two differ by several points; `threshold` overrides either, and the figures name the one in use.
    """

    name: ClassVar[str] = "anls"

    def __init__(self, *, mode: Mode = "strict", threshold: float | None = None) -> None:
        super().__init__(mode=mode)
        self.threshold = threshold if threshold is not None else (0.0 if mode == "paper" else 0.5)
        if not 0.0 <= self.threshold <= 1.0:
            raise ConfigError(f"anls: threshold is {self.threshold}; expected 0 to 1.")

    def _key(self, text: str) -> str:
        return " ".join(text.lower().split()) if self.mode == "strict" else text.strip().lower()

    def compare(self, prediction: str, references: Sequence[str], meta: Mapping[str, Any]) -> Score:
        """Similarity to the closest gold answer, 0 below the threshold."""
        del meta
        found = self._key(prediction)
        best, gold = max((similarity(found, self._key(gold)), -i) for i, gold in enumerate(references))
        closest = references[-gold]
        value = best if best >= self.threshold else 0.0
        cut = f", below the threshold {self.threshold}" if value != best else ""
        return Score(value=value, evidence=f"similarity {best:.4f} to {shown(closest)}{cut}")

    def figures(self, scores: Sequence[Score], metas: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
        """The threshold, so that the two variants are never taken for one another."""
        del scores, metas
        return {"threshold": self.threshold}
