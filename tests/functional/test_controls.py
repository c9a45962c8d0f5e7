"""Controls: exact at both ends, exact in strength, and blind to everything but the change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.functional.columns import measure_change
from holdfast.functional.controls import (
    distance_of,
    interpolation_factors,
    order_by_change,
    random_order,
    revert_factors,
    reverted_by,
    scale_change,
)


def pair(rows=7, columns=12, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    prev = torch.randn(rows, columns, generator=g)
    new = prev + 0.1 * torch.randn(rows, columns, generator=g) * torch.rand(columns, generator=g)
    return prev.to(dtype), new.to(dtype)


@settings(deadline=None, max_examples=60)
@given(share=st.floats(0.0, 1.3), seed=st.integers(0, 20), kind=st.sampled_from(["largest", "random", "interpolation"]))
def test_every_control_meets_the_distance_it_is_asked_for(share, seed, kind):
    prev, new = pair(seed=seed)
    change = measure_change(prev.double(), new.double())
    wanted = share * change.norm
    if kind == "interpolation":
        factors = interpolation_factors(change, distance=wanted)
    else:
        generator = torch.Generator().manual_seed(seed)
        order = order_by_change(change) if kind == "largest" else random_order(12, generator)
        factors = revert_factors(change, order, distance=wanted)
        assert int(((factors > 0) & (factors < 1)).sum()) <= 1
    assert bool((factors >= 0).all()) and bool((factors <= 1).all())
    expected = min(wanted, change.norm)
    assert distance_of(change, factors) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    moved = torch.linalg.norm(scale_change(prev.double(), new.double(), factors) - prev.double())
    assert float(moved) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_columns_taken_back_and_columns_left_alone_are_exact(dtype):
    prev, new = pair(dtype=dtype)
    change = measure_change(prev, new)
    factors = revert_factors(change, order_by_change(change), count=4)
    taken = order_by_change(change)[:4]
    left = order_by_change(change)[4:]
    out = scale_change(prev, new, factors, out=new.clone())
    assert torch.equal(out[:, taken], prev[:, taken]) and torch.equal(out[:, left], new[:, left])


def test_largest_change_takes_back_more_than_any_other_choice_of_as_many():
    change = measure_change(*pair())
    best = reverted_by(change, revert_factors(change, order_by_change(change), count=3))
    for seed in range(20):
        order = random_order(12, torch.Generator().manual_seed(seed))
        assert reverted_by(change, revert_factors(change, order, count=3)) <= best


def test_ties_go_to_the_lower_index():
    prev = torch.zeros(3, 4)
    new = torch.tensor([1.0, 2.0, 2.0, 1.0]).expand(3, 4)
    assert order_by_change(measure_change(prev, new)).tolist() == [1, 2, 0, 3]


def test_no_change_gives_factors_of_one_and_nothing_reverted():
    prev, _ = pair()
    change = measure_change(prev, prev.clone())
    for factors in (
        interpolation_factors(change, distance=0.0),
        revert_factors(change, order_by_change(change), distance=0.0),
    ):
        assert torch.equal(factors, torch.ones(12, dtype=torch.float64)) and reverted_by(change, factors) == 0


def test_the_result_may_be_written_over_an_input():
    prev, new = pair()
    factors = torch.linspace(0, 1, 12, dtype=torch.float64)
    expected = scale_change(prev, new, factors)
    for target in ("prev", "new"):
        p, n = prev.clone(), new.clone()
        out = scale_change(p, n, factors, out=p if target == "prev" else n)
        assert torch.equal(out, expected)
    reference = prev.double() + (new.double() - prev.double()) * factors
    torch.testing.assert_close(expected.double(), reference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda c, o: revert_factors(c, o), "either count or distance"),
        (lambda c, o: revert_factors(c, o, count=13), r"count is 13; expected 0\.\.12"),
        (lambda c, o: revert_factors(c, o, distance=-1.0), "distance is -1.0; expected a norm"),
        (lambda c, o: interpolation_factors(c, factor=1.5), r"factor is 1\.5; expected 0\.\.1"),
        (lambda c, o: interpolation_factors(c, factor=0.5, distance=1.0), "either factor or distance"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    change = measure_change(*pair())
    with pytest.raises(ValueError, match=message):
        call(change, order_by_change(change))
    with pytest.raises(ValueError, match=r"factors of shape \(3,\); expected \(12,\)"):
        scale_change(*pair(), torch.ones(3))


# -- strength over all layers ------------------------------------------------------------------------------------------
