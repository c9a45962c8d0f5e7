"""A mixture of LoRA experts over tokens: every token weighs the experts by a softmax of its own state."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def token_gates(x: Tensor, router: Tensor) -> Tensor:
    """How much of each expert a token gets: softmax of W_g x, in fp32.

    Args: x: (..., in). router: W_g (experts, in). Returns: (..., experts), each row sums to 1.
    """
    return F.linear(x, router.to(x.dtype)).float().softmax(-1)


def mixture_update(x: Tensor, gates: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """scaling * sum_e g_e B_e A_e x, all experts in two products.

    Args:
        x: (..., in). gates: (..., experts), how much of each expert a token gets.
        lora_a: (experts * k, in), the A of one expert after the other; lora_b: (out, experts * k), likewise.

    Returns: (..., out), in the type of x.
    """
    rank = lora_a.shape[0] // gates.shape[-1]
    hidden = F.linear(x, lora_a.to(x.dtype)) * gates.to(x.dtype).repeat_interleave(rank, dim=-1)
    return scaling * F.linear(hidden, lora_b.to(x.dtype))


def start_of_mixture(
    width: int, out: int, *, experts: int, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """(router (experts, in), A (experts * rank, in), B (out, experts * rank)) before anything is learned, fp32.

    A is normal with a deviation of 0.01, B is zero, the router as a linear layer of torch's begins: as released.
    """
    bound = width**-0.5
    router = torch.empty(experts, width).uniform_(-bound, bound, generator=generator)
    lora_a = torch.empty(experts * rank, width).normal_(0.0, 0.01, generator=generator)
    return router, lora_a, torch.zeros(out, experts * rank)
