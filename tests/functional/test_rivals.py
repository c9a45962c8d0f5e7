"""Other weight edits: each against its definition, written out slowly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from holdfast.functional.hessian import InputGram, inverse_cholesky_factor
from holdfast.functional.rivals import (
    cgm,
    cgm_plus,
    dare,
    least_squares_merge,
    model_tailor,
    safe_delta,
    safelora,
    shared_threshold,
    ties,
    trim,
)


class Layer:
    def __init__(self, rows: int = 9, columns: int = 70, change: float = 0.3, seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        mix = torch.eye(columns) + torch.randn(columns, columns, generator=g) / columns**0.5
        x = torch.randn(3, 100, columns, generator=g) @ mix
        self.h = InputGram(columns).update(x).hessian()
        self.h += 0.01 * self.h.diagonal().mean() * torch.eye(columns)
        self.u = inverse_cholesky_factor(self.h, 0.0)
        self.w_prev = torch.randn(rows, columns, generator=g).double()
        self.w_new = self.w_prev + change * torch.randn(rows, columns, generator=g).double()

    def output_error(self, weight: torch.Tensor, start: torch.Tensor) -> float:
        """||(W - W_start) X||^2 up to scale."""
        d = weight - start
        return float((d @ self.h * d).sum())


def surgeon(w: np.ndarray, target: np.ndarray, h: np.ndarray, take: np.ndarray, direction: float = 1.0) -> np.ndarray:
    """Optimal brain surgeon, one column at a time, with the inverse of what is left of H recomputed each time."""
    w = w.copy()
    for i in range(w.shape[1]):
        inverse = np.linalg.inv(h[i:, i:])
        for row in range(w.shape[0]):
            if take[row, i]:
                error = (w[row, i] - target[row, i]) / inverse[0, 0]
                w[row, i + 1 :] -= direction * error * inverse[0, 1:]
                w[row, i] = target[row, i]
    return w


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer()


def slow_safe_delta(layer: Layer, s: float, protected: float, block: int) -> tuple[np.ndarray, np.ndarray]:
    w, new, h, u = (t.numpy().copy() for t in (layer.w_prev, layer.w_new, layer.h, layer.u))
    rows, columns = w.shape
    take = np.zeros_like(w, dtype=bool)
    for b0 in range(0, columns, block):
        b1 = min(columns, b0 + block)
        done = surgeon(layer.w_prev.numpy(), new, h, take) if b0 else w  # what earlier blocks did to this one
        sens = {j: 1 / u[j, j] ** 2 for j in range(b0, b1)}
        entries = sorted((sens[j], j, i) for j in range(b0, b1) for i in range(rows))
        allowed = len(entries) - int(protected * len(entries))
        budget, total = s / 2 * rows / 4096 * float(np.mean(list(sens.values()))), 0.0
        for sensitivity, j, i in entries[:allowed]:
            total += (new[i, j] - done[i, j]) ** 2 * sensitivity
            take[i, j] = total <= budget
    return surgeon(layer.w_prev.numpy(), new, h, take), take


@pytest.mark.parametrize(
    "s, protected, block", [(500.0, 0.15, 32), (2e4, 0.15, 2048), (50.0, 0.0, 16), (1e9, 0.15, 32)]
)
def test_safe_delta_equals_its_description(layer: Layer, s: float, protected: float, block: int) -> None:
    got = safe_delta(layer.w_prev, layer.w_new, layer.u, strength=s, protected_share=protected, block_columns=block)
    want, take = slow_safe_delta(layer, s, protected, block)
    np.testing.assert_allclose(got.weight.numpy(), want, rtol=1e-8, atol=1e-8)
    assert got.tuned_share == pytest.approx(take.mean())
    assert 0 < got.tuned_share < 1
    assert bool((got.weight.numpy()[take] == layer.w_new.numpy()[take]).all())


def test_safe_delta_admits_nothing_without_a_budget_and_everything_with_one(layer: Layer) -> None:
    none = safe_delta(layer.w_prev, layer.w_new, layer.u, strength=0.0)
    assert torch.equal(none.weight, layer.w_prev) and none.tuned_share == 0
    everything = safe_delta(layer.w_prev, layer.w_new, layer.u, strength=1e12, protected_share=0.0)
    assert torch.equal(everything.weight, layer.w_new) and everything.figures() == {"tuned_share": 1.0}
    small = Layer(change=1e-6)  # the budget is not scale-free: a small change passes whole, but for what is protected
    assert safe_delta(small.w_prev, small.w_new, small.u).tuned_share == pytest.approx(0.85, abs=0.002)


@pytest.mark.parametrize("options, weights", [({}, (0.8, 0.2)), ({"change_weight": 0.5}, (0.5, 0.5))])
@pytest.mark.parametrize("compensation, direction", [("sparsegpt", 1.0), ("released", -1.0), ("none", 0.0)])
def test_model_tailor_equals_its_description(
    layer: Layer, compensation: Any, direction: float, options: dict[str, float], weights: tuple[float, float]
) -> None:
    block, share = 32, 0.1
    got = model_tailor(
        layer.w_prev, layer.w_new, layer.u, tuned_share=share, block_columns=block, compensation=compensation, **options
    )
    old, new, h, u = (t.numpy() for t in (layer.w_prev, layer.w_new, layer.h, layer.u))
    reset = np.zeros_like(old, dtype=bool)
    for b0 in range(0, old.shape[1], block):
        part = slice(b0, min(old.shape[1], b0 + block))
        now = surgeon(new, old, h, reset, direction)[:, part]
        score = np.zeros_like(now)
        for weight, values in zip(weights, (np.abs(new - old)[:, part], now**2 / np.diag(u)[part] ** 2), strict=True):
            score += weight * (values - values.mean(1, keepdims=True)) / values.std(1, ddof=1, keepdims=True)
        keep = int(share * score.size + 0.5)
        threshold = np.sort(score.ravel())[-keep]
        reset[:, part] = score < threshold
    want = surgeon(new, old, h, reset, direction)
    np.testing.assert_allclose(got.weight.numpy(), want, rtol=1e-8, atol=1e-8)
    assert got.tuned_share == pytest.approx(share, abs=0.01)
    assert bool((got.weight.numpy()[reset] == old[reset]).all())


def test_compensation_lowers_the_output_error_and_the_released_sign_raises_it(layer: Layer) -> None:
    error = {
        c: layer.output_error(
            model_tailor(layer.w_prev, layer.w_new, layer.u, compensation=c, tuned_share=0.5).weight,  # type: ignore[arg-type]
            layer.w_new,
        )
        for c in ("sparsegpt", "none", "released")
    }
    assert error["sparsegpt"] < error["none"] < error["released"]


def test_safelora_projects_only_what_strays() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 30, generator=g), torch.randn(20, 4, generator=g)
    v = torch.randn(20, 30, generator=g)
    c = v.double() @ v.double().T / v.double().norm()
    ba = b.double() @ a.double()
    want = float(torch.nn.functional.cosine_similarity((c @ ba).flatten(), ba.flatten(), dim=0))
    above = safelora(a, b, v, threshold=want - 0.01)
    below = safelora(a, b, v, threshold=want + 0.01)
    assert above.cosine == pytest.approx(want, abs=1e-6)
    assert not above.projected and above.lora_b is b
    assert below.projected
    torch.testing.assert_close(below.lora_b.double(), c @ b.double(), rtol=1e-4, atol=1e-4)
    nothing = safelora(a, torch.zeros(20, 4), v)
    assert not bool(nothing.lora_b.any())
    with pytest.raises(ValueError, match="aligned and the unaligned weight are the same"):
        safelora(a, b, torch.zeros(20, 30))
    with pytest.raises(ValueError, match=r"update is \(20, 29\) and the alignment \(20, 30\)"):
        safelora(None, torch.zeros(20, 29), v)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (7, 90), (90, 7)])
def test_safelora_of_an_update_without_factors_is_the_same(shape) -> None:
    g = torch.Generator().manual_seed(0)
    v, d = torch.randn(*shape, generator=g), torch.randn(*shape, generator=g)
    c = v.double() @ v.double().T / v.double().norm()
    want = float(torch.nn.functional.cosine_similarity((c @ d.double()).flatten(), d.double().flatten(), dim=0))
    for threshold, projected in ((want + 0.01, True), (want - 0.01, False)):
        whole = safelora(None, d, v, threshold=threshold)
        factored = safelora(torch.eye(shape[1]), d, v, threshold=threshold)
        assert whole.projected is factored.projected is projected
        assert whole.cosine == pytest.approx(want, abs=1e-6) and factored.cosine == pytest.approx(want, abs=1e-6)
        torch.testing.assert_close(whole.lora_b, factored.lora_b, rtol=1e-5, atol=1e-5)
    assert whole.lora_b is d


def test_trim_keeps_the_largest() -> None:
    d = torch.tensor([[1.0, -5.0, 0.5], [3.0, -0.1, 2.0]])
    assert trim(d, 0.5).tolist() == [[0.0, -5.0, 0.0], [3.0, 0.0, 2.0]]
    assert torch.equal(trim(d, 1.0), d) and not bool(trim(d, 0.0).any())


def test_ties_elects_a_sign_and_averages_what_agrees() -> None:
    deltas = [torch.tensor([[1.0, -2.0, 4.0, 0.1]]), torch.tensor([[3.0, 1.0, -1.0, 0.1]])]
    assert ties(deltas, density=1.0).tolist() == [[2.0, -2.0, 4.0, pytest.approx(0.1)]]
    # Trimmed to half: (0, -2, 4, 0) and (3, 1, -1, 0), where 1 and -1 tie at the threshold and both stay; an entry that
    # was trimmed does not count in a mean.
    assert ties(deltas, density=0.5).tolist() == [[3.0, -2.0, 4.0, 0.0]]


def test_cgm_weighs_each_entry_by_who_needs_it() -> None:
    """Against the formula, entry by entry; nobody's entries are taken back, a first task keeps what it needs."""
    g = torch.Generator().manual_seed(0)
    delta, own, before = torch.randn(5, 6, generator=g), torch.rand(5, 6, generator=g), torch.rand(5, 6, generator=g)
    own[0, 0] = before[0, 0] = 0.0
    found = cgm(delta, own, before, alpha=0.7)
    for i in range(5):
        for j in range(6):
            d, f, p = float(delta[i, j]), float(own[i, j]), 0.7 * float(before[i, j])
            assert float(found[i, j]) == pytest.approx(d * f / (f + p) if f + p else 0.0, rel=1e-5)
    zeros = torch.zeros_like(own)
    for first in (cgm(delta, own, zeros), cgm(delta, own, before, alpha=0.0)):
        assert torch.equal(first, torch.where(own > 0, delta, 0.0))
    assert not bool(cgm(delta, zeros, zeros).any())
    for merge in (cgm, cgm_plus):
        with pytest.raises(ValueError, match="alpha=-1"):
            merge(delta, own, before, alpha=-1)
        with pytest.raises(ValueError, match="expected one shape"):
            merge(delta, own[1:], before)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.95, 1.0])
