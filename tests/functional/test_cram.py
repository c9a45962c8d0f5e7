"""CRAM's mathematics: properties, and a slow float64 reference."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import ConfigError, NumericalError
from holdfast.functional import cram


def factors(r: int = 16, width: int = 40, out: int = 56, seed: int = 0, dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(r, width, generator=g, dtype=dtype), torch.randn(out, r, generator=g, dtype=dtype)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def everything(r: int) -> cram.RankRule:
    return cram.RankRule(r_min=1, r_max=r, tau_alloc=0.0, tau_novel=0.0)


def reference_expert(a, b, history_rows, rule: cram.RankRule) -> torch.Tensor:
    """The update B_e A_e in float64 from the full (out, in) product; no padding, history given as raw rows."""
    u, s, vh = torch.linalg.svd(b.double() @ a.double(), full_matrices=False)
    k = min(a.shape)
    projector = torch.eye(a.shape[1], dtype=torch.float64)
    if history_rows is not None:
        h = history_rows.double()
        projector -= torch.linalg.pinv(h) @ h
    rows = 0 if history_rows is None else int(torch.linalg.matrix_rank(history_rows.double()))
    bar = rule.tau_alloc * s[0] if rule.alloc == "relative" else rule.tau_alloc
    level = rule.tau_novel * (math.sqrt(1 - rows / a.shape[1]) if rule.novelty == "chance" else 1)
    update = torch.zeros(b.shape[0], a.shape[1], dtype=torch.float64)
    kept = 0
    for j in range(k):
        v = projector @ vh[j]
        if (s[j] > bar or j == 0) and v.norm() > level and kept < rule.r_max:
            update += s[j] * min(1.0, 1.1 * float(v.norm())) * torch.outer(u[:, j], v / v.norm())
            kept += 1
    return update


def test_product_svd_equals_the_svd_of_the_product():
    a, b = factors()
    u, s, vh = cram.product_svd(a, b)
    full = torch.linalg.svdvals(b.double() @ a.double())[:16]
    torch.testing.assert_close(s.double(), full, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(u @ torch.diag(s) @ vh, b @ a, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(vh @ vh.T, torch.eye(16), rtol=0, atol=1e-5)


def test_full_rank_and_no_history_reproduce_the_buffer():  # (a)
    a, b = factors()
    expert = cram.expert_from_buffer(a, b, None, everything(16), generator=seeded())
    product = b @ a
    error = (expert.lora_b @ expert.lora_a - product).norm() / product.norm()
    assert expert.rank == 16 and expert.padded == 0
    assert error < 1e-5
    assert expert.energy == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("novelty", ["chance", "absolute"])
@pytest.mark.parametrize("alloc,tau", [("relative", 0.3), ("absolute", 15.0)])
def test_expert_matches_the_slow_reference_in_float64(novelty, alloc, tau):
    a, b = factors(dtype=torch.float64)
    b = b * 0.88 ** torch.arange(16)
    history = torch.randn(9, 40, generator=seeded(5), dtype=torch.float64)
    tau_novel = 1.0 if novelty == "chance" else 0.9
    rule = cram.RankRule(r_min=1, r_max=12, tau_alloc=tau, alloc=alloc, tau_novel=tau_novel, novelty=novelty)
    expert = cram.expert_from_buffer(a, b, cram.row_basis([history]), rule, generator=seeded())
    expected = reference_expert(a, b, history, rule)
    assert expert.padded == 0 and expert.rank < expert.strong < 16, (
        "the thresholds must bite for this test to mean something"
    )
    torch.testing.assert_close(expert.lora_b @ expert.lora_a, expected, rtol=1e-8, atol=1e-8)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    history_rows=st.integers(0, 36),
    decay=st.floats(0.1, 1.0),
    r_min=st.integers(1, 6),
    extra=st.integers(0, 6),
)
def test_rank_stays_in_bounds_and_rows_stay_off_history(seed, history_rows, decay, r_min, extra):  # (b), (c)
    a, b = factors(seed=seed)
    b = b * decay ** torch.arange(16)
    basis = cram.row_basis([torch.randn(history_rows, 40, generator=seeded(seed + 1))], 40)
    rule = cram.RankRule(r_min=r_min, r_max=r_min + extra)
    expert = cram.expert_from_buffer(a, b, basis, rule, generator=seeded())
    assert r_min <= expert.rank <= r_min + extra
    assert bool(torch.isfinite(expert.lora_a).all())
    if not expert.overlapping:
        unit = torch.nn.functional.normalize(expert.lora_a, dim=1)
        assert float((unit @ basis).abs().max() if basis.shape[1] else 0) < 1e-5


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    history_rows=st.integers(0, 40),
    decay=st.floats(0.3, 1.0),
    tau_novel=st.floats(0.0, 1.0),
    novelty=st.sampled_from(["chance", "absolute"]),
    fixed=st.booleans(),
)
def test_an_expert_starts_no_larger_than_what_the_buffer_learnt_off_history(
    seed, history_rows, decay, tau_novel, novelty, fixed
):
    a, b = factors(seed=seed)
    b = b * decay ** torch.arange(16)
    basis = cram.row_basis([torch.randn(history_rows, 40, generator=seeded(seed + 1))], 40)
    rule = cram.RankRule(tau_novel=tau_novel, novelty=novelty, fixed=fixed)
    expert = cram.expert_from_buffer(a, b, basis, rule, generator=seeded())
    off_history = cram.residual(b @ a, basis).norm()
    # Rows that overlap for want of room keep the buffer's own strength.
    padding = (b @ a).norm() if expert.overlapping else 0.0
    assert float((expert.lora_b @ expert.lora_a).norm()) <= 1.1 * float(off_history) + float(padding) + 1e-4
    assert fixed or expert.novel <= 40 - basis.shape[1]


@pytest.mark.parametrize("width,history_rows", [(192, 0), (192, 10), (192, 30), (4096, 300)])
def test_where_history_is_small_novel_directions_keep_the_buffers_strength_split_evenly(width, history_rows):
    """Spec step 5: row j of A and column j of B both have length sqrt(S_j)."""
    a, b = factors(48, width, 64)
    b = b * 0.8 ** torch.arange(48)
    history = cram.row_basis([torch.randn(history_rows, width, generator=seeded(3))], width)
    expert = cram.expert_from_buffer(a, b, history, cram.RankRule(r_min=1), generator=seeded())
    u, s, vh = cram.product_svd(a, b)
    level = 0.99 * cram.chance_novelty(history.shape[1], width)
    novel = [j for j in range(48) if s[j] > 0.2 * s[0] and float(cram.residual(vh, history)[j].norm()) > level][:10]
    assert expert.padded == 0 and expert.rank == len(novel) >= 3
    torch.testing.assert_close(expert.lora_a.norm(dim=1), s[novel].sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(expert.lora_b, u[:, novel] * s[novel].sqrt(), rtol=1e-5, atol=1e-5)


def test_an_all_novel_buffer_is_cut_to_r_max():  # (b)
    a, b = factors()
    expert = cram.expert_from_buffer(a, b, None, cram.RankRule(r_min=4, r_max=10), generator=seeded())
    assert (expert.rank, expert.padded) == (10, 0)


def test_an_all_redundant_buffer_is_padded_with_fresh_rows_that_write_nothing():  # (b), (c)
    a, b = factors()
    basis = cram.row_basis([a])
    expert = cram.expert_from_buffer(a, b, basis, cram.RankRule(r_min=4, r_max=10), generator=seeded())
    assert (expert.rank, expert.novel, expert.fresh, expert.energy) == (4, 0, 4, 0)
    assert not expert.lora_b.any()
    assert float((expert.lora_a @ basis).abs().max()) < 1e-5
    torch.testing.assert_close(expert.lora_a.norm(dim=1), torch.full((4,), cram.FRESH_ROW_NORM))


def test_padding_takes_what_the_buffer_learnt_most_of_off_history_and_does_not_amplify_it():
    width = 40
    v = torch.linalg.qr(torch.randn(width, 6, generator=seeded(1)))[0].T
    hidden = torch.linalg.qr(torch.randn(56, 6, generator=seeded(2)))[0]
    strength = torch.tensor([8.0, 7.0, 6.0, 5.0, 4.0, 3.0])
    # History covers direction j up to a residual of novelty[j].
    novelty = torch.tensor([0.1, 0.6, 0.0, 0.3, 0.8, 0.2])
    extra = torch.linalg.qr(torch.cat([v, torch.randn(10, width, generator=seeded(3))]).T)[0].T[6:12]
    history = cram.row_basis([(1 - novelty**2).sqrt()[:, None] * v + novelty[:, None] * extra])
    rule = cram.RankRule(r_min=3, r_max=6, tau_novel=0.99, novelty="absolute")
    expert = cram.expert_from_buffer(v, hidden * strength, history, rule, generator=seeded())
    assert (expert.rank, expert.novel, expert.padded, expert.fresh) == (3, 0, 3, 0)
    order = [1, 4, 3]  # 4.2, 3.2, 1.5
    expected = strength[order] * novelty[order]
    torch.testing.assert_close(expert.lora_b.norm(dim=0) * expert.lora_a.norm(dim=1), expected, rtol=1e-4, atol=1e-4)


def test_a_history_that_spans_everything_overlaps_and_says_so():
    a, b = factors()
    basis = cram.row_basis([torch.eye(40)])
    expert = cram.expert_from_buffer(a, b, basis, cram.RankRule(r_min=4, r_max=10), generator=seeded())
    assert (expert.rank, expert.overlapping, expert.fresh) == (4, 4, 0)


def test_a_buffer_that_learnt_nothing_gives_an_ordinary_lora_start():
    a, b = factors()
    expert = cram.expert_from_buffer(a, torch.zeros_like(b), None, cram.RankRule(), generator=seeded())
    assert (expert.rank, expert.fresh) == (4, 4)
    assert expert.lora_a.any() and not expert.lora_b.any()


def test_fixed_rank_ignores_thresholds_and_double_scale_doubles_the_update():
    a, b = factors()
    b = b * 0.3 ** torch.arange(16)
    rule = cram.RankRule(r_min=2, r_max=10, fixed=True)
    once = cram.expert_from_buffer(a, b, None, rule, generator=seeded())
    twice = cram.expert_from_buffer(a, b, None, rule, scale=2.0, generator=seeded())
    assert once.rank == 10
    torch.testing.assert_close(twice.lora_b @ twice.lora_a, 2 * (once.lora_b @ once.lora_a))


def test_capping_first_can_lose_novel_directions():
    width = 40
    v = torch.linalg.qr(torch.randn(width, 8, generator=seeded(1)))[0].T
    b = torch.linalg.qr(torch.randn(56, 8, generator=seeded(2)))[0] * torch.arange(8, 0, -1.0)
    history = cram.row_basis([v[:4]])
    rule = cram.RankRule(r_min=1, r_max=4, tau_alloc=0.1)
    after = cram.expert_from_buffer(v, b, history, rule, generator=seeded())
    first = cram.expert_from_buffer(v, b, history, replace(rule, cap_first=True), generator=seeded())
    assert (after.novel, first.novel) == (4, 0)


def test_basis_ignores_repeated_and_tiny_rows():
    rows = torch.randn(3, 20, generator=seeded())
    basis = cram.row_basis([rows, rows * 1e-6, torch.zeros(2, 20)])
    assert basis.shape == (20, 3)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3), rtol=0, atol=1e-5)


def test_chance_novelty_is_what_random_directions_show():
    d, k = 400, 100
    basis = cram.row_basis([torch.randn(k, d, generator=seeded(1))])
    v = torch.nn.functional.normalize(torch.randn(500, d, generator=seeded(2)), dim=1)
    measured = cram.residual(v, basis).norm(dim=1).square().mean().sqrt()
    assert float(measured) == pytest.approx(cram.chance_novelty(k, d), rel=0.01)


def test_routing_sums_to_one_and_has_both_limits():  # (d)
    v, c = torch.randn(7, 12, generator=seeded(1)), torch.randn(4, 12, generator=seeded(2))
    members = torch.tensor([[True, True, False, True]] * 6 + [[False] * 4])
    middle = cram.routing_weights(v, c, 2.0, members)
    torch.testing.assert_close(middle.sum(-1), torch.tensor([1.0] * 6 + [0.0]))
    assert not middle[:, 2].any()
    reference = torch.softmax(-(torch.cdist(v.double(), c.double()) ** 2)[:6][:, [0, 1, 3]] / 8, -1)
    torch.testing.assert_close(middle[:6][:, [0, 1, 3]].double(), reference, rtol=1e-5, atol=1e-6)
    distance = torch.cdist(v, c).masked_fill(~members, math.inf)
    for sigma in (0.0, 1e-20):
        hard = cram.routing_weights(v, c, sigma, members)
        assert torch.equal(hard[:6].argmax(-1), distance[:6].argmin(-1))
        torch.testing.assert_close(hard[:6].amax(-1), torch.ones(6))
    flat = cram.routing_weights(v, c, math.inf, members)
    torch.testing.assert_close(flat[:6], members[:6] / 3.0)


def test_routing_of_a_sample_does_not_depend_on_its_batch():  # (g)
    v, c = torch.randn(9, 33, generator=seeded(1)) * 10, torch.randn(4, 33, generator=seeded(2)) * 10
    members, sigma = torch.ones(9, 4, dtype=torch.bool), torch.linspace(0.5, 3, 9)
    together = cram.routing_weights(v, c, sigma, members)
    order = torch.randperm(9, generator=seeded(3))
    assert torch.equal(cram.routing_weights(v[order], c, sigma[order], members), together[order])
    alone = torch.cat([cram.routing_weights(v[i : i + 1], c, sigma[i : i + 1], members[:1]) for i in range(9)])
    assert torch.equal(alone, together)


def test_routing_with_a_centroid_per_block_and_its_gradient():
    v = torch.randn(3, 12, generator=seeded(1))
    c = torch.randn(5, 4, 12, generator=seeded(2), requires_grad=True)
    members = torch.tensor([[True, True, False, True]] * 2 + [[False] * 4])
    weights = cram.routing_weights(v, c, 2.0, members)
    assert weights.shape == (3, 5, 4)
    torch.testing.assert_close(weights[:, 2], cram.routing_weights(v, c[2].detach(), 2.0, members))
    (weights[..., 0]).sum().backward()
    assert bool(torch.isfinite(c.grad).all()) and not c.grad[:, 2].any()
    assert bool(c.grad[:, [0, 1, 3]].any(-1).all()), "the nearest centroid's gradient flows like the others'"
    with torch.no_grad():
        direction = torch.randn(5, 4, 12, generator=seeded(3))
        moved = [cram.routing_weights(v, c + h * direction, 2.0, members)[..., 0].sum() for h in (-1e-2, 1e-2)]
    torch.testing.assert_close((c.grad * direction).sum(), (moved[1] - moved[0]) / 2e-2, rtol=1e-2, atol=1e-4)


def test_instruction_vector_is_a_plain_layer_norm_and_cosine_is_bounded():
    t = cram.instruction_vector(torch.randn(4, 32, generator=seeded()) * 3 + 5)
    torch.testing.assert_close(t.mean(-1), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(t.var(-1, unbiased=False), torch.ones(4), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(cram.cosine_similarity(t, t).diagonal(), torch.ones(4))


@pytest.mark.parametrize(  # (j): the level-1 table, row by row
    "similarities,max_groups,group,rule",
    [
        ([], None, None, "first"),
        ([0.81], None, 0, "similar"),
        ([0.80], None, None, "unlike"),
        ([0.10], 1, 0, "limit"),
        ([0.30, 0.55], None, 1, "margin"),
        ([0.95, 0.90], None, None, "ambiguous"),
        ([0.95, 0.90], 3, None, "ambiguous"),
        ([0.95, 0.90], 2, 0, "limit"),
        ([0.1, 0.9, 0.2], 3, 1, "margin"),
        ([-0.5, -0.2, -0.9], None, 1, "margin"),
    ],
)
def test_group_decision_follows_the_table(similarities, max_groups, group, rule):
    decision = cram.decide_group(similarities, max_groups=max_groups)
    assert (decision.group, decision.rule) == (group, rule)


@pytest.mark.parametrize(
    "similarities,max_groups,group,rule",
    [
        ([0.30, 0.55], None, None, "unlike"),
        ([0.30, 0.85], None, 1, "margin"),
        ([0.80, 0.85], None, None, "ambiguous"),
        ([0.30, 0.55], 2, 1, "limit"),
        ([0.81], None, 0, "similar"),
    ],
)
def test_a_floor_keeps_a_task_out_of_a_group_that_is_only_less_unlike(similarities, max_groups, group, rule):
    decision = cram.decide_group(similarities, max_groups=max_groups, floor=0.8)
    assert (decision.group, decision.rule) == (group, rule)


def test_an_expert_claims_only_what_reaches_its_floor_within_the_group():
    similarities = torch.tensor([[0.9, 0.2], [0.5, 0.95], [0.5, 0.2]])
    members = torch.tensor([[True, False], [True, False], [True, True]])
    assert cram.claims(similarities, torch.tensor([0.8, 0.1]), members).tolist() == [True, False, True]


def test_penalty_is_zero_exactly_when_outputs_avoid_history():  # (f)
    basis = cram.column_basis([torch.randn(30, 6, generator=seeded(1))])
    z = torch.randn(4, 30, generator=seeded(2))
    inside = z @ basis @ basis.T
    mass = torch.tensor([1.0, 0.5, 0.25, 0.0])
    assert float(cram.orthogonality_penalty(cram.residual(z, basis), basis, mass)) < 1e-10
    expected = (mass * inside.square().sum(1)).mean()
    torch.testing.assert_close(cram.orthogonality_penalty(z, basis, mass), expected)
    assert float(expected) > 0.1
    assert float(cram.orthogonality_penalty(z, basis, torch.zeros(4))) == 0


def test_expert_index_repeats_each_expert_by_its_rank():
    assert cram.expert_index([2, 0, 3]).tolist() == [0, 0, 2, 2, 2]


def test_bad_inputs_say_what_was_wrong():
    a, b = factors()
    with pytest.raises(ConfigError, match=r"r_min is 9 and r_max is 4"):
        cram.RankRule(r_min=9, r_max=4)
    with pytest.raises(ConfigError, match=r"raise buffer_rank or lower r_max"):
        cram.expert_from_buffer(a, b, None, cram.RankRule(r_max=17), generator=seeded())
    with pytest.raises(ConfigError, match=r"only 8 wide"):
        cram.expert_from_buffer(a, b[:8], None, cram.RankRule(r_max=9), generator=seeded())
    with pytest.raises(NumericalError, match=r"NaN or inf; the buffer diverged"):
        cram.product_svd(a * math.nan, b)
    with pytest.raises(NumericalError, match=r"do not multiply"):
        cram.product_svd(a[:3], b)
    with pytest.raises(NumericalError, match=r"prototype is damaged"):
        cram.decide_group([0.3, math.nan])
    with pytest.raises(ConfigError, match=r"max_groups is 0"):
        cram.decide_group([0.3], max_groups=0)


def test_what_is_left_of_a_nearly_redundant_direction_is_still_orthogonal_to_history():
    """One projection leaves eps / novelty of history in a direction of novelty 1e-6, once it has unit length."""
    basis = cram.row_basis([torch.randn(6, 40, generator=seeded(1))])
    other = cram.residual(torch.randn(1, 40, generator=seeded(2)), basis)
    row = (basis @ torch.randn(6, 1, generator=seeded(3))).T + 1e-5 * other
    left = torch.nn.functional.normalize(cram.residual(row, basis))
    assert float((left @ basis.to(left)).abs().max()) < 1e-5


def test_a_fixed_rank_too_keeps_nothing_that_history_holds():
    a, b = torch.eye(6, 12), torch.linalg.qr(torch.randn(20, 6, generator=seeded(4)))[0]
    history = torch.eye(12)[:, :2]  # the first two directions of the buffer, to the last bit
    rule = replace(cram.RankRule(r_min=4, r_max=4), fixed=True)
    expert = cram.expert_from_buffer(
        a * torch.tensor([[9.0], [8], [4], [3], [2], [1]]), b, history, rule, generator=seeded()
    )
    assert expert.rank == 4 and expert.novel == 2
    assert float((expert.lora_a @ history).abs().max()) == 0


SPECTRA = {
    "one strong direction, weaker ones, noise": [1, 0.19, 0.18, 0.17, *[0.001] * 12],
    "all equal": [1.0] * 16,
    "a tie across r_max": [1, *[0.9] * 15],
    "a tie across r_min": [1, 0.1, 0.1, 0.1, 0.1, 0.1, *[0.001] * 10],
    "a tie with the bar of strength": [1, *[0.2] * 15],
    "rank three": [1, 0.5, 0.25, *[0.0] * 13],
    "rank one": [1, *[0.0] * 15],
    "all apart": [0.8**j for j in range(16)],
}
RULES = {
    "default": cram.RankRule(),
    "wide": cram.RankRule(r_min=6, r_max=12),
    "all strong": cram.RankRule(tau_alloc=0.0),
    "all novel": cram.RankRule(tau_novel=0.0),
    "fully novel only": cram.RankRule(tau_novel=1.0),
    "fully novel only, absolute": cram.RankRule(tau_novel=1.0, novelty="absolute"),
    "fixed": cram.RankRule(fixed=True),
    "released": cram.RankRule(tau_alloc=0.08, alloc="absolute", novelty="absolute", cap_first=True),
    "the bar on a tie, absolute": cram.RankRule(tau_alloc=0.2, alloc="absolute"),
    "cap on a tie": cram.RankRule(r_min=2, r_max=3),
}


def planted(spectrum: list[float], seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A buffer with these singular values, as A and B of a training (neither orthogonal), and its right vectors."""
    v = torch.linalg.qr(torch.randn(40, 16, generator=seeded(seed), dtype=torch.float64))[0].T
    u = torch.linalg.qr(torch.randn(56, 16, generator=seeded(seed + 1), dtype=torch.float64))[0]
    turn = torch.linalg.qr(torch.randn(16, 16, generator=seeded(seed + 2), dtype=torch.float64))[0]
    # Well conditioned: rounding of B must stay rounding of the product.
    mix = turn @ torch.diag(torch.linspace(0.5, 2, 16, dtype=torch.float64))
    b = u @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ mix.inverse()
    return (mix @ v).float(), b.float(), v.float()


