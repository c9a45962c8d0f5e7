"""Rules that compare strings: equality and containment."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from holdfast.scorers.base import Mode, Score
from holdfast.scorers.sample import SampleScorer


def shown(text: str, limit: int = 80) -> str:
    """A text for evidence: quoted and cut."""
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")


class ExactMatch(SampleScorer):
    """Equality after upper-casing ("exact-upper": UCIT, TriGap, CoIN's VizWiz and VQAv2).

    paper: `pred.upper() == answer.upper()`, nothing else normalised. strict: surrounding white space is ignored too.
    strip: decides that apart from the mode (Prism, whose numbers TriGap's are, strips). Any one of several gold answers
    suffices.
    """

    name: ClassVar[str] = "exact_match"

    def __init__(self, *, mode: Mode = "strict", strip: bool | None = None) -> None:
        super().__init__(mode=mode)
        self.strip = mode == "strict" if strip is None else strip

    def _key(self, text: str) -> str:
        return (text.strip() if self.strip else text).upper()

    def compare(self, prediction: str, references: Sequence[str], meta: Mapping[str, Any]) -> Score:
        """1 where the prediction equals one of the gold answers, else 0."""
        del meta
        found = self._key(prediction)
        for gold in references:
            if found == self._key(gold):
                return Score(value=1.0, evidence=f"{shown(prediction)} equals {shown(gold)}")
        return Score(value=0.0, evidence=f"{shown(prediction)} is not {' or '.join(shown(g) for g in references[:10])}")


def contains_words(text: str, part: str) -> bool:
    """Whether `part` stands in `text` as whole words, letter case and the amount of white space ignored."""
    haystack, needle = " ".join(text.split()).lower(), " ".join(part.split()).lower()
    if not needle:
        return False
    # Not \b: a gold answer may begin or end with a sign, such as "$5" or "50%".
    return re.search(rf"(?<!\w){re.escape(needle)}(?!\w)", haystack) is not None


class Containment(SampleScorer):
    """The gold answer occurs in the prediction.

    paper: as a substring, case ignored (so "no" is found in "know"). strict: as whole words.
    """

    name: ClassVar[str] = "containment"

    def __init__(self, *, mode: Mode = "strict") -> None:
        super().__init__(mode=mode)

    def compare(self, prediction: str, references: Sequence[str], meta: Mapping[str, Any]) -> Score:
        """1 where one of the gold answers occurs in the prediction, else 0."""
        del meta
        for gold in references:
            found = gold.lower() in prediction.lower() if self.mode == "paper" else contains_words(prediction, gold)
            if found:
                return Score(value=1.0, evidence=f"{shown(gold)} found in {shown(prediction)}")
        return Score(value=0.0, evidence=f"no gold answer found in {shown(prediction)}")


class TwoWayContainment(SampleScorer):
    """CoIN's ImageNet rule: the gold label occurs in the prediction, or the prediction in the gold label.

    paper (parity): substrings, case-sensitive; an empty prediction occurs in every label and therefore scores 1.
    strict: whole words, case ignored, and the prediction must hold at least one letter or digit.
    """

    name: ClassVar[str] = "imagenet"

    def __init__(self, *, mode: Mode = "strict") -> None:
        super().__init__(mode=mode)

    def compare(self, prediction: str, references: Sequence[str], meta: Mapping[str, Any]) -> Score:
        """1 where a gold label and the prediction contain one another, either way, else 0."""
        del meta
        if self.mode == "strict" and not any(character.isalnum() for character in prediction):
            return Score(value=0.0, evidence=f"empty prediction {shown(prediction)}")
        for gold in references:
            if self.mode == "paper":
                forward, backward = gold in prediction, prediction in gold
            else:
                forward, backward = contains_words(prediction, gold), contains_words(gold, prediction)
            if forward or backward:
                where = "found in the prediction" if forward else "holds the prediction"
                return Score(value=1.0, evidence=f"{shown(gold)} {where} {shown(prediction)}")
        return Score(value=0.0, evidence=f"{shown(prediction)} and {shown(references[0])} do not contain one another")


class OcrVqa(SampleScorer):
    """CoIN's OCRVQA rule: equality of lower-cased texts; a prediction that says "Unanswerable" is wrong.

    paper: nothing else normalised, "Unanswerable" matched with its capital. strict: outer white space ignored,
    "unanswerable" in any case is wrong unless it is the gold answer.
    """

    name: ClassVar[str] = "ocrvqa"

    def __init__(self, *, mode: Mode = "strict") -> None:
        super().__init__(mode=mode)

    def compare(self, prediction: str, references: Sequence[str], meta: Mapping[str, Any]) -> Score:
        """1 where the lower-cased texts are equal, else 0."""
        del meta
        if self.mode == "paper" and "Unanswerable" in prediction:
            return Score(value=0.0, evidence=f'{shown(prediction)} says "Unanswerable"')
        strip = str.strip if self.mode == "strict" else str
        for gold in references:
            if strip(prediction).lower() == strip(gold).lower():
                return Score(value=1.0, evidence=f"{shown(prediction)} equals {shown(gold)}")
        return Score(value=0.0, evidence=f"{shown(prediction)} is not {shown(references[0])}")


class Gqa(SampleScorer):
    """GQA's accuracy: trailing full stops dropped, lower-cased, then equality; balanced questions only.

    A question whose annotation says `isBalanced: false` is unscored, as in the official script.
    paper: nothing else is normalised (a leading blank counts, as in CoIN's, SEFE's and HiDe-LLaVA's conversion), and
    the gold answer is taken as it is. strict: outer white space ignored and the gold answer lower-cased too.
    """

    name: ClassVar[str] = "gqa"

    def __init__(self, *, mode: Mode = "strict") -> None:
        super().__init__(mode=mode)

    def compare(self, prediction: str, references: Sequence[str], meta: Mapping[str, Any]) -> Score:
        """1 where the answer is a gold answer, else 0; None for a question that is not balanced."""
        if meta.get("isBalanced") is False:
            return Score(value=None, evidence="not a balanced question")
        if self.mode == "paper":
            found = prediction.rstrip(".").lower()
            golds = list(references)
        else:
            found = prediction.strip().rstrip(".").strip().lower()
            golds = [gold.strip().lower() for gold in references]
        if found in golds:
            return Score(value=1.0, evidence=f"{shown(found)} is the gold answer")
        return Score(value=0.0, evidence=f"{shown(found)} is not {shown(golds[0])}")
