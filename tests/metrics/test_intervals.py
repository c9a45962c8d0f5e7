from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import DataError
from holdfast.metrics import intervals

FEW = settings(max_examples=25, deadline=None)


@FEW
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_bootstrap_mean_brackets_the_mean_and_stays_in_range(values):
    interval = intervals.bootstrap_mean(values, resamples=200)
    assert interval.value == pytest.approx(np.mean(values))
    assert min(values) - 1e-12 <= interval.low <= interval.high <= max(values) + 1e-12


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    hits = 0
    for seed in range(200):
        interval = intervals.bootstrap_mean(rng.random(80) < 0.3, resamples=400, seed=seed)
        hits += interval.low <= 0.3 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99


def test_same_seed_same_interval_and_chunking_changes_nothing(monkeypatch):
    values = np.random.default_rng(0).random(50)
    whole = intervals.bootstrap_mean(values, seed=7)
    assert whole == intervals.bootstrap_mean(values, seed=7)
    monkeypatch.setattr(intervals, "_CHUNK_CELLS", 500)
    assert intervals.bootstrap_mean(values, seed=7) == whole


def test_ap_resamples_inside_each_task():
    constant = intervals.bootstrap_ap([np.ones(10), np.zeros(500)])
    # Pooling all samples would give 10/510 and a spread; inside each constant task nothing varies.
    assert (constant.value, constant.low, constant.high) == (0.5, 0.5, 0.5)


def test_bwt_keeps_the_pairing_of_samples():
    before = np.random.default_rng(1).random(200)
    interval = intervals.bootstrap_bwt([before], [before - 0.25])
    assert interval.value == pytest.approx(-0.25)
    assert interval.high - interval.low < 1e-12  # every sample lost the same: resampling pairs shows no spread


def test_bwt_of_two_tasks_is_the_mean_over_tasks_not_samples():
    interval = intervals.bootstrap_bwt([np.ones(4), np.ones(400)], [np.zeros(4), np.ones(400)])
    assert interval.value == -0.5


@pytest.mark.parametrize(
    # Newcombe 1998, table I (method 3), 95 %.
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_bounds(successes, n, low, high):
    interval = intervals.wilson(successes, n)
    assert interval.low == pytest.approx(low, abs=5e-5) and interval.high == pytest.approx(high, abs=5e-5)


def test_over_seeds_uses_students_t():
    interval = intervals.over_seeds([1.0, 2.0, 3.0, 4.0, 5.0])
    assert interval.std == pytest.approx(math.sqrt(2.5))
    assert interval.high - interval.value == pytest.approx(2.776445 * math.sqrt(2.5) / math.sqrt(5), rel=1e-6)


def test_one_seed_has_a_mean_and_no_interval():
    interval = intervals.over_seeds([0.4])
    assert interval.value == 0.4 and math.isnan(interval.low) and interval.to_json()["std"] is None


def test_bad_input_is_named():
    with pytest.raises(DataError, match="Leave unscored samples out before"):
        intervals.bootstrap_mean([0.5, math.nan])
    with pytest.raises(DataError, match=r"expected \(n,\) or \(n, k\)"):
        intervals.bootstrap_mean([])
    with pytest.raises(DataError, match="0 <= successes <= n"):
        intervals.wilson(3, 2)
    with pytest.raises(DataError, match="between 0 and 1"):
        intervals.bootstrap_mean([1.0], level=95)
    with pytest.raises(DataError, match="at least one group"):
        intervals.bootstrap([], lambda means: means[0])
    with pytest.raises(DataError, match=r"task 0: .* over the same samples"):
        intervals.bootstrap_bwt([[1.0]], [[1.0, 0.0]])


def test_one_seed_counts_as_one():
    assert intervals.over_seeds([0.4]).n == 1 and intervals.over_seeds([0.4, 0.5]).n == 2


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1)])
def test_wilson_of_a_single_reply_is_open_on_one_side(successes, n):
    interval = intervals.wilson(successes, n)
    assert (interval.low == 0.0) == (successes == 0) and (interval.high == 1.0) == (successes == 1)
    assert interval.high - interval.low > 0.5


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_a_level_is_between_0_and_1_and_neither(level):
    with pytest.raises(DataError, match="between 0 and 1"):
        intervals.over_seeds([0.1, 0.2], level=level)
    with pytest.raises(DataError, match="at least 1"):
        intervals.bootstrap_mean([0.1, 0.2], resamples=0)
    assert intervals.bootstrap_mean([0.5], resamples=1).n == 1
