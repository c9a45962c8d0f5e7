"""A score never travels without its evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Mode = Literal["paper", "strict"]
# What a gold item without a prediction is worth in a scored file.
Missing = Literal["wrong", "left out", "an empty caption"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """value in 0..1, or None when the sample could not be scored; evidence: what was compared, in words."""

    value: float | None
    evidence: str = ""


class Scorer(Protocol):
    name: str
    mode: Mode

    def score(self, prediction: str, references: Sequence[str], meta: Mapping[str, Any] | None = None) -> Score:
        """Value in 0..1 with its evidence; None, with the reason, where the sample cannot be scored."""
        ...

    def aggregate(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        metas: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[float | None, list[Score], dict[str, Any]]:
        """Corpus value in 0..1, per-sample scores (None values for corpus-only metrics), extra figures."""
        ...
