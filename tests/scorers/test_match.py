"""Equality and containment rules, quirk by quirk."""

from __future__ import annotations

import pytest

from holdfast import scorers
from holdfast.errors import ConfigError, DataError, UnknownNameError


def test_exact_upper_ignores_case_only_and_strict_ignores_outer_space_too() -> None:
    paper, strict = scorers.get("exact_match", "paper"), scorers.get("exact_match")
    assert paper.score("mailBOX", ["Mailbox"]).value == 1.0
    assert paper.score("Mailbox ", ["Mailbox"]).value == 0.0
    assert strict.score("Mailbox ", ["Mailbox"]).value == 1.0
    assert strict.score("Mail box", ["Mailbox"]).value == 0.0
    assert "'Mail box' is not 'Mailbox'" in strict.score("Mail box", ["Mailbox"]).evidence
    assert strict.score("b", ["a", "B"]).value == 1.0
    assert scorers.get("exact_match", "paper", strip=True).score("Mailbox ", ["Mailbox"]).value == 1.0


def test_no_gold_is_unscored_and_never_zero() -> None:
    value, scores, figures = scorers.get("exact_match").aggregate(["a", "b", "c"], [["a"], [], ["x"]])
    assert (value, figures) == (0.5, {"n": 3, "scored": 2, "unscored": 1})
    assert scores[1].value is None and scores[1].evidence == "no gold answer"
    assert scorers.get("exact_match").aggregate(["a"], [[]])[0] is None


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(DataError, match="expected one of each per sample"):
        scorers.get("exact_match").aggregate(["a", "b"], [["a"]])
    with pytest.raises(TypeError, match="references is one string"):
        scorers.get("exact_match").score("a", "a")


def test_unknown_scorers_modes_and_options_are_named() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'exact_match'"):
        scorers.get("exactmatch")
    with pytest.raises(ConfigError, match="expected 'paper' or 'strict'"):
        scorers.get("exact_match", "papr")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="refused its options"):
        scorers.get("exact_match", threshold=1)


def test_containment_is_a_substring_in_paper_and_whole_words_in_strict() -> None:
    paper, strict = scorers.get("containment", "paper"), scorers.get("containment")
    assert paper.score("I Know", ["no"]).value == 1.0
    assert strict.score("I Know", ["no"]).value == 0.0
    assert strict.score("the answer is  No.", ["no"]).value == 1.0
    assert strict.score("it costs $5.", ["$5"]).value == 1.0
    assert strict.score("anything", [" "]).value == 0.0


def test_imagenet_rule_goes_both_ways_and_parity_keeps_its_empty_prediction_quirk() -> None:
    paper, strict = scorers.get("imagenet", "paper"), scorers.get("imagenet")
    assert paper.score("a German shepherd dog", ["German shepherd"]).value == 1.0
    assert paper.score("shepherd", ["German shepherd"]).value == 1.0
    assert paper.score("german shepherd", ["German shepherd"]).value == 0.0
    assert paper.score("", ["German shepherd"]).value == 1.0
    assert strict.score("", ["German shepherd"]).value == 0.0
    assert strict.score(" . ", ["German shepherd"]).value == 0.0
    assert strict.score("german shepherd", ["German shepherd"]).value == 1.0
    assert paper.score("e", ["German shepherd"]).value == 1.0
    assert strict.score("e", ["German shepherd"]).value == 0.0


def test_ocrvqa_is_equality_and_unanswerable_is_wrong() -> None:
    paper, strict = scorers.get("ocrvqa", "paper"), scorers.get("ocrvqa")
    assert paper.score("JANE Austen", ["Jane Austen"]).value == 1.0
    assert paper.score("Jane Austen.", ["Jane Austen"]).value == 0.0
    assert paper.score(" Jane Austen", ["Jane Austen"]).value == 0.0
    assert strict.score(" Jane Austen", ["Jane Austen"]).value == 1.0
    assert paper.score("Unanswerable", ["Unanswerable"]).value == 0.0
    assert paper.score("unanswerable", ["Unanswerable"]).value == 1.0


def test_gqa_drops_trailing_stops_and_leaves_unbalanced_questions_unscored() -> None:
    paper, strict = scorers.get("gqa", "paper"), scorers.get("gqa")
    assert paper.score("Yes..", ["yes"]).value == 1.0
    assert paper.score(" Yes..", ["yes"]).value == 0.0  # no script of the four takes a blank away
    assert paper.score(" yes", [" yes"]).value == 1.0
    assert strict.score(" Yes..", ["yes"]).value == 1.0
    assert strict.score("  yes", ["yes"]).value == 1.0
    assert paper.score("yes", ["Yes"]).value == 0.0
    assert strict.score("yes", ["Yes"]).value == 1.0
    value, _, figures = paper.aggregate(
        ["yes", "no"], [["yes"], ["yes"]], [{"isBalanced": True}, {"isBalanced": False}]
    )
    assert value == 1.0 and figures["unscored"] == 1
