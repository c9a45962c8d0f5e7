"""ANLS with and without its threshold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast import scorers
from holdfast.errors import ConfigError
from holdfast.scorers.anls import similarity


def slow_levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, last = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(row[-1] + 1, last[j] + 1, last[j - 1] + (x != y)))
    return row[-1]


@given(st.text(alphabet="abc é", max_size=12), st.text(alphabet="abc é", max_size=12))
def test_similarity_is_one_minus_distance_over_the_longer_length(a: str, b: str) -> None:
    if a or b:
        assert similarity(a, b) == pytest.approx(1 - slow_levenshtein(a, b) / max(len(a), len(b)))
    assert similarity(a, b) == similarity(b, a)


@given(st.lists(st.text(alphabet="aAß İé\n", max_size=8), min_size=1, max_size=3), st.text("aAßİ é\n", max_size=8))
def test_both_modes_divide_by_the_length_that_their_scripts_take(golds: list[str], reply: str) -> None:
    # Prism's evaluator: stripped, distance of the lower-cased texts, length of those that are not.
    best = 0.0
    for gold in (gold.strip() for gold in golds):
        longer = max(len(reply.strip()), len(gold))
        best = max(best, 1 - slow_levenshtein(reply.strip().lower(), gold.lower()) / longer if longer else 1.0)
    assert scorers.get("anls", "paper").score(reply, golds).value == pytest.approx(best)
    # The challenge's own script (also Qwen-VL's, lmms-eval's): length of the upper-cased texts with their blanks.
    apart = []
    for gold in golds:
        distance = slow_levenshtein(" ".join(gold.lower().split()), " ".join(reply.lower().split()))
        longer = max(len(gold.upper()), len(reply.upper()))
        apart.append(distance / longer if longer else 0.0)
    official = 1 - min(apart)
    assert scorers.get("anls").score(reply, golds).value == pytest.approx(official if official >= 0.5 else 0.0)


def test_empty_texts() -> None:
    paper = scorers.get("anls", "paper")
    assert paper.score(" ", [""]).value == 1.0
    assert paper.score("", ["x"]).value == 0.0
    assert paper.score("x", [""]).value == 0.0


def test_best_gold_counts_and_the_threshold_zeroes_what_is_below_it() -> None:
    paper, strict = scorers.get("anls", "paper"), scorers.get("anls")
    golds = ["zzzz", "hullo"]
    assert paper.score("Hello", golds).value == pytest.approx(0.8)
    assert strict.score("Hello", golds).value == pytest.approx(0.8)
    assert paper.score("hexxx", golds).value == pytest.approx(0.2)
    assert strict.score("hexxx", golds).value == 0.0
    assert "below the threshold 0.5" in strict.score("hexxx", golds).evidence
    assert strict.score("ab", ["ac"]).value == 0.5  # at the threshold counts
    assert scorers.get("anls", "paper", threshold=0.5).score("hexxx", golds).value == 0.0


def test_only_strict_collapses_inner_white_space() -> None:
    assert scorers.get("anls", "paper").score("a  b", ["a b"]).value == pytest.approx(0.75)
    assert scorers.get("anls").score("a  b", ["a b"]).value == 1.0


def test_a_threshold_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"threshold is 50"):
        scorers.get("anls", threshold=50.0)