def test_cgm_plus_keeps_of_each_row_what_costs_old_tasks_least(kept) -> None:
    """Against a sort of Python's, row by row; equal costs go by place."""
    g = torch.Generator().manual_seed(1)
    delta, own, before = torch.randn(4, 21, generator=g), torch.rand(4, 21, generator=g), torch.rand(4, 21, generator=g)
    own[1], before[1] = 0.0, 0.0  # nobody's row: all costs are equal
    found = cgm_plus(delta, own, before, alpha=0.7, kept=kept)
    for i in range(4):
        cost = [(0.7 * before[i, j] - own[i, j]).item() * delta[i, j].item() ** 2 for j in range(21)]
        stay = set(sorted(range(21), key=lambda j: (cost[j], j))[: int(kept * 21)])
        assert found[i].tolist() == [delta[i, j].item() if j in stay else 0.0 for j in range(21)]
    with pytest.raises(ValueError, match="kept"):
        cgm_plus(delta, own, before, kept=1.1)


def test_a_least_squares_merge_is_the_minimum_that_recursion_reaches() -> None:
    """Against the normal equations over full matrices, and against recursive least squares, task by task."""
    g = torch.Generator().manual_seed(0)
    r, c, ranks = 5, 12, (3, 2, 4)
    rows = [torch.randn(k, c, generator=g).double() for k in ranks]
    columns = [torch.randn(r, k, generator=g).double() for k in ranks]
    ridge = 0.05
    found = least_squares_merge(rows, columns, ridge=ridge)
    lam = ridge * float(torch.cat(rows).square().sum(1).mean())
    left, right = lam * torch.eye(c, dtype=torch.float64), torch.zeros(r, c, dtype=torch.float64)
    inverse, merged = torch.eye(c, dtype=torch.float64) / lam, torch.zeros(r, c, dtype=torch.float64)
    for a, b in zip(rows, columns, strict=True):
        left, right = left + a.T @ a, right + b @ a @ a.T @ a
        gain = inverse @ a.T @ torch.linalg.inv(torch.eye(a.shape[0]).double() + a @ inverse @ a.T)
        merged = merged + (b @ a @ a.T - merged @ a.T) @ gain.T
        inverse = inverse - gain @ a @ inverse
    torch.testing.assert_close(found, right @ torch.linalg.inv(left))
    torch.testing.assert_close(found, merged)