def histories(v: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """What older experts span: nothing, something unrelated, some of the buffer's own directions, halves of them."""
    half = torch.nn.functional.normalize(v[2:4] + torch.randn(2, 40, generator=seeded(7)) / 6, dim=1)
    return {
        "none": None,
        "unrelated": cram.row_basis([torch.randn(6, 40, generator=seeded(9))]),
        "own": cram.row_basis([v[1:3]]),
        "half": cram.row_basis([half]),
    }


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_a_buffer_changed_by_rounding_gives_the_same_expert(spectrum, rule):
    a, b, v = planted(spectrum, seed=3)
    for name, history in histories(v).items():
        first = cram.expert_from_buffer(a, b, history, rule, generator=seeded())
        for seed in range(4):
            noise = seeded(100 + seed)
            near_a = a + 1e-8 * torch.randn(a.shape, generator=noise)
            near_b = b + 1e-8 * torch.randn(b.shape, generator=noise)
            other = cram.expert_from_buffer(near_a, near_b, history, rule, generator=seeded())
            counts = [(e.rank, e.strong, e.novel, e.padded, e.fresh) for e in (first, other)]
            assert counts[0] == counts[1], name
            error = (first.lora_b @ first.lora_a - other.lora_b @ other.lora_a).norm()
            assert float(error) < 2e-4 * spectrum[0], (name, float(error))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), turn=st.integers(0, 10_000), ties=st.integers(2, 16))
