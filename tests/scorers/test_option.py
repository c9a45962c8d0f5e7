"""Each fork's reading of an option letter, and the strict one."""

from __future__ import annotations

import pytest

from holdfast import scorers
from holdfast.errors import ConfigError
from holdfast.scorers.option import OptionLetter

CHOICES = ["iron", "copper", "gold"]


@pytest.mark.parametrize(
    ("text", "coin", "sefe", "strict"),
    [
        ("B", "B", "B", "B"),
        ("B. copper", "B", "B", "B"),
        ("b", "B", None, "B"),
        ("(B)", "B", None, "B"),
        ("The answer is B.", "B", "B", "B"),
        ("The answer is B", "B", None, "B"),  # the pattern wants one more character
        ("The answer is B. The answer is C.", "B", None, None),
        ("This is a dog", "A", None, None),
        ("copper", None, None, "B"),
        ("I think it is 3", "I", None, None),
        ("A dog", "A", None, None),
        ("", None, None, None),
        ("Answer: (C)", "C", None, "C"),
        ("The answer is a dog", "A", None, None),
        ("The answer is a", "A", None, "A"),
        ("Option B, not C", "B", None, "B"),
        ("Option B or option C", "B", None, None),
    ],
)
def test_every_rule_reads_the_letter_its_own_way(
    text: str, coin: str | None, sefe: str | None, strict: str | None
) -> None:
    assert OptionLetter(mode="paper", rule="coin").letter(text, CHOICES) == coin
    assert OptionLetter(mode="paper", rule="sefe").letter(text, CHOICES) == sefe
    assert OptionLetter(mode="paper", rule="prism").letter(text, CHOICES) == sefe
    assert OptionLetter(mode="strict").letter(text, CHOICES) == strict


def test_a_letter_beyond_the_choices_is_wrong() -> None:
    for mode in ("paper", "strict"):
        score = scorers.get("option_letter", mode).score("E", ["E"], {"choices": CHOICES})  # type: ignore[arg-type]
        assert score.value == 0.0
    assert "none of 3 choices" in scorers.get("option_letter", "paper").score("E", ["E"], {"choices": CHOICES}).evidence


def test_a_character_whose_upper_case_is_two_letters_is_no_option() -> None:
    assert scorers.get("option_letter", "paper").score("ß", ["A"], {"choices": CHOICES}).value == 0.0


def test_image_accuracy_is_that_of_the_questions_with_an_image() -> None:
    metas = [{"has_image": True}, {"has_image": False}, {"prompt": "<image>\nWhich?"}]
    value, _, figures = scorers.get("option_letter", "paper").aggregate(["A", "B", "B"], [["A"], ["B"], ["A"]], metas)
    assert value == pytest.approx(2 / 3)
    assert (figures["image_n"], figures["image_accuracy"]) == (2, 0.5)


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected 'coin', 'sefe', 'prism'"):
        scorers.get("option_letter", "paper", rule="hide")
