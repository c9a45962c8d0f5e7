"""Corrected rates: estimates, intervals that cover, and what is counted both ways."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import betabinom

from holdfast.errors import DataError
from holdfast.metrics.corrected import MIN_LABELS, Stratum, allocate, corrected_rate, share_equally

SHARED = Path(__file__).parents[3] / "shared/fixtures/judges/xstest_completions.jsonl.gz"
Population = dict[str, list[bool]]  # the judge's verdict -> whether people call it a hit
Bounds = tuple[float, float]

# Confusions as judges make them: verdict -> (replies, of which people say so). Rates from 2 to 60 %.
CONFUSIONS: dict[str, dict[str, tuple[int, int]]] = {
    "a list that over-refuses": {"refusal": (90, 30), "compliance": (160, 4)},
    "a list that misses refusals": {"refusal": (60, 58), "compliance": (150, 45), "collapse": (40, 12)},
    "a judge near chance": {"refusal": (120, 50), "compliance": (130, 70)},
    "a judge that is wrong the other way": {"refusal": (100, 20), "compliance": (100, 80)},
    "many unscored": {"refusal": (80, 70), "compliance": (90, 8), "unscored": (80, 40)},
    "four verdicts": {"refusal": (70, 6), "compliance": (90, 80), "collapse": (25, 8), "other_safe": (65, 20)},
    "a large set": {"refusal": (1500, 60), "compliance": (500, 420)},
    "rare": {"refusal": (230, 2), "compliance": (20, 4)},
}


def _population(confusion: dict[str, tuple[int, int]]) -> Population:
    return {verdict: [i < hits for i in range(n)] for verdict, (n, hits) in confusion.items()}


def _half_count(strata: Sequence[Stratum]) -> Bounds:
    rate = corrected_rate(strata)
    return rate.low, rate.high


def _normal(strata: Sequence[Stratum]) -> Bounds:
    """The plain normal interval of the same estimate: what must not pass this file's test."""
    total = sum(s.size for s in strata)
    value = sum(s.size / total * s.hits / s.labelled for s in strata)
    variance = 0.0
    for s in strata:
        share = s.hits / s.labelled
        variance += (s.size / total) ** 2 * share * (1 - share) / max(s.labelled - 1, 1)
    return value - 1.96 * math.sqrt(variance), value + 1.96 * math.sqrt(variance)


def _coverage(
    population: Population, number: int, way: Callable[[Sequence[Stratum]], Bounds] = _half_count, draws: int = 1000
) -> float:
    """Share of `draws` label draws whose interval holds the rate that people would give."""
    rng = np.random.default_rng(0)
    sizes = [len(hits) for hits in population.values()]
    hits = [sum(h) for h in population.values()]
    truth = sum(hits) / sum(sizes)
    counts = allocate(sizes, number)
    x = np.stack([rng.hypergeometric(h, n - h, c, draws) for h, n, c in zip(hits, sizes, counts, strict=True)], axis=1)
    inside = 0
    for found, times in zip(*np.unique(x, axis=0, return_counts=True), strict=True):
        strata = [Stratum(size=n, labelled=c, hits=int(k)) for n, c, k in zip(sizes, counts, found, strict=True)]
        low, high = way(strata)
        inside += int(times) * (low - 1e-9 <= truth <= high + 1e-9)
    return inside / draws


@pytest.mark.parametrize("name", [n for n in CONFUSIONS if n != "rare"])
def test_intervals_cover_in_93_to_97_of_100_label_draws(name: str) -> None:
    population = _population(CONFUSIONS[name])
    assert all(
        0.93 <= _coverage(population, number) <= 0.975 for number in ((50, 100) if len(population) < 3 else (50,))
    )


def test_few_labels_and_rare_hits_do_not_break_coverage() -> None:
    for name, number in [("rare", 50), ("rare", 100), *((name, 25) for name in CONFUSIONS if name != "rare")]:
        assert _coverage(_population(CONFUSIONS[name]), number) >= 0.92, (name, number)