def test_equal_directions_give_one_expert_whatever_basis_the_buffer_holds_them_in(seed, turn, ties):
    a, b, v = planted([1.0] * ties + [0.05] * (16 - ties), seed)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=seeded(turn), dtype=torch.float64))[0].float()
    for history in histories(v).values():
        first = cram.expert_from_buffer(a, b, history, cram.RankRule(), generator=seeded())
        other = cram.expert_from_buffer(rotation @ a, b @ rotation.T, history, cram.RankRule(), generator=seeded())
        torch.testing.assert_close(first.lora_b @ first.lora_a, other.lora_b @ other.lora_a, rtol=0, atol=1e-3)


def test_padding_without_history_goes_by_strength():
    a, b, _ = planted(SPECTRA["one strong direction, weaker ones, noise"], seed=1)
    expert = cram.expert_from_buffer(a, b, None, cram.RankRule(), generator=seeded())
    assert (expert.rank, expert.novel, expert.padded) == (4, 1, 3)
    found = expert.lora_b.norm(dim=0) * expert.lora_a.norm(dim=1)
    torch.testing.assert_close(found, torch.tensor([1, 0.19, 0.18, 0.17]), rtol=1e-4, atol=0)


def test_a_redundant_direction_does_not_stop_the_padding():
    """The strongest is nothing but history and comes early by strength; those behind it are still taken."""
    a, b, v = planted([1.0, 0.5, 0.4, 0.3, 0.2, *[0.01] * 11], seed=4)
    rule = cram.RankRule(r_min=4, tau_novel=1.0, novelty="absolute")
    basis = cram.row_basis([v[:1], torch.nn.functional.normalize(v[1:5] + 0.1 * v[5:9], dim=1)])
    expert = cram.expert_from_buffer(a, b, basis, rule, generator=seeded())
    assert expert.fresh == 0 and expert.rank >= 4


