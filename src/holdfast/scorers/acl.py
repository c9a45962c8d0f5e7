"""MLLM-ACL: the abilities of MLLM-CL (reading text, mathematics, visual perception), one rule each.

The fourth, GUI agent, is one option letter a question (`exact_match`); its gold answers are at MMT-Bench's server.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from holdfast.scorers.base import Mode, Score
from holdfast.scorers.match import contains_words, shown
from holdfast.scorers.option import OptionLetter
from holdfast.scorers.sample import SampleScorer

FORMULA = "Handwritten Mathematical Expression Recognition"
SPELLED_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_SIGNS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
UNSETTLED = "not settled without a language model"


class _Grouped(SampleScorer):
    """Containment with the accuracy of each group of questions beside it."""

    key: ClassVar[str]
    heading: ClassVar[str]

    def figures(self, scores: Sequence[Score], metas: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
        """Accuracy and number of the questions of each group that the test file names."""
        groups: dict[str, list[float]] = defaultdict(list)
        for score, meta in zip(scores, metas or (), strict=metas is not None):
            if score.value is not None and meta.get(self.key):
                groups[str(meta[self.key])].append(score.value)
        return {self.heading: {name: {"n": len(v), "value": sum(v) / len(v)} for name, v in sorted(groups.items())}}


class AclOcr(_Grouped):
    """OCR (OCRBench): a gold text occurs in the reply, line breaks dropped.

    paper: lower-cased, as a substring; handwritten formulas (`answer_type`) without their spaces, letter case kept.
    The published figure is the number of right ones over ten, which for OCRBench's 1,000 questions is this value in
    percent. strict: as whole words, formulas as in paper, and an empty gold text does not count.
    """

    name: ClassVar[str] = "acl_ocr"
    key: ClassVar[str] = "answer_type"
    heading: ClassVar[str] = "categories"

    def compare(self, prediction: str, references: Sequence[str], meta: Mapping[str, Any]) -> Score:
        """1 where one of the gold texts occurs in the reply, else 0."""
        formula = meta.get("answer_type") == FORMULA
        for gold in references:
            if formula:
                found = _bare(gold, " ", "\n") in _bare(prediction, " ", "\n")
            elif self.mode == "paper":
                found = _bare(gold.lower(), "\n") in _bare(prediction.lower(), "\n")
            else:
                found = contains_words(prediction, gold)
            if found and (self.mode == "paper" or gold.strip()):
                return Score(value=1.0, evidence=f"{shown(gold)} found in {shown(prediction)}")
        return Score(value=0.0, evidence=f"no gold text found in {shown(prediction)}")


class AclPerception(_Grouped):
    """VP (CV-Bench): the gold answer occurs in the reply, both lower-cased and without blanks and full stops.

    paper: as a substring of the rest, so "1" is found in "12". strict: as whole words.
    The accuracy of each `task` is beside it; the published tables use that of "Count".
    """

    name: ClassVar[str] = "acl_vp"
    key: ClassVar[str] = "task"
    heading: ClassVar[str] = "tasks"

    def compare(self, prediction: str, references: Sequence[str], meta: Mapping[str, Any]) -> Score:
        """1 where the gold answer occurs in the reply, else 0."""
        del meta
        for gold in references:
            if self.mode == "paper":
                target, text = (_bare(part.lower(), " ", "\n", ".") for part in (gold, prediction))
                found = target in text
            else:
                found = contains_words(prediction, gold.strip().rstrip("."))
            if found:
                return Score(value=1.0, evidence=f"{shown(gold)} found in {shown(prediction)}")
        return Score(value=0.0, evidence=f"no gold answer found in {shown(prediction)}")


class AclMath(SampleScorer):
    """Math (MathVista): the option or the number that a reply names.

    The published script lets a language model extract answers from replies that it cannot settle itself. paper: what
    it settles itself; the rest counts as wrong, so the value is a lower bound of the published one, and
    `figures["unsettled"]` says of how many. strict: no service either; a marked option, or the last number of the
    reply, rounded as the gold answer is written.
    """

    name: ClassVar[str] = "acl_math"

    def __init__(self, *, mode: Mode = "strict") -> None:
        super().__init__(mode=mode)
        self._letters = OptionLetter(mode="strict")

    def compare(self, prediction: str, references: Sequence[str], meta: Mapping[str, Any]) -> Score:
        """1 where the reply names the gold answer, else 0."""
        gold = references[0].strip()
        choices = meta.get("choices")
        if isinstance(choices, list) and choices:
            texts = [str(choice) for choice in choices]
            target = _option_of(gold, texts)
            if target is None:
                return Score(value=None, evidence=f"gold answer {shown(gold)} is none of {len(texts)} choices")
            paper = self.mode == "paper"
            found = _settled_option(prediction, texts) if paper else self._letters.letter(prediction, texts)
            if found is None:
                return Score(value=0.0, evidence=f"no option in {shown(prediction)}" + (f": {UNSETTLED}" * paper))
            return Score(value=float(found == target), evidence=f"{found} read from {shown(prediction)}, gold {target}")
        if self.mode == "paper":
            right = _same_number(prediction, gold)
            why = f"{shown(prediction)} is {gold}" if right else f"{shown(prediction)}: {UNSETTLED}"
            return Score(value=float(right), evidence=why)
        numbers = [number.replace(",", "") for number in _NUMBER.findall(prediction)]
        if _NUMBER.fullmatch(gold) and numbers:
            places = len(gold.partition(".")[2])
            value = float(round(float(numbers[-1]), places) == round(float(gold.replace(",", "")), places))
            return Score(value=value, evidence=f"{numbers[-1]} read from {shown(prediction)}, gold {shown(gold)}")
        return Score(
            value=float(contains_words(prediction, gold)), evidence=f"{shown(gold)} looked for in {shown(prediction)}"
        )

    def figures(self, scores: Sequence[Score], metas: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
        """How many replies the published script would give to a language model (they count as wrong here)."""
        del metas
        return {"unsettled": sum(score.evidence.endswith(UNSETTLED) for score in scores)}


def _bare(text: str, *left_out: str) -> str:
    text = text.strip()
    for part in left_out:
        text = text.replace(part, "")
    return text


def _option_of(gold: str, texts: Sequence[str]) -> str | None:
    """The letter of a gold answer, which is one itself or the text of a choice."""
    for letter, text in zip(SPELLED_LETTERS, texts, strict=False):
        if text.strip() == gold:
            return letter
    return gold.upper() if len(gold) == 1 and gold.upper() in SPELLED_LETTERS[: len(texts)] else None


def _settled_option(reply: str, texts: Sequence[str]) -> str | None:
    """The only option letter that stands alone in a reply, else the only choice whose text occurs in it."""
    letters = SPELLED_LETTERS[: len(texts)]
    words = set(reply.translate(_SIGNS).split())
    named = [letter for letter in letters if letter in words]
    if len(named) == 1:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    held = [letter for letter, text in zip(letters, texts, strict=False) if text.lower() in reply.lower()]
    return held[0] if len(held) == 1 else None


def _same_number(reply: str, gold: str) -> bool:
    """Whether a whole reply is the gold number, read as an integer where the gold is one."""
    read = int if re.fullmatch(r"[-+]?\d+", gold) else float
    try:
        return read(reply) == read(gold)
    except ValueError:
        return False
