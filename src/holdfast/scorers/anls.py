"""ANLS: average normalised Levenshtein similarity of document answers, with and without its usual threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from rapidfuzz.distance import Levenshtein

from holdfast.errors import ConfigError
from holdfast.scorers.base import Mode, Score
from holdfast.scorers.match import shown
from holdfast.scorers.sample import SampleScorer


def similarity(prediction: str, gold: str, *, longest: int | None = None) -> float:
    """1 - lev / max length in 0..1; 1 when both are empty.

    longest: the length to divide by, where it is not that of these texts (they were lower-cased or stripped since).
    """
    longest = max(len(prediction), len(gold)) if longest is None else longest
    return max(0.0, 1.0 - Levenshtein.distance(prediction, gold) / longest) if longest else 1.0


class Anls(SampleScorer):
    """Best similarity over the gold answers, lower-cased and stripped.

    paper: TriGap's DocVQA and InfographicVQA (Prism's evaluator), which apply no threshold (threshold 0), leave inner
    white space alone and divide by the longer text as it was before lower-casing.
    strict: the metric as defined (Biten et al. 2019) and as the challenge's own script, Qwen-VL and lmms-eval compute
    it: inner white space collapsed, below 0.5 counts as 0. They divide by the longer text in upper case with all its
    white space, so blanks around an answer soften a difference; so does this.
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

    def _length(self, text: str) -> int:
        # Lower and upper case may have another length than the text ("İ", "ß"); each script has its own idea.
        return len(text.upper()) if self.mode == "strict" else len(text.strip())

    def compare(self, prediction: str, references: Sequence[str], meta: Mapping[str, Any]) -> Score:
        """Similarity to the closest gold answer, 0 below the threshold."""
        del meta
        found, length = self._key(prediction), self._length(prediction)
        best, gold = max(
            (similarity(found, self._key(gold), longest=max(length, self._length(gold))), -i)
            for i, gold in enumerate(references)
        )
        closest = references[-gold]
        value = best if best >= self.threshold else 0.0
        cut = f", below the threshold {self.threshold}" if value != best else ""
        return Score(value=value, evidence=f"similarity {best:.4f} to {shown(closest)}{cut}")

    def figures(self, scores: Sequence[Score], metas: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
        """The threshold, so that the two variants are never taken for one another."""
        del scores, metas
        return {"threshold": self.threshold}
