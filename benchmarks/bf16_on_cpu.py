"""A matrix product in bf16 against fp32 on this CPU, and what `load` chooses for a bf16 checkpoint.

    OMP_NUM_THREADS=1 python benchmarks/bf16_on_cpu.py

A CPU without bf16 instructions emulates them; `load` then widens the weights to fp32 (twice the memory).
"""

from __future__ import annotations

import time

import torch

from holdfast.models.load import cpu_has_bf16


def gigaflops(dtype: torch.dtype, size: int, repeats: int) -> float:
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    a @ b
    began = time.perf_counter()
    for _ in range(repeats):
        a @ b
    return repeats * 2 * size**3 / (time.perf_counter() - began) / 1e9


def main() -> None:
    print(f"bf16 instructions: {'yes' if cpu_has_bf16() else 'no'}")
    wide = gigaflops(torch.float32, 1024, 4)
    narrow = gigaflops(torch.bfloat16, 1024, 1)
    print(f"fp32 {wide:.1f} GF/s, bf16 {narrow:.2f} GF/s, fp32 {wide / narrow:.0f} times as fast")


if __name__ == "__main__":
    main()
