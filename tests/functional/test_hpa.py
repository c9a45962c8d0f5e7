"""The HPA edit: the acceptance checks of its mathematics, and a slow float64 reference beside it."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional.reference_hpa import count as reference_count
from functional.reference_hpa import edit as reference_edit
from functional.reference_hpa import inverse_diagonal as reference_diagonal
from holdfast.config import decode, encode
from holdfast.errors import ConfigError, NumericalError
from holdfast.functional.columns import ColumnChange, apply_columns, measure_change, measure_lora
from holdfast.functional.hessian import InputGram
from holdfast.functional.hpa import (
    ColumnRanking,
    HpaConfig,
    Setting,
    column_count,
    edit_lora,
    edit_weight,
    keep_schedule,
    what_if,
)


class Layer:
    """A random linear layer with a change and two calibrations, columns of very different weight."""

    def __init__(self, rows: int, columns: int, seed: int = 0, rank: int | None = None, dtype: Any = torch.float32):
        g = torch.Generator().manual_seed(seed)
        self.w_prev = torch.randn(rows, columns, generator=g).to(dtype)
        size = torch.rand(columns, generator=g) + 0.1
        if rank is None:
            self.w_new = (self.w_prev + 0.05 * torch.randn(rows, columns, generator=g) * size).to(dtype)
        else:
            self.lora_a = torch.randn(rank, columns, generator=g) * size
            self.lora_b = torch.randn(rows, rank, generator=g) * 0.02
            self.scaling = 1.7
            self.w_new = self.w_prev + self.scaling * self.lora_b @ self.lora_a
        mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=g) / columns**0.5
        self.x_s = torch.randn(4, 2 * columns, columns, generator=g) @ mix * (torch.rand(columns, generator=g) + 0.2)
        self.x_t = torch.randn(4, 2 * columns, columns, generator=g) @ mix * (torch.rand(columns, generator=g) + 0.2)
        self.a_s = InputGram(columns).update(self.x_s).inverse_diagonal()
        self.a_t = InputGram(columns).update(self.x_t).inverse_diagonal()

    def edit(self, **options: Any) -> Any:
        options = {"keep_percent": 10.0} | options
        return edit_weight(self.w_prev, self.w_new, self.a_s, self.a_t, **options)


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer(24, 40)


# -- the acceptance checks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("orthogonal", [True, False, "column"])
def test_edit_keeps_or_adjusts_every_column(dtype: torch.dtype, orthogonal: Any) -> None:
    layer = Layer(300, 40, dtype=dtype)
    layer.w_prev[3] = -0.0
    edit = layer.edit(orthogonal=orthogonal)
    assert edit.weight.dtype == dtype
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[edit.weight.element_size()]
    kept = edit.kept
    assert torch.equal(edit.weight.view(bits)[:, kept], layer.w_prev.view(bits)[:, kept])
    old, new = layer.w_prev.double(), layer.w_new.double()
    want = (new - edit.coefficient * old)[:, ~kept]
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-13}.get(dtype, float(torch.finfo(dtype).eps))
    torch.testing.assert_close(edit.weight.double()[:, ~kept], want, rtol=tolerance, atol=tolerance)
    if orthogonal is False:
        assert torch.equal(edit.weight[:, ~kept], layer.w_new[:, ~kept])
        assert edit.coefficient == 0.0


@pytest.mark.parametrize("orthogonal", [True, False, "column"])
def test_no_change_gives_the_old_weight(layer: Layer, orthogonal: Any) -> None:
    edit = edit_weight(layer.w_prev, layer.w_prev, layer.a_s, layer.a_t, keep_percent=10, orthogonal=orthogonal)
    assert torch.equal(edit.weight, layer.w_prev)
    assert (edit.g, edit.reverted, edit.distance) == (0.0, 0.0, 0.0)
    assert int(edit.kept.sum()) == 4 and bool(edit.kept[:4].all())  # all tied: the lowest indices


@given(percent=st.one_of(st.floats(0, 100), st.integers(0, 200).map(lambda i: i / 2)), columns=st.integers(1, 300))
@settings(max_examples=300, deadline=None)
def test_counts_are_rounded_half_up(percent: float, columns: int) -> None:
    exact = percent * columns / 100
    if abs(exact % 1 - 0.5) < 1e-8 and exact % 1 != 0.5:
        return  # a tie up to binary rounding: either neighbour is right
    assert column_count(percent, columns) == reference_count(percent, columns)


def test_known_ties_round_up() -> None:
    assert [column_count(p, c) for p, c in ((12.5, 4), (2.5, 20), (7.5, 20), (50, 1), (14.5, 100))] == [1, 1, 2, 1, 15]
    assert column_count(keep_schedule(6, 28), 20) == 3  # 12.5 % of 20 is 2.5, whatever binary makes of 7 / 28


def test_kept_columns_are_as_many_as_the_schedule_says(layer: Layer) -> None:
    percents = [keep_schedule(i, 32) for i in range(32)]
    steps = np.diff(percents)
    assert np.allclose(steps, steps[0]) and steps[0] < 0
    assert percents[-1] == 5.0
    assert percents[0] == 15 - 10 / 32
    for p in percents:
        assert int(layer.edit(keep_percent=p).kept.sum()) == reference_count(p, 40)
    assert keep_schedule(0, 1) == 5.0
    assert keep_schedule(2, 3, keep_bounds=(10, 30)) == 10


def test_scaling_the_safety_inputs_scales_eps_and_shifts_g(layer: Layer) -> None:
    energy = measure_change(layer.w_prev, layer.w_new).energy
    scaled = InputGram(40).update(3 * layer.x_s).inverse_diagonal()
    before = ColumnRanking(energy, layer.a_s, layer.a_t)
    after = ColumnRanking(energy, scaled, layer.a_t)
    torch.testing.assert_close(after.eps, 9 * before.eps, rtol=1e-5, atol=0)
    assert after.g - before.g == pytest.approx(2 * math.log(3), abs=1e-5)
    assert torch.equal(after.zeta, before.zeta)


@pytest.mark.parametrize("factor", [1e-4, 0.5, 300.0])
def test_scaling_the_change_changes_nothing_in_the_choice(layer: Layer, factor: float) -> None:
    old = layer.w_prev.double()
    scaled = edit_weight(old, old + factor * (layer.w_new.double() - old), layer.a_s, layer.a_t, keep_percent=10)
    plain = edit_weight(old, layer.w_new.double(), layer.a_s, layer.a_t, keep_percent=10)
    assert torch.equal(scaled.kept, plain.kept)
    assert scaled.alpha == pytest.approx(plain.alpha, abs=1e-12)


@pytest.mark.parametrize("normalization, changes", [("sequence", False), ("token", False), ("sum", True)])
def test_duplicated_calibration_matters_only_under_sum(layer: Layer, normalization: str, changes: bool) -> None:
    def edit_with(copies: int) -> Any:
        gram = InputGram(40, normalization)
        for _ in range(copies):
            gram.update(layer.x_s)
        a_t = InputGram(40, normalization).update(layer.x_t).inverse_diagonal()
        return edit_weight(layer.w_prev, layer.w_new, gram.inverse_diagonal(), a_t, keep_percent=10)

    once, sixteen = edit_with(1), edit_with(16)
    assert (abs(once.alpha - sixteen.alpha) > 0.05) is changes
    if not changes:
        assert torch.equal(once.weight, sixteen.weight)


def test_alpha_is_a_matter_of_the_calibration_alone(layer: Layer) -> None:
    other = Layer(56, 40, seed=7)  # another projection of the same input: its own shape and change
    edits = [
        edit_weight(w.w_prev, w.w_new, layer.a_s, layer.a_t, keep_percent=p) for w in (layer, other) for p in (5, 20)
    ]
    assert len({e.alpha for e in edits}) == 1 or max(e.alpha for e in edits) - min(e.alpha for e in edits) < 1e-12
    assert edits[0].g == pytest.approx(float(torch.log(layer.a_t.double() / layer.a_s.double()).mean()), abs=1e-12)
    assert 0.4 <= edits[0].alpha <= 0.8


def test_alpha_saturates_at_its_bounds(layer: Layer) -> None:
    low = edit_weight(layer.w_prev, layer.w_new, layer.a_s * 1e9, layer.a_t, keep_percent=10)
    high = edit_weight(layer.w_prev, layer.w_new, layer.a_s, layer.a_t * 1e9, keep_percent=10, alpha_bounds=(0.1, 2.0))
    assert (low.alpha, high.alpha) == (pytest.approx(0.4), pytest.approx(2.0))


def test_with_nothing_kept_the_step_is_orthogonal_to_the_old_weight() -> None:
    layer = Layer(64, 40, dtype=torch.float64)
    edit = layer.edit(keep_percent=0.0)
    step = edit.weight - layer.w_prev
    assert not bool(edit.kept.any())
    assert abs(float((step * layer.w_prev).sum())) < 1e-12 * float(step.norm() * layer.w_prev.norm())
    by_column = layer.edit(keep_percent=0.0, orthogonal="column")
    assert float(((by_column.weight - layer.w_prev) * layer.w_prev).sum(0).abs().max()) < 1e-12


def test_permuting_input_columns_permutes_the_choice(layer: Layer) -> None:
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    a_s = InputGram(40).update(layer.x_s[..., order]).inverse_diagonal()
    a_t = InputGram(40).update(layer.x_t[..., order]).inverse_diagonal()
    permuted = edit_weight(layer.w_prev[:, order], layer.w_new[:, order], a_s, a_t, keep_percent=10)
    assert torch.equal(permuted.kept, layer.edit().kept[order])


@pytest.mark.parametrize("shape, rank", [((24, 40), 4), ((40, 24), 8), ((700, 520), 64)])
@pytest.mark.parametrize("orthogonal", [True, False, "column"])
def test_lora_closed_form_equals_the_dense_path(shape: tuple[int, int], rank: int, orthogonal: Any) -> None:
    layer = Layer(*shape, rank=rank)
    options: dict[str, Any] = {"keep_percent": 10.0, "orthogonal": orthogonal}
    dense = layer.edit(**options)
    base = None if orthogonal is False else layer.w_prev
    lora = edit_lora(base, layer.lora_a, layer.lora_b, layer.scaling, layer.a_s, layer.a_t, **options)
    assert torch.equal(lora.kept, dense.kept)
    assert lora.alpha == pytest.approx(dense.alpha, rel=1e-12)
    assert lora.reverted == pytest.approx(dense.reverted, rel=1e-5)
    torch.testing.assert_close(
        torch.as_tensor(lora.coefficient), torch.as_tensor(dense.coefficient), rtol=1e-3, atol=1e-7
    )
    torch.testing.assert_close(lora.dense(layer.w_prev), dense.weight, rtol=1e-6, atol=2e-6)
    # What an adapter with an input-scaling vector computes on inputs is what the edited weight computes.
    x = layer.x_t[0, :5]
    served = (x * lora.input_scale) @ layer.w_prev.T + layer.scaling * (x @ lora.lora_a.T) @ lora.lora_b.T
    torch.testing.assert_close(served, x @ dense.weight.T, rtol=1e-4, atol=1e-4)
    assert not bool(lora.lora_a[:, lora.kept].any()) and lora.lora_a.shape == layer.lora_a.shape
    assert bool((lora.input_scale[lora.kept] == 1).all())
    assert torch.equal(lora.dense(layer.w_prev)[:, lora.kept], layer.w_prev[:, lora.kept])
    if orthogonal is False:
        assert bool((lora.input_scale == 1).all())


def test_lora_energy_is_exact_where_a_merged_checkpoint_is_not() -> None:
    layer = Layer(300, 200, rank=8)
    exact = (layer.scaling * layer.lora_b.double() @ layer.lora_a.double()).square().mean(0)
    closed = measure_lora(layer.lora_a, layer.lora_b, layer.scaling).energy
    torch.testing.assert_close(closed, exact, rtol=1e-10, atol=0)
    merged = measure_change(layer.w_prev.bfloat16(), layer.w_new.bfloat16()).energy
    assert float(((merged - exact) / exact).abs().mean()) > 0.01


def test_same_input_same_bytes(layer: Layer) -> None:
    first, second = layer.edit(), layer.edit()
    assert torch.equal(first.weight, second.weight) and first.figures() == second.figures()


# -- against the reference ---------------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 24),
    seed=st.integers(0, 10_000),
    keep=st.floats(0, 100),
    spread=st.floats(1.0, 4.0),
    ranking=st.sampled_from(["eps+phi", "eps", "phi"]),
    curvature_form=st.sampled_from(["divide", "multiply"]),
    orthogonal=st.sampled_from([True, False, "column"]),
    ties=st.booleans(),
    alpha_bounds=st.sampled_from([(0.4, 0.8), (0.0, 0.0), (0.8, 0.4), (-1.0, 3.0)]),
)
@settings(max_examples=250, deadline=None)
def test_edit_equals_the_slow_reference(
    rows: int,
    columns: int,
    seed: int,
    keep: float,
    spread: float,
    ranking: str,
    curvature_form: str,
    orthogonal: Any,
    ties: bool,
    alpha_bounds: tuple[float, float],
) -> None:
    rng = np.random.default_rng(seed)
    w_prev = rng.standard_normal((rows, columns))
    # Powers of two and unchanged columns make exact ties and zeros, so that the order of equals is exercised.
    size = rng.choice([0.0, 0.5, 1.0], columns) if ties else rng.random(columns)
    w_new = w_prev + (rng.choice([-1.0, 1.0], (rows, columns)) if ties else rng.standard_normal((rows, columns))) * size
    if ties:
        w_prev, w_new = np.round(w_prev * 4) / 4, np.round(w_prev * 4) / 4 + (w_new - w_prev).round(1)
    a_s = np.exp(rng.standard_normal(columns) * 2) if not ties else rng.choice([0.5, 1.0, 2.0], columns)
    a_t = np.exp(rng.standard_normal(columns) * 2) if not ties else rng.choice([0.5, 1.0, 2.0], columns)
    keep = round(keep, 1)
    focus = min(100.0, round(keep * spread, 1))
    options: dict[str, Any] = {
        "keep_percent": keep,
        "focus_percent": max(focus, keep),
        "ranking": ranking,
        "curvature_form": curvature_form,
        "orthogonal": orthogonal,
        "alpha_bounds": alpha_bounds,
    }
    want = reference_edit(w_prev, w_new, a_s, a_t, **options)
    got = edit_weight(*map(torch.from_numpy, (w_prev, w_new, a_s, a_t)), **options)
    assert got.kept.tolist() == want["kept"].tolist()
    for name in ("alpha", "g", "overlap", "p_s", "reverted"):
        assert getattr(got, name) == pytest.approx(want[name], rel=1e-9, abs=1e-9), name
    assert got.distance == pytest.approx(want["distance"], rel=1e-6, abs=1e-6)
    np.testing.assert_allclose(np.asarray(got.coefficient), want["coefficient"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(got.weight.numpy(), want["weight"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tokens", [5, 30, 200])
def test_float32_pipeline_chooses_what_the_reference_chooses(tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    x_s, x_t = (rng.standard_normal((3, tokens, 48)) * np.logspace(-1, 1, 48) for _ in range(2))
    x_s[..., 9] = x_t[..., 9] = 0
    w_prev = rng.standard_normal((32, 48)).astype(np.float32)
    w_new = w_prev + 0.01 * rng.standard_normal((32, 48)).astype(np.float32)
    a_s, a_t = reference_diagonal(x_s), reference_diagonal(x_t)
    ours = [InputGram(48).update(torch.from_numpy(x).float()).inverse_diagonal() for x in (x_s, x_t)]
    np.testing.assert_allclose(ours[0].numpy(), a_s, rtol=1e-5)
    np.testing.assert_allclose(ours[1].numpy(), a_t, rtol=1e-5)
    want = reference_edit(w_prev, w_new, a_s, a_t, keep_percent=10.0, focus_percent=20.0)
    got = edit_weight(torch.from_numpy(w_prev), torch.from_numpy(w_new), *ours, keep_percent=10.0)
    assert got.kept.tolist() == want["kept"].tolist()
    np.testing.assert_allclose(got.weight.numpy(), want["weight"], rtol=1e-5, atol=1e-6)


def test_when_the_focuses_hardly_overlap_the_safety_columns_fill_the_budget() -> None:
    columns = 40
    energy = torch.ones(columns)
    a_s, a_t = torch.ones(columns), torch.ones(columns)
    a_s[:8] = torch.linspace(0.1, 0.2, 8)  # safety: 0..7, the lowest index first
    a_t[7:15] = 0.1  # task: 7..14; one shared column
    s = ColumnRanking(energy, a_s, a_t).select(keep_percent=10, focus_percent=20)
    assert (s.overlap, s.p_s, s.keep_count) == (1 / 8, 100 * 7 / 40, 4)
    assert s.kept.nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_shared_columns_fill_up_by_their_balance() -> None:
    energy = torch.ones(10)
    a_s = torch.tensor([0.1, 0.11, 0.12, 0.13, 1, 1, 1, 1, 1, 1])
    a_t = torch.tensor([0.05, 0.5, 0.1, 0.13, 0.2, 1, 1, 1, 1, 1])
    s = ColumnRanking(energy, a_s, a_t).select(keep_percent=20, focus_percent=40, alpha_bounds=(0.5, 0.5))
    # S = {0, 1, 2, 3}, T = {0, 2, 3, 4}: 1 is kept at once; phi of 0, 2, 3 is 0, 3.33, 3.85: 3 fills up.
    assert s.kept.nonzero().flatten().tolist() == [1, 3]
    assert (s.overlap, s.p_s) == (0.75, 10.0)


# -- what-if, streaming, memory ----------------------------------------------------------------------------------------


def test_what_if_says_what_the_edit_does(layer: Layer) -> None:
    change = measure_change(layer.w_prev, layer.w_new)
    points = [
        Setting(keep_percent=p, focus_percent=f, alpha_bounds=a, projection=o, ranking=s)
        for p, f in ((5.0, None), (15.0, 40.0))
        for a in ((0.4, 0.8), (0.0, 1.0))
        for o in ("layer", "none", "column")
        for s in ("eps+phi", "eps", "phi")
    ]
    for point, outcome in zip(points, what_if(change, layer.a_s, layer.a_t, points), strict=True):
        edit = layer.edit(
            keep_percent=point.keep_percent,
            focus_percent=point.focus_percent,
            alpha_bounds=point.alpha_bounds,
            projection=point.projection,
            ranking=point.ranking,
        )
        assert torch.equal(outcome.selection.kept, edit.kept)
        assert outcome.figures() == edit.figures()
        moved = float((edit.weight.double() - layer.w_prev.double()).norm())
        assert outcome.distance == pytest.approx(moved, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("orthogonal", [True, False])
def test_an_edit_may_overwrite_either_weight(dtype: torch.dtype, orthogonal: bool) -> None:
    layer = Layer(9000, 60, dtype=dtype)  # more rows than one strip
    want = layer.edit(orthogonal=orthogonal).weight
    for target in ("w_new", "w_prev"):
        fresh = Layer(9000, 60, dtype=dtype)
        out = getattr(fresh, target)
        edit = fresh.edit(orthogonal=orthogonal, out=out)
        assert edit.weight is out
        assert torch.equal(out, want)


def test_weights_of_two_dtypes_give_the_wider_one(layer: Layer) -> None:
    edit = edit_weight(layer.w_prev.bfloat16(), layer.w_new, layer.a_s, layer.a_t, keep_percent=10)
    assert edit.weight.dtype == torch.float32
    narrow = torch.empty(24, 40, dtype=torch.bfloat16)
    edit_weight(layer.w_prev.bfloat16(), layer.w_new, layer.a_s, layer.a_t, keep_percent=10, out=narrow)
    assert torch.equal(narrow, edit.weight.bfloat16())


def test_a_zero_weight_has_no_projection(layer: Layer) -> None:
    for orthogonal in (True, "column"):
        zero = torch.zeros(24, 40)
        edit = edit_weight(zero, layer.w_new, layer.a_s, layer.a_t, keep_percent=10, orthogonal=orthogonal)
        assert torch.equal(edit.weight[:, ~edit.kept], layer.w_new[:, ~edit.kept])


def test_sums_over_many_rows_stay_exact() -> None:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(40_000, 16, generator=g) + 3  # a mean makes one long float32 sum drift
    change = measure_change(w, w + 0.01 * torch.randn(40_000, 16, generator=g))
    assert change.square is not None
    torch.testing.assert_close(change.square, w.double().square().sum(0), rtol=1e-6, atol=0)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_input_is_named(layer: Layer) -> None:
    with pytest.raises(ValueError, match=r"w_prev is \(24, 40\) and w_new is \(24, 39\)"):
        edit_weight(layer.w_prev, layer.w_new[:, 1:], layer.a_s, layer.a_t, keep_percent=10)
    with pytest.raises(ValueError, match=r"inverse diagonal is \(39,\); expected \(40,\)"):
        edit_weight(layer.w_prev, layer.w_new, layer.a_s[1:], layer.a_t, keep_percent=10)
    with pytest.raises(ValueError, match="keep_percent=30, focus_percent=20"):
        layer.edit(keep_percent=30, focus_percent=20)
    with pytest.raises(ValueError, match="keep_percent=-1"):
        layer.edit(keep_percent=-1)
    with pytest.raises(ValueError, match="expected one of eps"):
        layer.edit(ranking="zeta")
    with pytest.raises(ValueError, match="expected True, False or 'column'"):
        layer.edit(orthogonal="row")
    with pytest.raises(ValueError, match="Dequantise"):
        edit_weight(layer.w_prev.to(torch.int8), layer.w_new.to(torch.int8), layer.a_s, layer.a_t, keep_percent=10)
    with pytest.raises(ValueError, match="orthogonal=False to edit without reading the base"):
        edit_lora(None, torch.ones(2, 4), torch.ones(3, 2), 1.0, torch.ones(4), torch.ones(4), keep_percent=10)
    with pytest.raises(ValueError, match=r"expected \(rank, c\) and \(r, rank\)"):
        measure_lora(torch.ones(2, 4), torch.ones(3, 3), 1.0)
    with pytest.raises(ValueError, match="The adapter is of another layer"):
        measure_lora(torch.ones(2, 4), torch.ones(3, 2), 1.0, torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"expected bool of shape \(40,\)"):
        apply_columns(layer.w_prev, layer.w_new, torch.ones(40))
    with pytest.raises(ValueError, match="the projection needs W_prev"):
        ColumnChange(energy=torch.ones(4), dot=None, square=None, rows=3).coefficient()
    with pytest.raises(ValueError, match="block 3 of 3"):
        keep_schedule(3, 3)


@pytest.mark.parametrize("which", ["w_prev", "w_new"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_weight_is_an_error(which: str, value: float) -> None:
    layer = Layer(24, 40)
    getattr(layer, which)[3, 7] = value
    with pytest.raises(NumericalError, match=rf"input column 7 of {which}; .* Nothing was edited"):
        layer.edit()


def test_a_damaged_adapter_or_diagonal_is_an_error(layer: Layer) -> None:
    a = torch.ones(2, 4)
    a[1, 2] = float("nan")
    with pytest.raises(NumericalError, match="input column 2"):
        measure_lora(a, torch.ones(3, 2), 1.0)
    with pytest.raises(NumericalError, match="NaN or inf in lora_b"):
        measure_lora(torch.ones(2, 4), torch.full((3, 2), float("nan")), 1.0)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        diagonal = layer.a_s.clone()
        diagonal[5] = bad
        with pytest.raises(NumericalError, match="at input column 5; expected positive and finite"):
            edit_weight(layer.w_prev, layer.w_new, diagonal, layer.a_t, keep_percent=10)


def test_configuration_is_checked_where_it_is_made() -> None:
    assert HpaConfig().keep_percent(31, 32) == 5.0
    assert HpaConfig(focus_ratio=2).focus_percent(60) == 100
    for options, sentence in (
        ({"keep_bounds": (5, 150)}, "two percentages"),
        ({"focus_ratio": 0.5}, "at least 1"),
        ({"ranking": "both"}, "ranking='both'"),
        ({"curvature_form": "add"}, "expected one of divide, multiply"),
        ({"projection": "rows"}, "column"),
        ({"alpha_bounds": (0.4, math.nan)}, "two finite"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            HpaConfig(**options)  # type: ignore[arg-type]


def test_the_defaults_are_the_papers() -> None:
    """arXiv 2511.20158: p from 15 to 5 % over depth, k = 2 p, alpha between 0.4 and 0.8."""
    config = HpaConfig()
    assert (config.keep_bounds, config.alpha_bounds, config.focus_ratio) == ((5.0, 15.0), (0.4, 0.8), 2.0)
    assert (config.ranking, config.curvature_form, config.projection) == ("eps+phi", "divide", "layer")


# -- one word per idea -------------------------------------------------------------------------------------------------

OLD_NAMES = [
    ({"saliency": "phi"}, {"ranking": "phi"}),
    ({"curvature": "multiply"}, {"curvature_form": "multiply"}),
    ({"orthogonal": True}, {"projection": "layer"}),
    ({"orthogonal": False}, {"projection": "none"}),
    ({"orthogonal": "column"}, {"projection": "column"}),
]


@pytest.mark.parametrize("old, new", OLD_NAMES)
def test_options_by_their_old_names_are_the_options(layer: Layer, old: dict[str, Any], new: dict[str, Any]) -> None:
    assert HpaConfig(**old) == HpaConfig(**new) == decode(HpaConfig, old) == decode(HpaConfig, new)
    assert encode(HpaConfig(**old)) == {**encode(HpaConfig()), **new}
    a, b = layer.edit(**old), layer.edit(**new)
    assert torch.equal(a.weight, b.weight) and a.figures() == b.figures()


def test_one_option_by_two_names_says_which_to_keep(layer: Layer) -> None:
    with pytest.raises(ConfigError, match=r"saliency='phi' is the old name of ranking, .* Keep ranking"):
        HpaConfig(saliency="phi", ranking="eps")  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"edit: orthogonal=True is the old name of projection"):
        decode(HpaConfig, {"orthogonal": True, "projection": "none"}, "edit")
    assert decode(HpaConfig, {"orthogonal": False, "projection": "none"}) == HpaConfig(projection="none")
    with pytest.raises(ValueError, match="name one option"):
        layer.edit(orthogonal=False, projection="layer")


@pytest.mark.parametrize("value", [1, "colum", None, 0.0])
def test_a_wrong_value_under_an_old_name_names_the_new_one(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"projection: found .*, expected one of layer, column, none"):
        decode(HpaConfig, {"orthogonal": value})


@pytest.mark.parametrize("projection", ["layer", "none", "column"])
def test_an_edit_has_one_set_of_figures_and_shares_lie_in_0_to_1(layer: Layer, projection: Any) -> None:
    edit = layer.edit(projection=projection)
    figures = edit.figures()
    assert figures == edit.outcome.figures()
    assert figures["safety_share"] == pytest.approx(edit.p_s / 100) and figures["share_reverted"] == edit.reverted
    assert figures["kept_share"] == int(edit.kept.sum()) / 40
    shares = ("kept_share", "overlap", "safety_share", "share_reverted")
    assert all(0 <= figures[name] <= 1 for name in shares)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert (edit.outcome.cosine is None) is (projection == "none")
    assert edit.outcome.coefficient_error == (
        0
        if projection == "none"
        else pytest.approx(float((layer.w_prev * edit.coefficient)[:, ~edit.kept].norm()) / edit.distance, rel=1e-5)
    )