def test_history_that_is_rounding_noise_is_no_history():
    rows = torch.randn(3, 20, generator=seeded())
    assert cram.row_basis([rows, torch.zeros(1, 20)]).shape == (20, 3)
    assert cram.row_basis([rows, 1e-8 * torch.randn(1, 20, generator=seeded(1))]).shape == (20, 3)


@pytest.mark.parametrize("noise", [-1e-7, 0.0, 1e-7])
def test_ties_on_level_one_do_not_depend_on_rounding(noise):
    assert cram.decide_group([0.5 + noise, 0.5], max_groups=2).group == 0
    assert cram.decide_group([0.5, 0.5 + noise], max_groups=2).group == 0
    assert cram.decide_group([0.8 + noise], join_cosine=0.8).rule == "unlike"
    assert cram.decide_group([0.9 + noise, 0.8], margin=0.1).rule == "ambiguous"
    assert cram.decide_group([0.8 + noise, 0.1], floor=0.8).rule == "unlike"
    similarity = torch.tensor([[0.2, 0.7 + noise, 0.7], [0.7, 0.7 + noise, 0.2]])
    assert cram.best_group(similarity).tolist() == [1, 0]


@pytest.mark.parametrize("noise", [-1e-7, 0.0, 1e-7])
def test_experts_at_one_distance_share_whatever_rounding_says(noise):
    c = torch.tensor([[1.0 + noise, 0.0], [0.0, 1.0], [5.0, 5.0]])
    for sigma in (0.0, 0.3):
        weights = cram.routing_weights(torch.zeros(1, 2), c, sigma, torch.ones(1, 3, dtype=torch.bool))
        torch.testing.assert_close(weights, torch.tensor([[0.5, 0.5, 0.0]]), rtol=0, atol=1e-4)
