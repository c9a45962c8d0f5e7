"""Which option letter does an answer name? Each fork of CoIN has its own reading of ScienceQA's replies."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from holdfast.errors import ConfigError
from holdfast.scorers.base import Missing, Mode, Score
from holdfast.scorers.match import shown
from holdfast.scorers.sample import SampleScorer

Rule = Literal["coin", "sefe", "prism"]
RULES: tuple[Rule, ...] = ("coin", "sefe", "prism")
LETTERS = "ABCDE"  # the forks know five options

_LONE_WORD_CHARACTER = re.compile(r"\b(\w)\b")
_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")
_MARKED_LETTER = re.compile(
    r"(?:\banswer\s*(?:is|:)\s*(?:option\s*)?|\boption\s+|^)\(?([A-Za-z])\)?(?=[.):,\s]|$)", re.IGNORECASE
)


class OptionLetter(SampleScorer):
    """Accuracy of the option letter that a reply names (gold: a letter; `meta["choices"]`: the options' texts).

    paper, both rules: (1) the whole reply is a letter A-E; (2) it starts with "X. "; then
    rule "coin" (CoIN's own script): (3) the first stand-alone word character anywhere, upper-cased, so "This is a dog"
    names A; rules "sefe" (SEFE, HiDe-LLaVA) and "prism": (3) "The answer is X" followed by any one character, if it
    occurs exactly once. Otherwise wrong. A letter beyond the number of choices is wrong.
    The rules divide by different numbers where a file does not answer every problem: "coin" and "prism" by that of the
    problems, "sefe" by that of the predictions (one per id, ids of no problem included).
    strict: a letter alone or marked ("(B)", "B.", "answer: B", "option B"), or the text of exactly one option; a reply
    that names two letters is wrong; any letter that the choices reach is read, not only A-E.
    """

    name: ClassVar[str] = "option_letter"

    def __init__(self, *, mode: Mode = "strict", rule: Rule = "coin") -> None:
        super().__init__(mode=mode)
        if rule not in RULES:
            raise ConfigError(f"option_letter: rule is {rule!r}; expected {', '.join(map(repr, RULES))}.")
        self.rule: Rule = rule

    @property
    def missing(self) -> Missing:
        """What a problem without a prediction is worth."""
        return "left out" if self.mode == "paper" and self.rule == "sefe" else "wrong"

    @property
    def counts_unknown(self) -> bool:
        """Whether predictions of no problem are in the denominator (`len(predictions)` of SEFE and HiDe-LLaVA)."""
        return self.missing == "left out"

    def letter(self, prediction: str, choices: Sequence[str] | None = None) -> str | None:
        """The letter that `prediction` names, or None."""
        if self.mode == "strict":
            return _strict_letter(prediction, choices)
        if prediction and prediction in LETTERS and len(prediction) == 1:
            return prediction
        if len(prediction) >= 3 and prediction[0] in LETTERS and prediction[1:3] == ". ":
            return prediction[0]
        if self.rule == "coin":
            lone = _LONE_WORD_CHARACTER.search(prediction)
            return lone.group(1).upper() if lone else None
        named = _ANSWER_IS.findall(prediction)
        return named[0] if len(named) == 1 else None

    def compare(self, prediction: str, references: Sequence[str], meta: Mapping[str, Any]) -> Score:
        """1 where the letter named is the gold one, else 0; None where the gold answer is no letter."""
        choices = meta.get("choices")
        found = self.letter(prediction, choices)
        gold = references[0].strip().upper()
        if found is None:
            return Score(value=0.0, evidence=f"no option letter in {shown(prediction)}")
        # Upper case may take two characters ("ß"), which is no option's letter either.
        if choices and not (len(found) == 1 and 0 <= ord(found) - ord("A") < len(choices)):
            return Score(value=0.0, evidence=f"{found} read from {shown(prediction)} is none of {len(choices)} choices")
        return Score(
            value=float(found == gold), evidence=f"{found} read from {shown(prediction)}, gold {shown(references[0])}"
        )

    def figures(self, scores: Sequence[Score], metas: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
        """The accuracy on questions with an image ("IMG-accuracy")."""
        rows = zip(scores, metas or (), strict=metas is not None)
        values = [score.value for score, meta in rows if score.value is not None and _has_image(meta)]
        return {"image_n": len(values), "image_accuracy": sum(values) / len(values) if values else None}


def _has_image(meta: Mapping[str, Any]) -> bool:
    return bool(meta.get("has_image") or meta.get("image") or "<image>" in str(meta.get("prompt", "")))


def _strict_letter(prediction: str, choices: Sequence[str] | None) -> str | None:
    text = prediction.strip()
    reach = len(choices) if choices else len(LETTERS)
    allowed = {chr(ord("A") + i) for i in range(min(reach, 26))}
    if (bare := text.strip("().: ")).upper() in allowed:
        return bare.upper()
    if choices:
        exact = [
            i for i, choice in enumerate(choices) if choice.strip().rstrip(".").lower() == text.rstrip(".").lower()
        ]
        if len(exact) == 1:
            return chr(ord("A") + exact[0])
    # "A dog" opens with an article, not an option: an unmarked opening letter must carry a sign.
    named = set()
    for match in _MARKED_LETTER.finditer(text):
        opening = match.start() == 0 and not match.group(0).lower().startswith(("answer", "option"))
        if opening and not re.match(r"\(?[A-Za-z][).:,]", text):
            continue
        if match.group(1) == "a" and re.match(r"\s+\w", text[match.end() :]):
            continue  # "the answer is a dog"
        named.add(match.group(1).upper())
    return named.pop() if len(named) == 1 and named <= allowed else None
