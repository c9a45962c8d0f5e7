"""The scorer whose corpus value is the mean of its samples: all but captions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from holdfast.errors import DataError
from holdfast.scorers.base import Missing, Mode, Score

NO_GOLD = "no gold answer"


class SampleScorer(ABC):
    """Scores one prediction at a time. A sample that cannot be scored has value None and is left out of the mean.

    An unparsable *prediction* is wrong (0); an unusable *gold* leaves the sample unscored, because no model could be
    right on it. Both are counted: `unscored` in the aggregate's extras, the reason in each Score's evidence.
    """

    name: ClassVar[str]

    def __init__(self, *, mode: Mode = "strict") -> None:
        self.mode: Mode = mode

    @property
    def missing(self) -> Missing:
        """What a gold item without a prediction is worth: published scripts walk over the predictions they find."""
        return "wrong" if self.mode == "strict" else "left out"

    @property
    def counts_unknown(self) -> bool:
        """Whether predictions of no gold item are in the denominator."""
        return False

    @abstractmethod
    def compare(self, prediction: str, references: Sequence[str], meta: Mapping[str, Any]) -> Score:
        """Score of a prediction; `references` holds at least one gold answer."""

    def score(self, prediction: str, references: Sequence[str], meta: Mapping[str, Any] | None = None) -> Score:
        """Value in 0..1 with its evidence, or None with the reason. Raises TypeError: `references` is one string."""
        if isinstance(references, str):
            raise TypeError("references is one string; expected a sequence of strings, such as (answer,)")
        if not references:
            return Score(value=None, evidence=NO_GOLD)
        return self.compare(prediction, references, meta or {})

    def aggregate(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        metas: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[float | None, list[Score], dict[str, Any]]:
        """(mean over the scored samples or None, every Score in order, {"n", "scored", "unscored", ...})."""
        scores = score_all(self, predictions, references, metas)
        values = [score.value for score in scores if score.value is not None]
        figures = {"n": len(scores), "scored": len(values), "unscored": len(scores) - len(values)}
        return (sum(values) / len(values) if values else None), scores, figures | self.figures(scores, metas)

    def figures(self, scores: Sequence[Score], metas: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
        """Further figures of a benchmark (a subset's accuracy, ...)."""
        del scores, metas
        return {}


def score_all(
    scorer: SampleScorer,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    metas: Sequence[Mapping[str, Any]] | None,
) -> list[Score]:
    """One Score per prediction. Raises DataError when the lists differ in length."""
    check_lengths(predictions, references, metas)
    rows = metas if metas is not None else [{}] * len(predictions)
    return [scorer.score(p, r, m) for p, r, m in zip(predictions, references, rows, strict=True)]


def check_lengths(
    predictions: Sequence[str], references: Sequence[Sequence[str]], metas: Sequence[Mapping[str, Any]] | None
) -> None:
    """Raises DataError when predictions, references and metas are not one per sample."""
    lengths = {"predictions": len(predictions), "references": len(references)}
    if metas is not None:
        lengths["metas"] = len(metas)
    if len(set(lengths.values())) > 1:
        raise DataError(f"expected one of each per sample, found {lengths}.")
