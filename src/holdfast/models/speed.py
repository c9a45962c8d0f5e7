"""How fast a device multiplies matrices, and what of that speed models reach. For planning, not for a benchmark."""

from __future__ import annotations

import math
import time

import torch

# Shares of a matrix product's speed: a forward (or backward) pass of whole sequences; greedy decoding of a batch, which
# waits for the weights to be read.
FORWARD_SHARE, DECODE_SHARE = 0.5, 0.15


def flops_per_second(device: torch.device, size: int = 1024) -> float:
    """Floating-point operations per second of one matrix product in fp32, here and now: the best of three."""
    left = torch.randn(size, size, device=device)
    best = math.inf
    for _ in range(3):
        began = time.perf_counter()
        float((left @ left)[0, 0])  # reading a value waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


__all__ = ["DECODE_SHARE", "FORWARD_SHARE", "flops_per_second"]
