"""GuardSpace's start and projector, against their definition."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch

from holdfast.functional.guardspace import guarded_start, unseen

ROWS, COLUMNS, RANK = 9, 14, 4


@pytest.fixture
def inputs() -> torch.Tensor:
    """Inputs of forbidden requests: 200 of them, nearly all along five directions."""
    g = torch.Generator().manual_seed(0)
    strong = torch.randn(200, 5, generator=g) @ torch.randn(5, COLUMNS, generator=g)
    return (strong + 1e-3 * torch.randn(200, COLUMNS, generator=g)).double()


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))


def test_the_start_is_the_part_of_the_weight_that_safety_uses_least(weight, inputs):
    """The components of W C with the smallest singular values, through C^-1: together they are W."""
    covariance = inputs.T @ inputs
    whole = guarded_start(weight, covariance, rank=ROWS)
    torch.testing.assert_close(whole.lora_b @ whole.lora_a, weight, rtol=1e-3, atol=1e-3)
    least = guarded_start(weight, covariance, rank=RANK)
    damped = covariance / covariance.diagonal().mean() + 0.01 * torch.eye(COLUMNS)
    u, s, vh = torch.linalg.svd(weight.double() @ damped, full_matrices=False)
    want = u[:, -RANK:] @ torch.diag(s[-RANK:]) @ vh[-RANK:] @ torch.linalg.inv(damped)
    torch.testing.assert_close((least.lora_b @ least.lora_a).double(), want, rtol=1e-4, atol=1e-4)
    # Split evenly, whatever C's scale.
    torch.testing.assert_close(least.lora_a.norm(), least.lora_b.norm(), rtol=1e-4, atol=1e-4)
    scaled = guarded_start(weight, 1e6 * covariance, rank=RANK)
    torch.testing.assert_close(scaled.lora_b @ scaled.lora_a, least.lora_b @ least.lora_a, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("energy, most", [(0.0, 0), (0.5, 3), (0.99, 5)])
def test_what_forbidden_requests_hold_is_not_read(weight, inputs, energy, most):
    seen = guarded_start(weight, inputs.T @ inputs, rank=RANK, energy=energy).seen
    assert seen.shape[1] <= most and (seen.shape[1] > 0) is (energy > 0)
    torch.testing.assert_close(seen.T @ seen, torch.eye(seen.shape[1]), rtol=1e-4, atol=1e-4)
    rows = unseen(torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(2)), seen)
    left = (inputs.float() - inputs.float() @ seen @ seen.T).square().sum() / inputs.square().sum()
    assert float(left) <= 1 - energy + 1e-3
    assert float((rows @ seen).abs().max()) < 1e-5 if seen.shape[1] else True


@pytest.mark.parametrize("null_below, blocked", [(0.5, 2), (1e-4, 5), (1e-12, COLUMNS - 1)])
def test_a_floor_blocks_each_direction_above_it(weight, inputs, null_below, blocked):
    covariance = inputs.T @ inputs
    values = torch.linalg.eigvalsh(covariance)
    assert min(int((values > null_below * values[-1]).sum()), COLUMNS - 1) == blocked
    seen = guarded_start(weight, covariance, rank=RANK, null_below=null_below).seen
    assert seen.shape == (COLUMNS, blocked)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 2, "null_below": 0.0}, r"null_below=0\.0"),
        ({"rank": 2, "null_below": 1.0}, r"null_below=1\.0"),
        ({"rank": 0}, "rank=0; expected 1 to 9"),
        ({"rank": 10}, "rank=10"),
        ({"rank": 2, "energy": 1.0}, r"energy=1\.0"),
        ({"rank": 2, "damping": 0.0}, r"damping=0\.0"),
    ],
)
def test_bad_input_is_named(weight, inputs, options, message):
    with pytest.raises(ValueError, match=message):
        guarded_start(weight, inputs.T @ inputs, **options)


def test_a_covariance_that_does_not_belong_or_saw_nothing_is_named(weight, inputs):
    with pytest.raises(ValueError, match=r"covariance is \(13, 13\); expected \(14, 14\)"):
        guarded_start(weight, torch.eye(13), rank=2)
    with pytest.raises(ValueError, match="covariance is zero"):
        guarded_start(weight, torch.zeros(14, 14), rank=2)


@pytest.mark.parametrize("rows, columns", [(9, 14), (14, 9)])
def test_the_start_is_that_of_cordas_knowledge_preserved_mode_in_peft(rows, columns, monkeypatch):
    """Components by PEFT's code, on the same covariance, cut to the last ones as its "kpm" does."""
    # PEFT's file takes a decorator from `attr`, which PEFT does not ask for.
    monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclasses.dataclass))
    from peft import LoraConfig
    from peft.tuners.lora.corda import collect_eigens_for_layer

    g = torch.Generator().manual_seed(3)
    linear = torch.nn.Linear(columns, rows, bias=False)
    linear.weight.data.normal_(generator=g)
    x = torch.randn(200, columns, generator=g)
    linear.covariance_matrix = x.T @ x  # type: ignore[assignment]
    theirs = collect_eigens_for_layer(linear, LoraConfig())
    u, s, v = (part[..., -RANK:] for part in (theirs.U_WC, theirs.S_WC, theirs.V_WC))
    ours = guarded_start(linear.weight.detach(), linear.covariance_matrix, rank=RANK)
    torch.testing.assert_close(ours.lora_b @ ours.lora_a, (u * s @ v.T).detach(), rtol=1e-3, atol=1e-4)
