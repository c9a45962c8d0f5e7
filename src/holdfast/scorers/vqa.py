"""VQA soft accuracy as Pythia/M4C computes it (EvalAI's answer processor), quirks included; TextVQA's official rule."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

from holdfast.scorers.base import Mode, Score
from holdfast.scorers.match import shown
from holdfast.scorers.sample import SampleScorer

PUNCTUATION = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!")
ARTICLES = frozenset(("a", "an", "the"))
NUMBERS = {
    word: str(value)
    for value, word in enumerate("zero one two three four five six seven eight nine ten".split())  # noqa: SIM905
} | {"none": "0"}

# The list's words as they should be written. Its keys are these words with one apostrophe left out, in turn.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # noqa: SIM905


def _contractions() -> dict[str, str]:
    table = {}
    for word in _CONTRACTED:
        for place, character in enumerate(word):
            if character == "'":
                table[word[:place] + word[place + 1 :]] = word
    # Entries of the list that break its pattern: "somebody'd" is rewritten the wrong way round.
    table["somebody'd"] = "somebodyd"
    return table


CONTRACTIONS = _contractions()
_COMMA_BETWEEN_DIGITS = re.compile(r"\d,\d")
# The look-behind of the original is mistyped, so a full stop goes unless a digit follows ("3." loses it, "3.5" not).
_FULL_STOP = re.compile(r"\.(?!\d)")
_MAX_STOPS = int(re.UNICODE)  # the original hands this flag over as a count: 32


@lru_cache(maxsize=65536)
def normalize(answer: str) -> str:
    """An answer as the metric compares it. Steps and order are the original's; see the module's constants."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    before = text  # every sign is looked for in the text before any was taken out
    glued = _COMMA_BETWEEN_DIGITS.search(before) is not None  # never: commas are gone by now
    for sign in PUNCTUATION:
        lone = glued or f"{sign} " in before or f" {sign}" in before
        text = text.replace(sign, "" if lone else " ")
    text = _FULL_STOP.sub("", text, count=_MAX_STOPS)
    words = [NUMBERS.get(word, word) for word in text.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def soft_scores(golds: Sequence[str]) -> dict[str, float]:
    """Soft accuracy of each distinct normalised gold answer, averaged over the leave-one-out sets.

    For answer u: mean over annotators i of min(1, #{others than i who said u} / 3). With fewer than four annotators
    the 3 becomes their number less one, so that full agreement can score 1.
    """
    if len(golds) == 1:
        return {golds[0]: 1.0}
    needed = min(3, len(golds) - 1)
    scores = {}
    for answer, count in Counter(golds).items():
        inside, outside = min(1.0, (count - 1) / needed), min(1.0, count / needed)
        scores[answer] = (count * inside + (len(golds) - count) * outside) / len(golds)
    return scores


class VqaSoftAccuracy(SampleScorer):
    """VQA soft accuracy over human answers.

    paper: exactly ten gold answers are required, as the original asserts; another number leaves the sample unscored.
    strict: any number of annotators. Normalisation is the same, because nobody publishes another.
    """

    name: ClassVar[str] = "vqa"

    def __init__(self, *, mode: Mode = "strict") -> None:
        super().__init__(mode=mode)

    def compare(self, prediction: str, references: Sequence[str], meta: Mapping[str, Any]) -> Score:
        """min(1, annotators who said it / 3), averaged as published; None where that is not defined."""
        del meta
        if self.mode == "paper" and len(references) != 10:
            return Score(value=None, evidence=f"{len(references)} gold answers; the published metric needs exactly 10")
        golds = [normalize(gold) for gold in references]
        found = normalize(prediction)
        value = soft_scores(golds).get(found, 0.0)
        return Score(value=value, evidence=f"{shown(found)} given by {golds.count(found)} of {len(golds)} annotators")
