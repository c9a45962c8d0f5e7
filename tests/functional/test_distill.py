"""The distillation term against its definition, written out in float64."""

from __future__ import annotations

import pytest
import torch

from holdfast.functional.distill import next_token_kl, squared_gradients


def test_divergence_is_the_mean_over_target_positions():
    g = torch.Generator().manual_seed(0)
    new, old = torch.randn(2, 5, 7, generator=g), torch.randn(2, 5, 7, generator=g)
    labels = torch.full((2, 5), -100)
    labels[0, 2], labels[0, 4], labels[1, 1] = 3, 1, 6
    temperature = 2.0
    parts = []
    for row, position in ((0, 1), (0, 3), (1, 0)):  # one before each target
        p = torch.softmax(old[row, position].double() / temperature, 0)
        q = torch.softmax(new[row, position].double() / temperature, 0)
        parts.append(float((p * (p.log() - q.log())).sum()))
    assert float(next_token_kl(new, old, labels, temperature=temperature)) == pytest.approx(sum(parts) / 3, rel=1e-5)


def test_equal_models_diverge_by_nothing_and_no_target_gives_zero_with_a_gradient():
    logits = torch.randn(1, 4, 6, requires_grad=True)
    labels = torch.tensor([[-100, 2, 3, -100]])
    assert float(next_token_kl(logits, logits.detach(), labels).detach()) == pytest.approx(0, abs=1e-6)
    none = next_token_kl(logits, logits.detach(), torch.full((1, 4), -100))
    none.backward()
    assert float(none.detach()) == 0 and logits.grad is not None


def test_squared_gradients_are_of_what_has_one():
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    (3 * a).sum().backward()
    found = squared_gradients({"a": a, "b": b})
    assert list(found) == ["a"] and found["a"].tolist() == [9.0, 9.0]
