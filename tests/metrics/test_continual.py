from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import DataError
from holdfast.metrics.continual import check_matrix, summarize

NAN = math.nan
BY_HAND = [[0.9, NAN, NAN], [0.7, 0.8, NAN], [0.5, 0.9, 0.6]]


@st.composite
def matrices(draw: st.DrawFn) -> np.ndarray:
    steps = draw(st.integers(1, 6))
    cells = draw(st.lists(st.floats(0, 1), min_size=steps * steps, max_size=steps * steps))
    return np.array(cells).reshape(steps, steps)


def test_every_figure_of_a_matrix_worked_out_by_hand():
    summary = summarize(BY_HAND)
    assert summary.ap == pytest.approx((0.5 + 0.9 + 0.6) / 3)
    assert summary.mft == pytest.approx((0.9 + 0.8 + 0.6) / 3)
    assert summary.maa == pytest.approx((0.9 + 0.75 + 2.0 / 3) / 3)
    assert summary.bwt == pytest.approx((-0.4 + 0.1) / 2)
    assert summary.bwt_t == pytest.approx((-0.4 + 0.1) / 3)
    # Task 0: best before the end 0.9; task 1: best before the end 0.8, so forgetting is negative there.
    assert summary.forgetting == pytest.approx((0.4 - 0.1) / 2)
    assert summary.last == (0.5, 0.9, 0.6)
    assert summary.running == pytest.approx((0.9, 0.75, 2.0 / 3))


def test_forgetting_looks_for_the_best_step_not_the_step_just_learned():
    summary = summarize([[0.2, NAN, NAN], [0.8, 0.5, NAN], [0.4, 0.5, 0.5]])
    assert summary.forgetting == pytest.approx((0.4 + 0.0) / 2)
    assert summary.bwt == pytest.approx((0.2 + 0.0) / 2)


@given(matrices())
def test_the_two_bwt_denominators_and_the_definitions_agree(matrix):
    summary, steps = summarize(matrix), len(matrix)
    assert summary.bwt_t == pytest.approx(summary.ap - summary.mft, abs=1e-12)
    if steps > 1:
        assert summary.bwt * (steps - 1) == pytest.approx(summary.bwt_t * steps, abs=1e-12)
        assert summary.forgetting >= -summary.bwt - 1e-12  # the best score is at least the just-learned one
    assert 0 <= summary.ap <= 1 and 0 <= summary.maa <= 1


@given(matrices(), st.floats(0, 1))
def test_cells_above_the_diagonal_never_matter(matrix, filler):
    other = matrix.copy()
    other[np.triu_indices_from(other, k=1)] = filler
    assert summarize(other) == summarize(matrix) or len(matrix) == 1


@given(matrices())
def test_a_stream_that_never_changes_a_score_forgets_nothing(matrix):
    frozen = np.tile(matrix[0], (len(matrix), 1))
    summary = summarize(frozen)
    assert summary.bwt_t == pytest.approx(0, abs=1e-12)
    if len(matrix) > 1:
        assert summary.bwt == 0 and summary.forgetting == 0


def test_one_task_has_no_backward_transfer():
    summary = summarize([[0.4]])
    assert (summary.ap, summary.mft, summary.maa, summary.bwt_t) == (0.4, 0.4, 0.4, 0.0)
    assert math.isnan(summary.bwt) and math.isnan(summary.forgetting)
    assert summary.to_json()["bwt"] is None


def test_none_above_the_diagonal_is_read_as_missing():
    assert summarize([[0.5, None], [0.25, 1.0]]).bwt == pytest.approx(-0.25)


def test_a_missing_score_is_refused_or_makes_its_figures_nan_never_skipped():
    holed = [[0.5, NAN, NAN], [NAN, 0.5, NAN], [0.5, 0.5, 0.5]]
    with pytest.raises(DataError, match="no score for task 0 after step 1"):
        summarize(holed)
    summary = summarize(holed, missing="propagate")
    assert summary.ap == 0.5 and math.isnan(summary.maa) and math.isnan(summary.forgetting)


@pytest.mark.parametrize(
    ("matrix", "says"),
    [
        ([[0.5, 0.5]], r"shape \(1, 2\); expected \(T, T\)"),
        ([], "expected"),
        ([[50.0]], "rates in 0..1, not percent"),
        ([["x"]], "not a table of numbers"),
    ],
)
def test_a_matrix_that_cannot_be_summarized_says_why(matrix, says):
    with pytest.raises(DataError, match=says):
        summarize(matrix)


def test_a_checked_matrix_holds_nothing_above_its_diagonal():
    checked = check_matrix([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]])
    assert np.isnan(checked).tolist() == [[False, True, True], [False, False, True], [False, False, False]]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_ends_of_the_scale_are_scores(value):
    assert summarize([[value]]).ap == value
    for outside in (np.nextafter(0.0, -1.0), np.nextafter(1.0, 2.0)):
        with pytest.raises(DataError, match="not percent"):
            summarize([[outside]])
