"""The anchored edit against its least-squares problem in float64, at both ends of every dial, and on bad input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import NumericalError
from holdfast.functional import anchor
from holdfast.functional.anchor import AnchorGrams, AnchorStrength, anchor_lora, anchor_lora_grid, anchor_weight
from holdfast.functional.factorize import NotPositiveDefiniteError, factor_
from holdfast.functional.hessian import InputGram

COLUMNS, ROWS = 24, 10


def tokens(count, columns=COLUMNS, seed=0):
    """Correlated inputs with columns of unlike scale, float64."""
    g = torch.Generator().manual_seed(seed)
    low = torch.randn(count, 3, generator=g) @ torch.randn(3, columns, generator=g)
    x = (torch.randn(count, columns, generator=g) + low) * torch.exp(torch.randn(columns, generator=g))
    return x.double()


def gram(x, dtype=torch.float32):
    return (2 * x.T @ x / len(x)).to(dtype)


def grams(columns=COLUMNS, counts=(60, 40, 80), seed=0, dtype=torch.float32):
    return [gram(tokens(n, columns, seed=10 * seed + k), dtype) for k, n in enumerate(counts)]


def weights(rows=ROWS, columns=COLUMNS, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(100 + seed)
    prev = torch.randn(rows, columns, generator=g)
    return prev.to(dtype), (prev + 0.3 * torch.randn(rows, columns, generator=g)).to(dtype)


def least_squares(prev, new, x_task, x_safety, x_past=None, *, mu_s=1.0, mu_p=0.3, lam=0.03):
    """The minimiser from the tokens themselves: a stacked least-squares problem, no Gram matrix, no inverse."""
    prev, new = prev.double(), new.double()
    tau = float((2 * x_task.square().sum(0) / len(x_task)).mean())
    eye = torch.eye(prev.shape[1], dtype=torch.float64)
    # The objective has ||.|| of W x with weight 2 / N, as the Gram matrices; lam tau weighs ||W - W_.||^2 alike.
    parts = [(x_task * math.sqrt(2 / len(x_task)), new), (math.sqrt(lam * tau) * eye, new)]
    for mu, x in ((mu_s, x_safety), (mu_p, x_past)):
        if x is not None:
            parts += [(math.sqrt(2 * mu / len(x)) * x, prev), (math.sqrt(mu * lam * tau) * eye, prev)]
    left = torch.cat([p for p, _ in parts])
    right = torch.cat([p @ w.T for p, w in parts])
    return torch.linalg.lstsq(left, right, driver="gelsd").solution.T


def formula(change, task, safety, past=None, *, mu_s=1.0, mu_p=0.3, lam=0.03):
    """change A (A + K)^-1 by a general solver in float64."""
    task, safety = task.double(), safety.double()
    eye, tau = torch.eye(len(task), dtype=torch.float64), task.double().diagonal().mean()
    a = task / tau + lam * eye
    k = mu_s * (safety / tau + lam * eye)
    if past is not None:
        k = k + mu_p * (past.double() / tau + lam * eye)
    return torch.linalg.solve(a + k, change.double() @ a, left=False)


def distance(found, expected, scale=None):
    scale = expected if scale is None else scale
    return float((found.double() - expected.double()).norm() / scale.double().norm())


@pytest.mark.parametrize("counts", [(60, 40, 80), (7, 5, 9), (200, 3, 2)])
@pytest.mark.parametrize("with_past", [True, False])
@pytest.mark.parametrize("mu_s, mu_p, lam", [(1.0, 0.3, 0.03), (0.01, 5.0, 1e-3), (100.0, 0.0, 1.0)])
def test_weight_solves_the_least_squares_problem_on_the_tokens(counts, with_past, mu_s, mu_p, lam):
    x = [tokens(n, seed=k) for k, n in enumerate(counts)]
    x[2] = x[2] if with_past else None
    prev, new = weights(dtype=torch.float64)
    moments = [None if part is None else gram(part, torch.float64) for part in x]
    found = anchor_weight(prev, new, *moments, safety_weight=mu_s, past_weight=mu_p, damping=lam)
    assert distance(found, least_squares(prev, new, *x, mu_s=mu_s, mu_p=mu_p, lam=lam), new - prev) < 1e-8


def test_gradient_of_the_objective_is_zero_at_the_edit_and_nowhere_near():
    x_t, x_s, x_p = (tokens(n, seed=k) for k, n in enumerate((60, 40, 80)))
    prev, new = weights(dtype=torch.float64)
    tau = float(gram(x_t, torch.float64).diagonal().mean())

    def objective(w):
        def moved(x, anchor_point):
            return 2 * ((w - anchor_point) @ x.T).square().sum() / len(x)

        ridge = 0.03 * tau * ((w - new).square().sum() + 1.3 * (w - prev).square().sum())
        return moved(x_t, new) + moved(x_s, prev) + 0.3 * moved(x_p, prev) + ridge

    edited = anchor_weight(prev, new, *(gram(x, torch.float64) for x in (x_t, x_s, x_p)))
    sizes = []
    for start in (edited, new, prev):
        w = start.clone().requires_grad_()
        objective(w).backward()
        sizes.append(float(w.grad.norm()))
    assert sizes[0] < 1e-9 * min(sizes[1:])
    assert float(objective(edited)) < min(float(objective(new)), float(objective(prev)))


@settings(deadline=None, max_examples=40)
@given(
    mu_s=st.floats(-6, 6).map(lambda e: 10**e),
    mu_p=st.one_of(st.just(0.0), st.floats(-6, 6).map(lambda e: 10**e)),
    lam=st.floats(-5, 6).map(lambda e: 10**e),
    seed=st.integers(0, 30),
    rank=st.integers(1, 5),
)
def test_float32_agrees_with_float64_at_extreme_strengths_and_both_roads_agree(mu_s, mu_p, lam, seed, rank):
    moments = grams(seed=seed, counts=(60, 10, 80))
    options = {"safety_weight": mu_s, "past_weight": mu_p, "damping": lam}
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, COLUMNS, generator=g), torch.randn(ROWS, rank, generator=g)
    found = anchor_lora(a, *moments, **options)
    expected = formula(a, *moments, mu_s=mu_s, mu_p=mu_p, lam=lam)
    assert found.dtype == torch.float32 and found.shape == a.shape
    assert distance(found, expected) < 1e-6
    prev = torch.randn(ROWS, COLUMNS, generator=g).double()
    dense = anchor_weight(prev, prev + 2 * b.double() @ a.double(), *moments, **options)
    assert distance(prev + 2 * b.double() @ found.double(), dense, b.double() @ a.double()) < 1e-6
    assert int(torch.linalg.matrix_rank((dense - prev), rtol=1e-6)) <= rank


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("past, past_weight", [(None, 0.3), (2, 0.0)])
def test_without_weights_the_tuned_model_comes_back_bit_for_bit(dtype, past, past_weight):
    moments = grams()
    prev, new = weights(dtype=dtype)
    new[0, 0] = -0.0
    options = {"safety_weight": 0.0, "past_weight": past_weight}
    past = None if past is None else moments[past]
    for edited, original in (
        (anchor_weight(prev, new, *moments[:2], past, **options), new),
        (anchor_lora(new, *moments[:2], past, **options), new),
    ):
        assert edited.dtype == dtype and edited.data_ptr() != original.data_ptr()
        assert torch.equal(edited.view(torch.uint8), original.view(torch.uint8))


@pytest.mark.parametrize("name", ["safety_weight", "past_weight"])
def test_an_infinite_weight_leads_to_the_old_model_and_a_small_one_to_the_new(name):
    moments = grams()
    prev, new = weights()
    rest = {"safety_weight": 0.0, "past_weight": 0.0}
    far = anchor_weight(prev, new, *moments, **{**rest, name: 1e12})
    assert torch.allclose(far, prev, rtol=0, atol=1e-6)
    near = anchor_weight(prev, new, *moments, **{**rest, name: 1e-12})
    assert torch.allclose(near, new, rtol=0, atol=1e-6)
    # No weight overflows.
    assert torch.equal(anchor_weight(prev, new, *moments, **{**rest, name: 1e300}), prev)


def test_large_damping_is_interpolation():
    moments = grams()
    prev, new = weights(dtype=torch.float64)
    edited = anchor_weight(prev, new, *moments, safety_weight=1.5, past_weight=0.5, damping=1e9)
    assert torch.allclose(edited, prev + (new - prev) / 3, rtol=0, atol=1e-7)
    edited = anchor_weight(prev, new, *moments[:2], safety_weight=1.5, past_weight=0.5, damping=1e9)
    assert torch.allclose(edited, prev + (new - prev) / 2.5, rtol=0, atol=1e-7)


def test_without_damping_and_past_it_is_regmean():
    task, safety, _ = grams(dtype=torch.float64)
    prev, new = weights(dtype=torch.float64)
    # Jin et al., ICLR 2023, eq. 2, weights as (in, out) there: (sum G_i)^-1 sum G_i W_i.
    merged = torch.linalg.solve(task + safety, task @ new.T + safety @ prev.T).T
    for damping in (0.0, 1e-12):
        assert torch.allclose(anchor_weight(prev, new, task, safety, damping=damping), merged, rtol=0, atol=1e-9)


def test_no_past_means_no_past_term_whatever_its_weight():
    task, safety, past = grams()
    prev, new = weights()
    without = anchor_weight(prev, new, task, safety, past_weight=7.0)
    assert torch.equal(without, anchor_weight(prev, new, task, safety, past, past_weight=0.0))
    assert not torch.allclose(without, anchor_weight(prev, new, task, safety, past))


def test_weights_split_between_equal_safety_and_past_add_up():
    task, safety, _ = grams()
    prev, new = weights(dtype=torch.float64)
    whole = anchor_weight(prev, new, task, safety, safety_weight=1.3)
    parts = anchor_weight(prev, new, task, safety, safety, safety_weight=0.4, past_weight=0.9)
    assert torch.allclose(whole, parts, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(scale=st.floats(-20, 20).map(lambda e: 10**e), seed=st.integers(0, 20))
def test_scale_of_the_grams_and_order_of_the_columns_do_not_matter(scale, seed):
    moments = grams(seed=seed, dtype=torch.float64)
    prev, new = weights(seed=seed, dtype=torch.float64)
    edited = anchor_weight(prev, new, *moments)
    assert distance(anchor_weight(prev, new, *(scale * m for m in moments)), edited) < 1e-10
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(seed))
    permuted = anchor_weight(prev[:, order], new[:, order], *(m[order][:, order] for m in moments))
    assert distance(permuted, edited[:, order]) < 1e-10
    # Rows are edited alone, and the edit is linear in the change.
    assert distance(anchor_weight(prev[3:5], new[3:5], *moments), edited[3:5]) < 1e-10
    twice = anchor_weight(prev, prev + 2 * (new - prev), *moments)
    assert distance(twice - prev, 2 * (edited - prev)) < 1e-10


def test_more_safety_weight_moves_safety_less_and_the_task_more():
    task, safety, past = grams(dtype=torch.float64)
    prev, new = weights(dtype=torch.float64)
    cost = {"safety": [], "task": []}
    for mu in (0.01, 0.1, 1.0, 10.0, 100.0):
        edited = anchor_weight(prev, new, task, safety, past, safety_weight=mu)
        cost["safety"].append(float(torch.trace((edited - prev) @ safety @ (edited - prev).T)))
        cost["task"].append(float(torch.trace((edited - new) @ task @ (edited - new).T)))
    assert cost["safety"] == sorted(cost["safety"], reverse=True)
    assert cost["task"] == sorted(cost["task"])


@pytest.mark.parametrize("dtype, rounding", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("gram_dtype", [torch.float32, torch.float64])
def test_half_precision_weights_are_rounded_once(dtype, rounding, gram_dtype):
    moments = grams(dtype=gram_dtype)
    prev, new = weights(dtype=dtype)
    exact = prev.double() + formula(new.double() - prev.double(), *moments)
    edited = anchor_weight(prev, new, *moments)
    assert edited.dtype == dtype and torch.equal(edited, exact.to(dtype))
    # The dtype is the new weight's, the old one may be wider.
    assert anchor_weight(prev.float(), new, *moments).dtype == dtype
    assert anchor_lora(new, *moments).dtype == dtype
    assert distance(anchor_lora(new, *moments), formula(new, *moments)) < rounding


@pytest.mark.parametrize("gram_dtype", [torch.bfloat16, torch.float16])
def test_past_moments_kept_in_half_precision_are_read_as_they_are(gram_dtype):
    task, safety, past = grams()
    past = (past / past.max()).to(gram_dtype)
    _, a = weights()
    assert distance(anchor_lora(a, task, safety, past), formula(a, task, safety, past)) < 1e-6


@pytest.mark.parametrize("damping", [0.03, 0.0, 1e-9])
def test_inputs_that_were_never_seen_are_interpolated(damping):
    prev, new = weights(dtype=torch.float64)
    moments = grams(dtype=torch.float64)
    for m in moments:
        m[[4, 9]] = 0
        m[:, [4, 9]] = 0
    edited = anchor_weight(prev, new, *moments, safety_weight=1.0, past_weight=2.0, damping=damping)
    share = (edited - prev)[:, [4, 9]] / (new - prev)[:, [4, 9]]
    assert torch.allclose(share, torch.full_like(share, 0.25), rtol=0, atol=1e-9)
    assert AnchorGrams(*moments).dead_inputs == 2
    # The others do not notice them.
    live = [j for j in range(COLUMNS) if j not in (4, 9)]
    alone = anchor_weight(
        prev[:, live],
        new[:, live],
        *(m[live][:, live] for m in moments),
        safety_weight=1.0,
        past_weight=2.0,
        damping=damping * len(live) / COLUMNS * 1.0,
    )
    if damping == 0.0:
        assert torch.allclose(edited[:, live], alone, rtol=0, atol=1e-8)


def test_an_input_only_safety_sees_keeps_the_old_column_without_damping():
    prev, new = weights(dtype=torch.float64)
    task, safety, _ = grams(dtype=torch.float64)
    task[4] = 0
    task[:, 4] = 0
    edited = anchor_weight(prev, new, task, safety, safety_weight=1e9, damping=0.0)
    assert torch.allclose(edited[:, 4], prev[:, 4], rtol=0, atol=1e-6)


def test_inputs_are_not_written_and_need_no_layout_or_gradient():
    moments = grams()
    prev, new = weights()
    before = [t.clone() for t in (*moments, prev, new)]
    expected = anchor_weight(prev, new, *moments)
    wide = torch.nn.Parameter(torch.stack([new, new], 2))
    edited = anchor_weight(prev.T.contiguous().T, wide[..., 0], *(m.T for m in moments))
    assert not edited.requires_grad and torch.allclose(edited, expected, rtol=0, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, (*moments, prev, new), strict=True))


def test_an_unchanged_layer_stays_as_it_is():
    prev, new = weights()
    new[:4] = prev[:4]
    edited = anchor_weight(prev, new, *grams())
    assert torch.equal(edited[:4], prev[:4])
    assert torch.equal(anchor_weight(prev, prev, *grams()), prev)
    assert torch.equal(anchor_lora(torch.zeros(2, COLUMNS), *grams()), torch.zeros(2, COLUMNS))


def test_a_grid_gives_what_single_edits_give_for_every_layer_that_shares_the_input():
    moments = grams()
    layers = [weights(rows=3, seed=1)[1], weights(rows=5, seed=2)[1].bfloat16()]
    strengths = [AnchorStrength(safety_weight=s, past_weight=p) for s, p in ((0.0, 0.0), (0.3, 0.3), (3.0, 0.0))]
    grid = list(anchor_lora_grid(layers, AnchorGrams(*moments, damping=0.1), strengths))
    assert len(grid) == 3
    for strength, edited in zip(strengths, grid, strict=True):
        options = {"safety_weight": strength.safety_weight, "past_weight": strength.past_weight, "damping": 0.1}
        for found, layer in zip(edited, layers, strict=True):
            single = anchor_lora(layer, *moments, **options)
            assert found.dtype == layer.dtype and torch.equal(found, single)


def test_moments_of_the_calibration_walk_are_accepted():
    moments = [InputGram(COLUMNS).update(tokens(n, seed=n).float()).hessian() for n in (60, 40)]
    _, a = weights()
    assert distance(anchor_lora(a, *moments), formula(a, *moments)) < 1e-6


# Wide layers work in float32; the road is forced here on narrow ones.


@settings(deadline=None, max_examples=20)
@given(mu_s=st.floats(-3, 3).map(lambda e: 10**e), lam=st.floats(-5, 3).map(lambda e: 10**e), seed=st.integers(0, 9))
def test_the_float32_road_measures_its_error_and_mends_it(mu_s, lam, seed):
    columns = 96
    moments = [(m + m.T) / 2 for m in grams(columns, counts=(40, 30, 200), seed=seed)]
    a = torch.randn(6, columns, generator=torch.Generator().manual_seed(seed))
    factor = AnchorGrams(*moments, damping=lam, precision="float32").factor(AnchorStrength(safety_weight=mu_s))
    found = factor.apply(a)
    assert distance(found, formula(a, *moments, mu_s=mu_s, lam=lam)) < 1e-4
    assert factor.error <= 3e-5


def test_many_rows_that_float32_cannot_hold_are_done_in_float64_and_said():
    columns = 64
    task, safety, past = grams(columns, counts=(300, 300, 300), dtype=torch.float64)
    spike = torch.ones(columns, columns, dtype=torch.float64) * 1e5
    task, safety = (task + spike).float(), safety.float()
    _, new = weights(rows=40, columns=columns)
    prev = torch.zeros_like(new)
    factor = AnchorGrams(task, safety, past.float(), damping=1e-3, precision="float32").factor()
    edited = factor.edit_weight(prev, new)
    assert distance(edited, formula(new, task, safety, past.float(), lam=1e-3)) < 1e-5
    assert len(factor.fallbacks) == 1 and factor.fallbacks[0].startswith("float32: ")


def test_few_rows_are_refined_with_the_float32_factor():
    columns = 128
    task, safety, _ = grams(columns, counts=(300, 300, 300), dtype=torch.float64)
    task, safety = (task + 1e3).float(), safety.float()
    a = torch.randn(4, columns, generator=torch.Generator().manual_seed(0))
    factor = AnchorGrams(task, safety, damping=1e-2, precision="float32").factor()
    rough = factor._solve(factor.grams.task_product(a))
    expected = formula(a, task, safety, lam=1e-2)
    assert distance(rough, expected) > 3e-5
    found = factor.apply(a)
    assert factor.fallbacks == [] and found.dtype == torch.float64
    assert distance(found, expected) < 1e-6


def test_tf32_of_a_trainer_does_not_reach_the_edit():
    previous = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        moments = grams(64, counts=(200, 200, 200))
        a = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
        found = AnchorGrams(*moments, precision="float32").factor().apply(a)
        assert distance(found, formula(a, *moments)) < 1e-4
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = previous


@pytest.mark.parametrize("engine", ["lapack", "blocked", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factor_is_the_cholesky_factor_of_the_lower_triangle(engine, dtype):
    matrix = gram(tokens(100), dtype)
    expected = torch.linalg.cholesky(matrix)
    factored = matrix.tril()
    factor_(factored, engine=engine)
    assert torch.allclose(factored.tril(), expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)
    with pytest.raises(NotPositiveDefiniteError, match="leading minor"):
        factor_(-matrix, engine=engine)


def test_edge_shapes():
    moments = grams()
    assert anchor_lora(torch.empty(0, COLUMNS), *moments).shape == (0, COLUMNS)
    one = [torch.full((1, 1), float(k + 1)) for k in range(3)]
    share = 1.03 / (1.03 + (2 + 0.03) + 0.3 * (3 + 0.03))
    assert float(anchor_lora(torch.ones(1, 1), *one)) == pytest.approx(share, rel=1e-6)
    with pytest.raises(ValueError, match="no lora_a"):
        next(anchor_lora_grid([], AnchorGrams(*moments), [AnchorStrength()]))


# Bad input

ROADS = {
    "weight": lambda moments, **options: anchor_weight(*weights(), *moments, **options),
    "lora": lambda moments, **options: anchor_lora(weights()[1], *moments, **options),
}


@pytest.fixture(params=list(ROADS))
def road(request):
    return ROADS[request.param]


@pytest.mark.parametrize("name", ["safety_weight", "past_weight", "damping"])
@pytest.mark.parametrize("value", [-1e-9, -1.0, math.nan, math.inf, -math.inf, True, "1", None])
def test_numbers_that_are_no_weights_are_refused_by_name(road, name, value):
    with pytest.raises(ValueError, match=name):
        road(grams(), **{name: value})


@pytest.mark.parametrize("position, name", list(enumerate(["task_gram", "safety_gram", "past_gram"])))
class TestBadGram:
    def test_shapes(self, road, position, name):
        for bad in (torch.eye(COLUMNS + 1), torch.ones(COLUMNS), torch.ones(COLUMNS, COLUMNS - 1), torch.ones(0, 0)):
            moments = grams()
            moments[position] = bad
            with pytest.raises(ValueError, match=r"_gram.*\(" + str(bad.shape[0])):
                road(moments)

    def test_not_floating_point(self, road, position, name):
        moments = grams()
        moments[position] = torch.eye(COLUMNS, dtype=torch.int64)
        with pytest.raises(ValueError, match=f"{name} is torch.int64"):
            road(moments)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("where", [(3, 3), (2, 7), (7, 2)])
    def test_not_finite(self, road, position, name, value, where):
        moments = grams()
        moments[position][where] = value
        with pytest.raises(NumericalError, match=name):
            road(moments)

    @pytest.mark.parametrize("where", [(2, 7), (7, 2), (0, 1)])
    def test_not_symmetric(self, road, position, name, where):
        moments = grams()
        moments[position][where] *= 1.5
        with pytest.raises(ValueError, match=f"{name} is not symmetric"):
            road(moments)

    def test_a_triangle_alone(self, road, position, name):
        moments = grams()
        moments[position] = moments[position].tril()
        with pytest.raises(ValueError, match="must be mirrored"):
            road(moments)

    def test_zero(self, road, position, name):
        moments = grams()
        moments[position] = torch.zeros(COLUMNS, COLUMNS)
        with pytest.raises(NumericalError, match=f"{name} is zero"):
            road(moments)

    def test_negative(self, road, position, name):
        moments = grams()
        moments[position] = -moments[position]
        with pytest.raises(NumericalError, match=f"{name} has -"):
            road(moments)

    def test_no_moments_of_anything(self, road, position, name):
        moments = grams()
        moments[position] = moments[position].clone()
        moments[position][1, 5] = moments[position][5, 1] = 1e4
        with pytest.raises(NumericalError, match=f"{name} is not X"):
            road(moments)


def test_a_vanishing_tau_is_refused(road):
    moments = grams(dtype=torch.float64)
    moments[0] *= 1e-310 / float(moments[0].diagonal().mean())
    with pytest.raises(NumericalError, match="tau"):
        road(moments)


def test_too_few_tokens_without_damping_are_refused_with_what_was_tried(road):
    moments = grams(counts=(5, 4, 6), dtype=torch.float64)
    with pytest.raises(NumericalError, match=r"damping=0, safety_weight=1, past_weight=0.3.*larger damping"):
        road(moments, damping=0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    for name in ("w_prev", "w_new"):
        pair = dict(zip(("w_prev", "w_new"), weights(), strict=True))
        pair[name][2, 5] = value
        with pytest.raises(NumericalError, match=rf"{name} holds \S+ at \(2, 5\)"):
            anchor_weight(*pair.values(), *grams(), safety_weight=0.0)
    _, a = weights()
    a[2, 5] = value
    with pytest.raises(NumericalError, match=r"lora_a holds"):
        anchor_lora(a, *grams())


def test_weights_that_do_not_fit_are_refused():
    prev, new = weights()
    with pytest.raises(ValueError, match="expected one shape"):
        anchor_weight(prev[:3], new, *grams())
    with pytest.raises(ValueError, match=r"expected \(rows, 12\)"):
        anchor_weight(prev, new, *grams(12))
    with pytest.raises(ValueError, match=r"lora_a is \(10, 24\)"):
        anchor_lora(new, *grams(12))
    with pytest.raises(ValueError, match=r"lora_a is torch\.int8"):
        anchor_lora(torch.ones(2, COLUMNS, dtype=torch.int8), *grams())
    with pytest.raises(ValueError, match=r"lora_a is \(24,\)"):
        anchor_lora(torch.ones(COLUMNS), *grams())
    with pytest.raises(ValueError, match="precision"):
        AnchorGrams(*grams(), precision="bf16")


def test_width_above_which_float32_is_used():
    assert AnchorGrams(*grams()).dtype == torch.float64
    eye = torch.eye(anchor._WIDE_COLUMNS + 1)
    assert AnchorGrams(eye, eye).dtype == torch.float32
    assert AnchorGrams(eye, eye, precision="float64").dtype == torch.float64


class TestBadWideGram:
    """Wide matrices are asked by a product first; what it must find is named as on narrow ones."""

    COLUMNS = anchor._WIDE_COLUMNS + 40

    @pytest.fixture
    def good(self):
        low = torch.randn(8, self.COLUMNS, generator=torch.Generator().manual_seed(0))
        wide = low.T @ low + torch.eye(self.COLUMNS)
        wide[5] = 0
        wide[:, 5] = 0
        return wide

    def test_a_sound_one_passes_in_any_precision(self, good):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            AnchorGrams(good, good, good.to(dtype))

    @pytest.mark.parametrize(
        "error, match, damage",
        [
            (NumericalError, "holds nan at", lambda m: m[3, 900].fill_(math.nan)),
            (NumericalError, "holds inf at", lambda m: m[900, 3].fill_(math.inf)),
            (NumericalError, "holds nan at", lambda m: m[7, 7].fill_(math.nan)),
            (NumericalError, "has -1.0", lambda m: m[7, 7].fill_(-1.0)),
            (NumericalError, "is zero", lambda m: m.zero_()),
            (ValueError, "not symmetric", lambda m: m[3, 900].add_(2.0)),
            (ValueError, "not symmetric", lambda m: m.tril_()),
            (ValueError, "not symmetric", lambda m: m[5, 900].fill_(1.0)),
        ],
    )
    def test_damage_is_named(self, good, error, match, damage):
        bad = good.clone()
        damage(bad)
        with pytest.raises(error, match=f"safety_gram.* {match}" if "has" not in match else f"safety_gram {match}"):
            AnchorGrams(good, bad)
