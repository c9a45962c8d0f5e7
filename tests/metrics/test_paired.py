from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from holdfast.errors import DataError
from holdfast.metrics import paired

OUTCOMES = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40)


@given(OUTCOMES)
def test_mcnemar_is_the_exact_binomial_test_on_the_discordant_pairs(pairs):
    a, b = map(list, zip(*pairs, strict=True))
    result = paired.mcnemar(a, b)
    discordant = result.wins + result.losses
    expected = stats.binomtest(result.wins, discordant).pvalue if discordant else 1.0
    assert result.p == pytest.approx(expected)
    assert result.wins + result.losses + result.ties == result.n == len(pairs)


@given(OUTCOMES)
def test_swapping_the_methods_flips_the_sign_and_keeps_p(pairs):
    a, b = map(list, zip(*pairs, strict=True))
    for test in (paired.mcnemar, paired.sign_test, paired.paired_bootstrap):
        if test is paired.paired_bootstrap:
            one, two = test(a, b, resamples=300), test(b, a, resamples=300)
        else:
            one, two = test(a, b), test(b, a)
        assert one.difference == -two.difference and one.p == pytest.approx(two.p)
        assert (one.wins, one.losses) == (two.losses, two.wins)


def test_five_seeds_cannot_be_more_certain_than_one_in_sixteen():
    result = paired.paired_seeds([0.9, 0.8, 0.9, 0.7, 0.8], [0.1, 0.2, 0.1, 0.3, 0.1])
    assert result.p == 2 / 2**5 and result.wins == 5
    assert result.interval is not None and result.interval.low > 0


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=8), st.sampled_from([1.0, 1e-9, 1e9]))
def test_the_permutation_p_counts_every_sign_pattern_exactly_at_any_scale(delta, scale):
    sums = [abs(sum(s * d for s, d in zip(signs, delta, strict=True))) for signs in product((1, -1), repeat=len(delta))]
    exact = sum(s >= abs(sum(delta)) for s in sums) / len(sums)
    assert paired.paired_seeds(np.array(delta) * scale, np.zeros(len(delta))).p == exact


def test_the_permutation_p_agrees_with_scipy():
    delta = np.array([0.31, -0.12, 0.27, 0.44, -0.05, 0.18])
    reference = stats.permutation_test(
        (delta,), np.sum, permutation_type="samples", alternative="two-sided", n_resamples=np.inf
    )
    assert paired.paired_seeds(delta, np.zeros(6)).p == pytest.approx(reference.pvalue, abs=1e-12)


def test_many_seeds_are_drawn_not_enumerated():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=30)
    assert paired.paired_seeds(noise, np.zeros(30)).p > 0.05
    assert paired.paired_seeds(noise + 2, np.zeros(30)).p < 0.001


def test_a_clear_difference_is_seen_and_no_difference_is_not():
    rng = np.random.default_rng(0)
    base = (rng.random(300) < 0.5).astype(float)
    better = np.maximum(base, rng.random(300) < 0.2)
    assert paired.paired_bootstrap(better, base).p < 0.01
    same = paired.paired_bootstrap(base, base)
    assert same.p == 1.0 and same.ties == 300 and same.interval is not None and same.interval.high == 0


def test_bad_input_is_named():
    with pytest.raises(DataError, match=r"outcomes that are 0 or 1; found 0\.5"):
        paired.mcnemar([0.5], [1])
    with pytest.raises(DataError, match="over the same samples"):
        paired.sign_test([1, 0], [1])


def test_the_bootstraps_p_counts_one_extra_draw_in_each_tail():
    sure = paired.paired_bootstrap([1.0] * 8, [0.0] * 8, resamples=99)
    assert sure.p == 2 / 100
    assert paired.paired_bootstrap([1.0] * 4, [1.0] * 4, resamples=99).p == 1.0


def test_the_bootstraps_interval_has_as_much_on_either_side():
    rng = np.random.default_rng(5)
    a, b = rng.random(60), rng.random(60)
    interval = paired.paired_bootstrap(a, b, level=0.9).interval
    assert interval is not None
    means = [np.mean((a - b)[rng.integers(0, 60, 60)]) for _ in range(4000)]
    assert np.mean(np.array(means) < interval.low) == pytest.approx(0.05, abs=0.015)
    assert np.mean(np.array(means) > interval.high) == pytest.approx(0.05, abs=0.015)


def test_many_seeds_p_is_never_zero_and_counts_the_pattern_seen():
    result = paired.paired_seeds(np.full(20, 1.0), np.zeros(20), draws=999)
    # No drawn pattern of 2^20 is likely to be all of one sign; the one that was seen is.
    assert result.p == pytest.approx(1 / 1000, abs=1e-3) and result.p >= 1 / 1000


@pytest.mark.parametrize("seeds", [16, 17])
def test_sixteen_seeds_are_enumerated_and_seventeen_drawn(seeds):
    result = paired.paired_seeds(np.arange(1.0, seeds + 1), np.zeros(seeds), draws=500)
    assert result.p == (2 / 2**16 if seeds == 16 else pytest.approx(1 / 501, abs=1e-2))


def test_the_t_test_is_scipys():
    rng = np.random.default_rng(3)
    a, b = rng.normal(0.3, 1, 5), rng.normal(0, 1, 5)
    found = paired.paired_t(a, b)
    assert found.p == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-9)
    assert found.interval == paired.paired_seeds(a, b).interval
    assert paired.paired_t([0.5, 0.5], [0.5, 0.5]).p == 1


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("noise", [0.0, 1e-13])
def test_differences_that_are_equal_in_every_seed_are_measured_by_their_signs(n, noise):
    """They have no spread, so no t; and must not take the strictest place of a family from one that has."""
    equal = paired.paired_t(np.full(n, 0.5) + noise * np.arange(n), np.full(n, 0.25))
    assert equal.p == 2 * 0.5**n == paired.paired_seeds(np.full(n, 0.5), np.full(n, 0.25)).p
    assert paired.holm([equal.p, 0.03])[1] == 0.06


def test_one_seed_has_no_t():
    assert np.isnan(paired.paired_t([0.5], [0.25]).p)


def test_holm_is_the_published_example():
    # Holm 1979 by hand: 0.01 x 4, 0.013 x 3, 0.03 x 2, 0.04 x 1, each at least the one before.
    assert paired.holm([0.04, 0.01, 0.03, 0.013]) == pytest.approx([0.06, 0.04, 0.06, 0.04])
    assert paired.holm([]) == [] and paired.holm([0.9, 0.8]) == [1.0, 1.0]
    kept = paired.holm([0.02, float("nan"), 0.01])
    assert kept[0] == 0.02 and np.isnan(kept[1]) and kept[2] == 0.02
    with pytest.raises(DataError, match=r"1\.5 is no p-value"):
        paired.holm([0.1, 1.5])


def test_holm_finds_nothing_where_nothing_is():
    rng = np.random.default_rng(0)
    families = rng.uniform(size=(2000, 20))
    false = np.mean([min(paired.holm(list(family))) < 0.05 for family in families])
    assert false < 0.065  # 0.05 plus three standard errors