def test_a_least_squares_merge_keeps_tasks_that_read_apart_whole() -> None:
    rows, columns = [torch.eye(6)[:2], torch.eye(6)[2:5]], [torch.ones(4, 2), torch.full((4, 3), 2.0)]
    both = columns[0] @ rows[0] + columns[1] @ rows[1]
    torch.testing.assert_close(least_squares_merge(rows, columns, ridge=1e-9), both)
    # Two tasks that read alike meet in the middle.
    torch.testing.assert_close(
        least_squares_merge([rows[0]] * 2, [columns[0], 3 * columns[0]], ridge=1e-9), 2 * columns[0] @ rows[0]
    )
    assert not bool(least_squares_merge([torch.zeros(2, 6)], [torch.ones(4, 2)]).any())
    with pytest.raises(ValueError, match="0 A and 0 B"):
        least_squares_merge([], [])
    with pytest.raises(ValueError, match="ridge=0"):
        least_squares_merge(rows, columns, ridge=0)


@pytest.mark.parametrize("density", [0.001, 0.03, 0.2, 0.5, 0.77, 1.0])
def test_a_shared_threshold_is_that_of_all_entries_together(density: float) -> None:
    """Against a sort of all of them; magnitudes over eleven orders, zeros and equal ones among them."""
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(7, 9, generator=g) * scale for scale in (1e-8, 1e-3, 1.0, 30.0)]
    parts += [torch.zeros(3, 2), torch.full((5,), 0.25), -torch.full((5,), 0.25), torch.ones(4, dtype=torch.bfloat16)]
    sizes = torch.cat([p.float().flatten() for p in parts]).abs().sort(descending=True).values
    keep = int(density * sizes.numel() + 0.5)
    found = shared_threshold(lambda: iter(parts), density)
    assert found == (float(sizes[keep - 1]) if keep else float("inf"))


