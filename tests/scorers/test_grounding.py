"""Boxes: IoU against a count of cells, three parsers, and what cannot be read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast import scorers
from holdfast.errors import ConfigError
from holdfast.scorers.grounding import Box, iou, parse_legacy, parse_prism, parse_strict

GOLD = "[0.1,0.1,0.5,0.5]"
spans = st.tuples(st.integers(0, 7), st.integers(1, 8)).map(lambda s: (min(s), max(s) + (s[0] == s[1])))


@given(spans, spans, spans, spans)
def test_iou_equals_the_share_of_common_cells(
    x1: tuple[int, int], y1: tuple[int, int], x2: tuple[int, int], y2: tuple[int, int]
) -> None:
    def cells(x: tuple[int, int], y: tuple[int, int]) -> set[tuple[int, int]]:
        return {(i, j) for i in range(*x) for j in range(*y)}

    a, b = cells(x1, y1), cells(x2, y2)
    boxes: tuple[Box, Box] = (x1[0], y1[0], x1[1], y1[1]), (x2[0], y2[0], x2[1], y2[1])
    assert iou(*boxes) == pytest.approx(len(a & b) / len(a | b))


def test_degenerate_boxes_have_no_overlap() -> None:
    assert iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0.0


def test_the_legacy_parser_loses_a_character_at_either_end() -> None:
    assert parse_legacy("[0.12,0.2,0.3,0.49]", prediction=True) == (0.12, 0.2, 0.3, 0.4)
    assert parse_legacy("[-0.1,0.2,0.3,0.49]", prediction=True) == (0.1, 0.2, 0.3, 0.4)
    assert parse_legacy("0.12,0.2,0.3,0.49", prediction=False) == (0.12, 0.2, 0.3, 0.49)
    # A blank is the first character that is dropped, so the leading digit stays.
    assert parse_legacy(" [1.1,0.2,0.3,0.49]", prediction=True) == (1.1, 0.2, 0.3, 0.4)
    assert parse_legacy("[1.1,0.2,0.3,0.49]", prediction=True) == (0.1, 0.2, 0.3, 0.4)
    assert parse_legacy("a box", prediction=True) is None
    assert parse_legacy("[1,2,3]", prediction=True) is None


def test_prism_takes_the_first_four_numbers_and_strict_exactly_four_in_order() -> None:
    assert parse_prism("box 0.1 and .2, 3e-1; 0.4 (0.9)") == (0.1, 0.2, 0.3, 0.4)
    assert parse_prism("0.1 0.2 0.3") is None
    assert parse_strict("x: [0.1, 0.2, 0.3, 0.4]") == (0.1, 0.2, 0.3, 0.4)
    assert parse_strict("0.1 0.2 0.3 0.4 0.5") is None
    assert parse_strict("[0.3, 0.2, 0.1, 0.4]") is None


def test_a_box_counts_above_one_half_and_not_at_it() -> None:
    scorer = scorers.get("grounding")
    assert scorer.score("[0,0,1,1]", ["[0,0,1,0.5]"]).value == 0.0
    assert scorer.score("[0,0,1,1]", ["[0,0,1,0.51]"]).value == 1.0


def test_what_cannot_be_read_is_wrong_in_a_prediction_unscored_in_a_gold_and_counted() -> None:
    value, scores, figures = scorers.get("grounding", "paper", parser="prism").aggregate(
        [GOLD, "nothing here", GOLD], [[GOLD], [GOLD], ["unknown"]], [{"size": [640, 480]}] * 3
    )
    assert value == 0.5
    assert [score.value for score in scores] == [1.0, 0.0, None]
    assert (figures["unparsable"], figures["unscored"]) == (1, 1)
    assert "'unknown' cannot be read" in scores[2].evidence


def test_iou_scorer_returns_the_overlap_itself() -> None:
    assert scorers.get("iou").score("[0,0,1,1]", ["[0,0,1,0.5]"]).value == 0.5


def test_an_unknown_parser_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected 'legacy' or 'prism'"):
        scorers.get("grounding", parser="regex")
