"""MLLM-DCL: one rule per domain (remote sensing, medicine, driving, science, finance)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from holdfast.scorers.base import Mode, Score
from holdfast.scorers.match import contains_words, shown
from holdfast.scorers.sample import SampleScorer

# Questions of these sources have one short answer; the rest of the science domain is MapQA.
EQUALITY_SOURCES = ("AI2D", "TQA", "VQA", "SciVerse")


class DclScorer(SampleScorer):
    """What the five rules share: both texts lower-cased, a prediction that says "Unanswerable" is wrong."""

    def __init__(self, *, mode: Mode = "strict") -> None:
        super().__init__(mode=mode)

    def compare(self, prediction: str, references: Sequence[str], meta: Mapping[str, Any]) -> Score:
        """Best score over the gold answers; 0 for a prediction that says "Unanswerable"."""
        if "Unanswerable" in prediction and (self.mode == "paper" or "Unanswerable" not in " ".join(references)):
            return Score(value=0.0, evidence=f'{shown(prediction)} says "Unanswerable"')
        return max(
            (self.rule(prediction.lower(), gold.lower(), meta) for gold in references),
            key=lambda score: -1.0 if score.value is None else score.value,
        )

    def rule(self, found: str, gold: str, meta: Mapping[str, Any]) -> Score:
        """Score of one lower-cased prediction against one lower-cased gold answer.

        Raises: NotImplementedError: a subclass gives the rule.
        """
        raise NotImplementedError


class DclContainment(DclScorer):
    """Medicine (PathVQA). paper: gold is a substring. strict: gold stands as whole words."""

    name: ClassVar[str] = "dcl_med"

    def rule(self, found: str, gold: str, meta: Mapping[str, Any]) -> Score:
        """1 where the gold answer occurs in the prediction, else 0."""
        del meta
        right = gold in found if self.mode == "paper" else contains_words(found, gold)
        return Score(
            value=float(right), evidence=f"{shown(gold)} {'found' if right else 'not found'} in {shown(found)}"
        )


class DclShortAnswer(DclScorer):
    """Remote sensing and driving.

    paper: a gold of several words must be a substring. Otherwise full stops leave the gold; in a prediction of several
    words it must touch a space, a full stop or a comma (" g", "g ", "g.", "g,"); in a single word, be a substring.
    strict: gold without its final full stop stands as whole words.
    """

    name: ClassVar[str] = "dcl_rs"

    def rule(self, found: str, gold: str, meta: Mapping[str, Any]) -> Score:
        """1 where the gold answer occurs in the prediction, as a word where it is one word, else 0."""
        del meta
        if self.mode == "strict":
            right = contains_words(found, gold.strip().rstrip("."))
        elif " " in gold:
            right = gold in found
        else:
            gold = gold.replace(".", "")
            if " " in found:
                right = any(form in found for form in (f" {gold}", f"{gold} ", f"{gold}.", f"{gold},"))
            else:
                right = gold in found
        return Score(
            value=float(right), evidence=f"{shown(gold)} {'found' if right else 'not found'} in {shown(found)}"
        )


class DclDriving(DclShortAnswer):
    """Autonomous driving: the rule of remote sensing under its own name, so that a record names the domain."""

    name: ClassVar[str] = "dcl_ad"


class DclScience(DclScorer):
    """Science: AI2D, TQA, VQA and SciVerse by equality, MapQA by containment, its "Which states" by shared items.

    The source is the image's file name up to "_" (`meta["source"]`, or `meta["image"]`), the question
    `meta["prompt"]`; a sample without a source is unscored.
    paper: items are split at "," and not stripped, and score = found gold items / gold items, so naming every state
    scores 1. strict: items are stripped, score = shared / all items named (Jaccard); equality ignores outer space and
    a final full stop; containment means whole words.
    """

    name: ClassVar[str] = "dcl_sci"

    def rule(self, found: str, gold: str, meta: Mapping[str, Any]) -> Score:
        """By the image's source: equality, the share of listed states, or containment; None for an unknown source."""
        source = meta.get("source") or _source(meta.get("image"))
        if source is None:
            return Score(value=None, evidence="the image's source (AI2D, TQA, VQA, SciVerse or MapQA) is unknown")
        strict = self.mode == "strict"
        if source in EQUALITY_SOURCES:
            if strict:
                found, gold = found.strip().rstrip("."), gold.strip().rstrip(".")
            return Score(value=float(found == gold), evidence=f"{source}: {shown(found)} against {shown(gold)}")
        if "Which states" in str(meta.get("prompt", "")):
            golds, named = gold.split(","), found.split(",")
            if strict:
                wanted, given = ({part.strip().rstrip(".") for part in parts} - {""} for parts in (golds, named))
                value = len(wanted & given) / len(wanted | given) if wanted | given else 0.0
                hits = len(wanted & given)
            else:
                hits = sum(part in named for part in golds)
                value = hits / len(golds)
            return Score(value=value, evidence=f"MapQA: {hits} of {len(golds)} items in {shown(found)}")
        right = contains_words(found, gold) if strict else gold in found
        return Score(
            value=float(right), evidence=f"MapQA: {shown(gold)} {'found' if right else 'not found'} in {shown(found)}"
        )


class DclFinance(DclScorer):
    """Finance (FinVis). paper: spaces and full stops leave the prediction only, then equality. strict: leave both."""

    name: ClassVar[str] = "dcl_fin"

    def rule(self, found: str, gold: str, meta: Mapping[str, Any]) -> Score:
        """1 where the texts are equal without spaces and full stops, else 0."""
        del meta
        key = found.replace(" ", "").replace(".", "")
        target = gold.replace(" ", "").replace(".", "") if self.mode == "strict" else gold
        return Score(value=float(key == target), evidence=f"{shown(key)} against {shown(target)}")


def _source(image: Any) -> str | None:
    return image.replace("\\", "/").rsplit("/", 1)[-1].split("_")[0] if isinstance(image, str) and image else None
