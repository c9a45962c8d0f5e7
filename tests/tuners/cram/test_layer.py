"""The fused pass against a loop over experts, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cram_kit
from holdfast.errors import AdapterError
from holdfast.tuners.cram.layer import Active, ExpertPass


def stacked(
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Linear, ExpertPass, Active, list[tuple[torch.Tensor, torch.Tensor]]]:
    g = torch.Generator().manual_seed(0)
    linear = nn.Linear(24, 40, dtype=dtype)
    active = Active()
    p = ExpertPass("q", 0, linear, active)
    pairs = [(torch.randn(r, 24, generator=g).to(dtype), torch.randn(40, r, generator=g).to(dtype)) for r in (2, 5, 1)]
    p.stack(torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1), start=3)
    linear.register_forward_hook(p.extend)
    return linear, p, active, pairs


def weights() -> tuple[torch.Tensor, torch.Tensor]:
    """pi (B, E), and rows with three foreign columns in front, as another layer's would stand."""
    pi = torch.tensor([[0.2, 0.8, 0.0], [0.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
    return pi, torch.cat([torch.full((3, 3), 9.0), pi[:, [0, 0, 1, 1, 1, 1, 1, 2]]], dim=1)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_one_pass_equals_a_loop_over_experts(dtype, tolerance, grad):
    linear, _, active, pairs = stacked(dtype)
    pi, rows = weights()
    active.set("routed", rows)
    x = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
    for e, (a, b) in enumerate(pairs):
        expected = expected + pi[:, e, None, None].double() * (x.double() @ a.double().T @ b.double().T)
    with torch.set_grad_enabled(grad):
        out = linear(x)
    assert out.dtype == dtype and out.requires_grad is grad
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(out[1], nn.functional.linear(x, linear.weight, linear.bias)[1]), "no weight, no change"


def test_weights_follow_a_layer_to_its_device():
    """The meta device stands for a second one: a product across devices is an error there too."""
    linear = nn.Linear(24, 40, device="meta")
    active = Active()
    p = ExpertPass("q", 0, linear, active)
    p.stack(torch.zeros(8, 24, device="meta"), torch.zeros(40, 8, device="meta"), start=0)
    p.train_factors(torch.zeros(2, 24, device="meta"), torch.zeros(40, 2, device="meta"), 0.0)
    linear.register_forward_hook(p.extend)
    active.set("routed", torch.ones(3, 8), torch.ones(3, 1), torch.full((3, 4), 0.25))
    out = linear(torch.zeros(3, 4, 24, device="meta"))
    assert out.device.type == "meta" and p.input_mean.device.type == "meta"


def test_beams_repeat_the_weights_of_their_sample():
    linear, _, active, _ = stacked()
    _, rows = weights()
    x = torch.randn(3, 4, 24)
    active.set("routed", rows)
    alone = linear(x)
    torch.testing.assert_close(linear(x.repeat_interleave(4, 0)), alone.repeat_interleave(4, 0))


def test_trained_factors_add_their_share_and_get_all_the_gradient():
    linear, p, active, _ = stacked()
    _, rows = weights()
    a, b = torch.randn(3, 24), torch.randn(40, 3)
    p.train_factors(a, b, dropout=0.0)
    active.set("routed", rows, trained=torch.tensor([[0.5], [1.0], [0.0]]))
    x = torch.randn(3, 4, 24)
    out = linear(x)
    active.set("routed", rows, trained=torch.zeros(3, 1))
    expected = linear(x) + torch.tensor([0.5, 1, 0])[:, None, None] * (x @ a.T @ b.T)
    torch.testing.assert_close(out, expected)
    linear.requires_grad_(False)
    active.set("routed", rows, trained=torch.ones(3, 1))
    linear(x).sum().backward()
    assert p.trained_a.grad.any() and p.trained_b.grad.any()
    assert not p.stacked_a.requires_grad and linear.weight.grad is None


def test_dropout_is_on_the_input_of_the_trained_factors_alone():
    linear, p, active, _ = stacked()
    _, rows = weights()
    a, b = torch.randn(3, 24), torch.randn(40, 3)
    x = torch.randn(3, 4, 24)
    active.set("routed", rows)
    old = linear(x)
    p.train_factors(a, b, dropout=0.25)
    p.eval()
    torch.testing.assert_close(linear(x), old + x @ a.T @ b.T)
    p.train()
    torch.manual_seed(0)
    found = linear(x)
    torch.manual_seed(0)
    torch.testing.assert_close(found, old + nn.functional.dropout(x, 0.25) @ a.T @ b.T)


def test_a_linear_of_any_class_can_be_extended():
    class Int8(nn.Module):
        """A quantised linear: integer weights, a scale, no `nn.Linear` anywhere."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.scale = linear.weight.abs().amax() / 127
            self.register_buffer("weight", (linear.weight / self.scale).round().to(torch.int8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.weight.to(x.dtype) * self.scale).T

    plain = nn.Linear(24, 40, bias=False)
    quantised, active = Int8(plain), Active()
    p = ExpertPass("q", 0, quantised, active)
    a, b = torch.randn(2, 24), torch.randn(40, 2)
    p.stack(a, b, start=0)
    quantised.register_forward_hook(p.extend)
    x = torch.randn(2, 3, 24)
    active.set("base")
    base = quantised(x)
    active.set("routed", torch.ones(2, 2))
    torch.testing.assert_close(quantised(x), base + x @ a.T @ b.T)


def test_a_pass_before_routing_or_of_another_shape_is_an_error():
    linear, _, active, _ = stacked()
    with pytest.raises(
        AdapterError, match=r"q ran before its request was routed. Ask the model within `loaded.serving"
    ):
        linear(torch.randn(3, 4, 24))
    active.set("routed", weights()[1])
    with pytest.raises(AdapterError, match=r"\(3, 24\); per-sample routing needs \(batch, tokens, 24\)"):
        linear(torch.randn(3, 24))
    with pytest.raises(AdapterError, match=r"4 sequences but 3 requests were routed"):
        linear(torch.randn(4, 4, 24))


def test_every_linear_of_a_model_gets_its_own_rows(make, requests):
    cram = make(samples=requests)
    pi = torch.tensor([[0.3, 0.7, 0.0], [0.0, 0.0, 1.0]])
    cram.activate(pi.unsqueeze(1))
    modules = dict(cram.loaded.model.named_modules())
    ranks = {p.stacked_a.shape[0] for p in cram.layers}
    assert len(ranks) > 1, "ranks must differ for this test to mean something"
    with torch.no_grad():
        for p in cram.layers:
            x = torch.randn(2, 3, p.in_features)
            torch.testing.assert_close(modules[p.name](x), cram_kit.loop_reference(cram, pi, x, p.name))