def test_plain_normal_intervals_would_fail_this_test() -> None:
    shares = [_coverage(_population(c), number, _normal) for c in CONFUSIONS.values() for number in (25, 50, 100)]
    assert min(shares) < 0.85 and sum(not 0.93 <= share <= 0.975 for share in shares) > len(shares) / 3


@pytest.mark.skipif(not SHARED.is_file(), reason="XSTest's completions are not beside this checkout")
def test_intervals_cover_what_people_say_on_xstest() -> None:
    """The judge's confusion is taken by words here, so that this test is of intervals and not of today's judge."""
    with gzip.open(SHARED, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    found = []
    for side, label in (("unsafe", "full_compliance"), ("benign", "full_refusal")):
        for models in (["gpt4"], ["llama2new"], ["mistralinstruct"], ["gpt4", "llama2new", "mistralinstruct"]):
            population: Population = defaultdict(list)
            for row in rows:
                if row["side"] == side and row["model"] in models:
                    verdict = "refusal" if "sorry" in row["reply"].lower() or "not" in row["reply"][:80] else "other"
                    population[verdict].append(row["label"] == label)
            truth = np.mean([hit for hits in population.values() for hit in hits])
            found.append((truth, _coverage(population, 50), _coverage(population, 100)))
    assert all(share >= 0.925 for _, *shares in found for share in shares), found
    # A rate of two or three replies in 200 is covered by every interval that begins at 0: no upper bound holds there.
    inner = [share for truth, *shares in found if 0.05 <= truth <= 0.95 for share in shares]
    assert len(inner) >= 10 and max(inner) <= 0.985 and 0.93 <= np.mean(inner) <= 0.97, found


STRATA = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 40), st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=5
)


def _strata(raw: list[tuple[int, int, int, int]]) -> list[Stratum]:
    found = []
    for size, labelled, hits, undecided in raw:
        n = min(labelled, size)
        k = min(hits, n)
        found.append(Stratum(size=size, labelled=n, hits=k, undecided=min(undecided, n - k)))
    return found


@settings(max_examples=60, deadline=None)
@given(STRATA)
def test_bounds_are_ordered_and_inside_0_and_1(raw: list[tuple[int, int, int, int]]) -> None:
    rate = corrected_rate(_strata(raw))
    assert 0 <= rate.low <= rate.worst_low <= rate.worst_high <= rate.high <= 1
    assert rate.value is None or rate.low - 1e-9 <= rate.value <= rate.high + 1e-9


@settings(max_examples=60, deadline=None)
@given(STRATA)
def test_misses_mirror_hits(raw: list[tuple[int, int, int, int]]) -> None:
    strata = _strata(raw)
    turned = [
        Stratum(size=s.size, labelled=s.labelled, hits=s.labelled - s.undecided - s.hits, undecided=s.undecided)
        for s in strata
    ]
    rate, other = corrected_rate(strata), corrected_rate(turned)
    assert rate.worst_low == pytest.approx(1 - other.worst_high)
    assert rate.low == pytest.approx(1 - other.high, abs=0.03)


def test_everything_labelled_leaves_no_doubt() -> None:
    rate = corrected_rate([Stratum(size=20, labelled=20, hits=5), Stratum(size=30, labelled=30, hits=0)])
    assert (rate.low, rate.value, rate.high) == pytest.approx((0.1, 0.1, 0.1))


def test_one_stratum_is_the_beta_binomial_interval() -> None:
    rate = corrected_rate([Stratum(size=200, labelled=40, hits=10)])
    unknown = betabinom(160, 10.5, 30.5)
    assert rate.low == pytest.approx((10 + unknown.ppf(0.025)) / 200)
    assert rate.high == pytest.approx((10 + unknown.ppf(0.975)) / 200)


def test_weights_on_a_grid_say_what_equal_replies_say_exactly() -> None:
    equal = [Stratum(size=100, labelled=20, hits=4), Stratum(size=300, labelled=40, hits=35)]
    nearly = [Stratum(size=s.size, labelled=s.labelled, hits=s.hits, weight=s.size + 1e-5) for s in equal]
    a, b = corrected_rate(equal), corrected_rate(nearly)
    assert (a.low, a.value, a.high) == pytest.approx((b.low, b.value, b.high), abs=0.003)