def test_ties_with_shared_thresholds_trims_layers_together() -> None:
    """A layer that changed little is trimmed away whole, where each layer for itself would keep its share."""
    large, small = torch.tensor([[4.0, -3.0, 2.0, 1.0]]), torch.tensor([[0.4, -0.3, 0.2, 0.1]])
    threshold = shared_threshold(lambda: iter([large, small]), 0.5)
    assert threshold == 1.0
    assert ties([large], thresholds=[threshold]).tolist() == large.tolist()
    assert ties([small], thresholds=[threshold]).tolist() == [[0.0] * 4]
    assert ties([small], density=0.5).tolist() == [[pytest.approx(0.4), pytest.approx(-0.3), 0.0, 0.0]]
    with pytest.raises(ValueError, match="1 thresholds for 2 changes"):
        ties([large, small], thresholds=[1.0])


def test_dare_keeps_the_expectation_and_the_seed() -> None:
    d = torch.ones(400, 400)
    drawn = [dare(d, drop=0.9, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert sorted(drawn[0].unique().tolist()) == [0.0, pytest.approx(10.0)]
    assert float(drawn[0].mean()) == pytest.approx(1.0, abs=0.03)
    assert float(dare(d, drop=0.9, generator=torch.Generator(), rescale=False).max()) == 1.0


def test_low_precision_weights_come_back_in_their_dtype(layer: Layer) -> None:
    for edit in (safe_delta, model_tailor):
        got = edit(layer.w_prev.bfloat16(), layer.w_new.bfloat16(), layer.u)
        assert got.weight.dtype == torch.bfloat16 and got.weight.is_contiguous()


def test_bad_input_is_named(layer: Layer) -> None:
    with pytest.raises(ValueError, match=r"inverse_factor is \(69, 69\); expected \(70, 70\)"):
        safe_delta(layer.w_prev, layer.w_new, layer.u[1:, 1:])
    with pytest.raises(ValueError, match="protected_share=2"):
        safe_delta(layer.w_prev, layer.w_new, layer.u, protected_share=2)
    with pytest.raises(ValueError, match="strength=-1"):
        safe_delta(layer.w_prev, layer.w_new, layer.u, strength=-1)
    with pytest.raises(ValueError, match="change_weight=2"):
        model_tailor(layer.w_prev, layer.w_new, layer.u, change_weight=2)
    with pytest.raises(ValueError, match="at least one entry"):
        shared_threshold(lambda: iter(()), 0.5)
    with pytest.raises(ValueError, match="expected one of sparsegpt, released, none"):
        model_tailor(layer.w_prev, layer.w_new, layer.u, compensation="obs")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"w_prev is \(9, 70\) and w_new is \(9, 69\)"):
        model_tailor(layer.w_prev, layer.w_new[:, 1:], layer.u)
    with pytest.raises(ValueError, match=r"density=-0\.1"):
        trim(layer.w_prev, -0.1)
    with pytest.raises(ValueError, match="at least one change"):
        ties([])
    with pytest.raises(ValueError, match=r"drop=1\.0"):
        dare(layer.w_prev, drop=1.0, generator=torch.Generator())


def test_safelora_says_which_factors_do_not_belong_together() -> None:
    a, b, v = torch.ones(2, 6), torch.ones(5, 2), torch.ones(5, 6)
    with pytest.raises(ValueError, match=r"expected \(rank, c\) and \(r, rank\)"):
        safelora(torch.ones(3, 6), b, v)
    with pytest.raises(ValueError, match="The adapter is of another layer"):
        safelora(a, b, torch.ones(5, 7))
