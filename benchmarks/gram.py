"""Gram accumulation of bf16 inputs with fp32 sums, against the rate of a plain bf16 matrix product in the same run.

    OMP_NUM_THREADS=1 python benchmarks/gram.py [--width 4096] [--tokens 8192] [--device cpu]

Prints the time of x^T x as a bf16 product (which rounds its result to 8 bits), of `InputGram.update`, and their ratio:
both do the same job, H += x^T x, for the same x. The error is against float64 on a slice of columns.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

from holdfast.functional.hessian import InputGram
from synthetic_7b import memory_mb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, nargs="+", default=[4096, 11008])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    for width in options.width:
        measure(width, options.tokens, options.repeats, torch.device(options.device))


def measure(width: int, tokens: int, repeats: int, device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=g).bfloat16().to(device)
    gram = InputGram(width, dtype=torch.float32, dual=False)
    routes: dict[str, Callable[[], object]] = {
        "bf16_product": lambda: x.T @ x,
        "gram_update": lambda: gram.update(x[None]),
    }
    seconds = dict.fromkeys(routes, float("inf"))
    for _ in range(repeats):
        for name, route in routes.items():
            seconds[name] = min(seconds[name], timed(route, device))
    want = x.double().T @ x[:, :64].double()
    got = gram.hessian()[:, :64].double() / 2
    flops = 2 * tokens * width * width
    print(
        json.dumps(
            {
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                "width": width,
                "tokens": tokens,
                "bf16_product_gflops": round(flops / seconds["bf16_product"] / 1e9, 1),
                "gram_update_gflops": round(flops / seconds["gram_update"] / 1e9, 1),
                "rate_percent_of_bf16": round(100 * seconds["bf16_product"] / seconds["gram_update"], 1),
                "peak_mb": round(memory_mb()),
                "relative_error": float(f"{float((got - want).norm() / want.norm()):.1e}"),
            }
        ),
        flush=True,
    )


def timed(run: Callable[[], object], device: torch.device) -> float:
    """CPU seconds of this process, or seconds on an accelerator."""
    if device.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