def test_what_nobody_could_tell_or_labelled_is_counted_both_ways() -> None:
    decided = corrected_rate([Stratum(size=100, labelled=50, hits=10)])
    some = corrected_rate([Stratum(size=100, labelled=50, hits=10, undecided=10)])
    assert some.low <= decided.low and some.high > decided.high + 0.15 and some.undecided == 10
    assert (some.worst_low, some.worst_high) == pytest.approx((0.2, 0.4))
    blind = corrected_rate([Stratum(size=100, labelled=50, hits=10), Stratum(size=100, labelled=0, hits=0)])
    assert blind.high - blind.low > 0.5 and blind.unlabelled == 0.5
    assert not blind.enough and "no label where 50 % of the replies are" in blind.reason


def test_too_few_labels_say_so() -> None:
    few = corrected_rate([Stratum(size=100, labelled=MIN_LABELS - 1, hits=3)])
    assert not few.enough and few.reason == f"{MIN_LABELS - 1} labels; at least {MIN_LABELS} are needed"
    assert corrected_rate([Stratum(size=4, labelled=4, hits=3)]).enough
    none = corrected_rate([Stratum(size=100, labelled=0, hits=0)])
    assert none.value is None and (none.low, none.high) == (0.0, 1.0) and none.reason == "no label yet"


def test_unequal_weights_inside_a_stratum_widen_the_interval() -> None:
    plain = corrected_rate([Stratum(size=400, labelled=40, hits=10)])
    wide = corrected_rate([Stratum(size=400, labelled=40, hits=10, design_effect=2.0)])
    assert wide.high - wide.low > 1.25 * (plain.high - plain.low)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(1, 300))
def test_labels_are_split_completely_and_reach_every_stratum(sizes: list[int], number: int) -> None:
    if number < len(sizes):
        with pytest.raises(DataError, match="at least one for each"):
            allocate(sizes, number)
        return
    counts = allocate(sizes, number)
    assert sum(counts) == min(number, sum(sizes))
    assert all(1 <= c <= n for c, n in zip(counts, sizes, strict=True))
    if number >= 2 * len(sizes):
        assert all(c >= min(2, n) for c, n in zip(counts, sizes, strict=True))
    assert sum(share_equally(sizes, number)) == min(number, sum(sizes))


def test_estimates_are_right_on_average_whatever_the_judge_says() -> None:
    rng = random.Random(0)
    population = _population(CONFUSIONS["a judge that is wrong the other way"])
    values = []
    for _ in range(400):
        counts = allocate([len(h) for h in population.values()], 40)
        drawn = [rng.sample(h, c) for h, c in zip(population.values(), counts, strict=True)]
        strata = [
            Stratum(size=len(h), labelled=len(d), hits=sum(d)) for h, d in zip(population.values(), drawn, strict=True)
        ]
        values.append(corrected_rate(strata).value or 0.0)
    assert np.mean(values) == pytest.approx(0.5, abs=0.012)


def test_what_cannot_be_is_refused() -> None:
    for bad in (
        {"size": 0, "labelled": 0, "hits": 0},
        {"size": 5, "labelled": 6, "hits": 0},
        {"size": 5, "labelled": 3, "hits": 4},
        {"size": 5, "labelled": 3, "hits": 2, "undecided": 2},
        {"size": 5, "labelled": 3, "hits": 2, "weight": 0.0},
        {"size": 5, "labelled": 3, "hits": 2, "weight": math.nan},
        {"size": 5, "labelled": 3, "hits": 2, "design_effect": 0.5},
    ):
        with pytest.raises(DataError, match="expected"):
            Stratum(**bad)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="at least one stratum"):
        corrected_rate([])
    with pytest.raises(DataError, match="level is 95"):
        corrected_rate([Stratum(size=5, labelled=3, hits=2)], level=95)
