"""The search for the strength: pure numbers, no model."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import ConfigError
from holdfast.metrics.intervals import wilson
from holdfast.restore.search import (
    STRENGTHS,
    Budget,
    Point,
    choose,
    curtailed,
    nearest_miss,
    search,
    undominated,
)

RATE = st.integers(0, 20).map(lambda n: n / 20)


def point(strength: float, asr: float, over: float | None = 0.0, task: float | None = 0.9) -> Point:
    return Point(strength=strength, asr=asr, complied=asr, over_refusal=over, task=task)


POINTS = st.lists(st.tuples(RATE, RATE, RATE), min_size=1, max_size=12).map(
    lambda rows: [point(0.1 * (i + 1), *row) for i, row in enumerate(rows)]
)
BUDGETS = st.builds(Budget, max_asr=st.none() | RATE, max_over_refusal=st.none() | RATE, max_drop=st.none() | RATE)
TUNED = point(0.0, 0.8, 0.0, 0.95)


@given(POINTS, BUDGETS)
def test_nothing_dominates_what_is_chosen(points: list[Point], budget: Budget) -> None:
    chosen = choose(points, budget, TUNED)
    if chosen is None:
        assert not any(p.meets(budget, TUNED) for p in points)
    else:
        assert chosen.meets(budget, TUNED)
        assert not any(p.dominates(chosen) for p in points)


@given(POINTS, BUDGETS)
def test_no_weaker_edit_that_meets_the_budget_is_as_good(points: list[Point], budget: Budget) -> None:
    chosen = choose(points, budget, TUNED)
    if chosen is not None and budget.given:
        weaker = [p for p in points if p.strength < chosen.strength and p.meets(budget, TUNED)]
        assert all(any(q.dominates(p) for q in points) for p in weaker)


@given(POINTS)
def test_the_knee_has_the_least_regret(points: list[Point]) -> None:
    chosen = choose(points, Budget(), TUNED)
    assert chosen is not None
    assert chosen.regret() == pytest.approx(min(p.regret() for p in points))
    assert chosen in undominated(points)


@given(
    st.lists(RATE, min_size=len(STRENGTHS) + 1, max_size=len(STRENGTHS) + 1).map(lambda r: sorted(r, reverse=True)),
    RATE,
)
def test_the_search_finds_the_least_strength_on_the_grid(rates: list[float], bound: float) -> None:
    curve = dict(zip((0.0, *STRENGTHS), rates, strict=True))
    asked: list[float] = []

    def rate(strength: float) -> float:
        # Between grid points as at the weaker one: refining finds nothing better.
        return curve[max(s for s in curve if s <= strength)]

    def measure(strength: float) -> Point:
        asked.append(strength)
        return point(strength, rate(strength), task=1 - strength / 1000)

    tuned = point(0.0, rates[0], task=1.0)
    budget = Budget(max_asr=bound)
    points = search(measure, lambda s, b: rate(s) > b + 1e-9, tuned, budget, refine=0)
    found = choose(points, budget, tuned)
    least = next((s for s, r in curve.items() if r <= bound + 1e-9), None)
    assert (found.strength if found else None) == least
    assert len(asked) == len(set(asked))
    if found is not None:
        assert len(asked) <= 2


def test_refining_takes_a_weaker_edit_between_two_grid_points() -> None:
    def rate(strength: float) -> float:
        return 0.5 if strength < 0.45 else 0.0

    def measure(strength: float) -> Point:
        return point(strength, rate(strength), task=1 - strength / 1000)

    budget = Budget(max_asr=0.1)
    found = choose(search(measure, lambda s, b: rate(s) > b, TUNED, budget), budget, TUNED)
    assert found is not None
    assert 0.45 <= found.strength < 0.6


def test_the_whole_grid_is_measured_before_a_budget_is_called_unattainable() -> None:
    asked: list[float] = []

    def measure(strength: float) -> Point:
        asked.append(strength)
        return point(strength, 0.4)

    budget = Budget(max_asr=0.1)
    points = search(measure, lambda s, b: True, TUNED, budget)
    assert asked == list(STRENGTHS)
    assert choose(points, budget, TUNED) is None
    assert nearest_miss(points, budget, TUNED).asr == 0.4


def test_other_bounds_send_the_search_over_the_whole_grid() -> None:
    # ASR holds from 0.2 on, over-refusal only from 2 on: it falls with the strength here.
    def measure(strength: float) -> Point:
        return point(strength, 0.5 if strength < 0.2 else 0.0, over=0.2 if strength < 2 else 0.0)

    budget = Budget(max_asr=0.1, max_over_refusal=0.05)
    points = search(measure, lambda s, b: s < 0.2, TUNED, budget)
    found = choose(points, budget, TUNED)
    assert found is not None
    assert found.strength == 2


def test_a_tuned_model_within_the_budget_is_left_as_it_is() -> None:
    tuned = point(0.0, 0.01)

    def never(strength: float) -> Point:
        raise AssertionError

    points = search(never, lambda s, b: False, tuned, Budget(max_asr=0.03))
    assert choose(points, Budget(max_asr=0.03), tuned) is tuned


@given(st.lists(st.booleans(), min_size=1, max_size=60), RATE, st.integers(1, 9))
def test_a_curtailed_test_agrees_with_reading_all(outcomes: list[bool], bound: float, size: int) -> None:
    batches = [outcomes[i : i + size] for i in range(0, len(outcomes), size)]
    exceeds, seen = curtailed(batches, len(outcomes), bound)
    assert exceeds == (sum(outcomes) > bound * len(outcomes) + 1e-9)
    assert seen <= len(outcomes)


def test_a_curtailed_test_stops_early() -> None:
    read: list[int] = []

    def batches() -> object:
        for _ in range(10):
            read.append(1)
            yield [True] * 10

    assert curtailed(batches(), 100, 0.05) == (True, 10)  # type: ignore[arg-type]
    assert len(read) == 1


@pytest.mark.parametrize("strengths", [[], [0.0, 1.0], [1.0, 1.0], [2.0, 1.0], [math.inf], [math.nan], [-1.0]])
def test_strengths_that_make_no_grid_are_refused(strengths: list[float]) -> None:
    with pytest.raises(ConfigError, match="increasing numbers above 0"):
        search(lambda s: TUNED, lambda s, b: True, TUNED, Budget(), strengths=strengths)


@pytest.mark.parametrize("field", ["max_asr", "max_over_refusal", "max_drop"])
@pytest.mark.parametrize("value", [-0.1, 3.0, math.nan])
def test_a_bound_is_a_rate(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{field} is .*expected a rate"):
        Budget(**{field: value})


def test_a_bound_on_what_was_not_measured_is_not_met() -> None:
    bare = point(1.0, 0.0, over=None, task=None)
    assert bare.meets(Budget(max_asr=0.0), TUNED)
    assert not bare.meets(Budget(max_over_refusal=0.5), TUNED)
    assert not bare.meets(Budget(max_drop=0.5), TUNED)


@given(st.integers(1, 400), st.data(), st.sampled_from([0.01, 0.03, 0.1]))
def test_a_budget_that_few_requests_hold_is_said_to_rest_on_few(n: int, data: st.DataObject, bound: float) -> None:
    hits = data.draw(st.integers(0, int(bound * n)))
    interval = wilson(hits, n)
    figures = {"asr": {"hits": hits, "scored": n, "low": interval.low, "high": interval.high}}
    found = replace(point(1.0, hits / n), figures=figures)
    said = found.unsure(Budget(max_asr=bound))
    assert bool(said) == (interval.high > bound)
    if said:
        needed = int(said[0].split("more of them: ")[1].split()[0])
        assert wilson(0, needed).high <= bound < wilson(0, needed - 1).high
    assert not found.unsure(Budget(max_over_refusal=bound)) and not found.unsure(Budget())
