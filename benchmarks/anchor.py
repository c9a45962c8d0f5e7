"""The anchored edit at 7B shapes: time against HPA's two inverse diagonals, a grid against one strength, error, memory.

    OMP_NUM_THREADS=1 python benchmarks/anchor.py [--width 1024 4096 11008] [--rank 128] [--repeats 2] [--tokens 40000]

Per input width: `factor + adapter` (AnchorGrams with its checks, one factor, the adapters of every layer that shares
the input) against the two inverse diagonals that HPA takes of the same Gram matrices, in turns, in CPU seconds of this
process, so that a busy machine does not blur a ratio. A block of LLaVA-1.5-7B has three inputs of 4096 (q k v; o; gate
up) and one of 11008 (down). The walk is what a calibration does to the same inputs: the layers' products and the Gram
updates, measured on 2048 tokens and scaled to `--tokens`; attention, vision and reading weights are not in it, so the
ratio of a grid to one strength is an upper bound. Errors are relative, against float64 (up to 4096 columns).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from holdfast.functional.anchor import AnchorGrams, AnchorStrength, anchor_lora_grid
from holdfast.functional.factorize import add_gram_, mirror_lower_
from holdfast.functional.inverse import inverse_diagonal_primal
from inverse_diagonal import activations, peak_growth

# Layers of a block by input: how many share it, and their rows together.
BLOCK = {"q k v": (4096, 3, 3 * 4096), "o": (4096, 1, 4096), "gate up": (4096, 2, 2 * 11008), "down": (11008, 1, 4096)}
GRID = [AnchorStrength(safety_weight=10 ** (k / 3 - 2)) for k in range(10)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, nargs="+", default=[1024, 4096, 11008])
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=40000, help="of a walk: task, safety and past samples together")
    parser.add_argument("--past", action="store_true", help="with a third Gram matrix")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds: dict[tuple[int, int], dict[str, float]] = {}
    for width in options.width:
        layers = sorted({shared for c, shared, _ in BLOCK.values() if c == width} or {1})
        for row in measure(width, layers, options):
            seconds[width, row["layers"]] = row["cpu_s"]
            print(json.dumps(row), flush=True)
    if all((c, shared) in seconds for c, shared, _ in BLOCK.values()):
        print(json.dumps(block(seconds, options)), flush=True)


def gram(width: int, seed: int) -> Tensor:
    """Mean 2 x x^T of 2 c inputs (of 4096 where that is less: the damping then does the rest)."""
    tokens = min(2 * width, 8192)
    total = torch.zeros(width, width)
    for start in range(0, tokens, 2048):
        add_gram_(total, activations(min(2048, tokens - start), width, seed=seed + start).float())
    mirror_lower_(total)
    return total.mul_(2 / tokens)


def measure(width: int, layers: list[int], options: argparse.Namespace) -> list[dict[str, Any]]:
    task, safety = gram(width, 0), gram(width, 1)
    past = gram(width, 2) if options.past else None
    rows = []
    hpa = float("inf")
    for shared in layers:
        adapters = [torch.randn(options.rank, width) / width**0.5 for _ in range(shared)]

        def edit(strengths: list[AnchorStrength], adapters: list[Tensor] = adapters) -> list[list[Tensor]]:
            return list(anchor_lora_grid(adapters, AnchorGrams(task, safety, past), strengths))

        def diagonals() -> None:
            for matrix in (task, safety):
                inverse_diagonal_primal(matrix)

        grid = GRID if width < 8192 else GRID[::3]
        routes: dict[str, Callable[[], Any]] = {
            "hpa": diagonals,
            "anchor": lambda edit=edit: edit([AnchorStrength()]),
            "grid": lambda edit=edit, grid=grid: edit(grid),
        }
        best = dict.fromkeys(routes, float("inf"))
        for _ in range(options.repeats):
            for name, route in routes.items():
                if name == "hpa" and shared != layers[0]:
                    continue
                start = time.process_time()
                route()
                best[name] = min(best[name], time.process_time() - start)
        hpa = best["hpa"] = min(hpa, best["hpa"])
        # A shorter grid is scaled by what each strength adds.
        best["grid"] = best["anchor"] + (best["grid"] - best["anchor"]) * 9 / (len(grid) - 1)
        factor = AnchorGrams(task, safety, past).factor()
        found = factor.apply(torch.cat(adapters))
        row: dict[str, Any] = {
            "width": width,
            "layers": shared,
            "rank": options.rank,
            "cpu_s": {name: round(s, 3) for name, s in best.items()},
            "anchor_over_hpa": round(best["anchor"] / best["hpa"], 2),
            "grid_over_one": round(best["grid"] / best["anchor"], 2),
            "error_estimated": float(f"{factor.error:.1e}"),
            "fallbacks": factor.fallbacks,
            "extra_over_a_gram": round(peak_growth(routes["anchor"]) / (4 * width * width), 2),
        }
        del factor
        if width <= 4096:
            exact = AnchorGrams(task, safety, past, precision="float64").factor().apply(torch.cat(adapters))
            row["error"] = float(f"{float((found - exact).norm() / exact.norm()):.1e}")
        rows.append(row)
    return rows


def walk_seconds(width: int, out_rows: int, tokens: int) -> float:
    """CPU seconds of the products and the Gram updates of one input, measured on 2048 tokens."""
    x = torch.randn(2048, width)
    weight, total = torch.randn(1024, width), torch.zeros(width, width)
    start = time.process_time()
    _ = x @ weight.T
    product = (time.process_time() - start) * out_rows / 1024
    start = time.process_time()
    add_gram_(total, x)
    return (product + time.process_time() - start) * tokens / 2048


def block(seconds: dict[tuple[int, int], dict[str, float]], options: argparse.Namespace) -> dict[str, Any]:
    """One block of a 7B, from the measured widths."""
    total = {
        name: sum(seconds[c, shared][name] for c, shared, _ in BLOCK.values()) for name in ("hpa", "anchor", "grid")
    }
    walk = sum(walk_seconds(c, rows, options.tokens) for c, _, rows in BLOCK.values())
    return {
        "block": "LLaVA-1.5-7B",
        "cpu_s": {name: round(s, 2) for name, s in total.items()},
        "anchor_over_hpa": round(total["anchor"] / total["hpa"], 2),
        "walk_tokens": options.tokens,
        "walk_cpu_s": round(walk, 1),
        "grid_over_one_in_a_walk": round((walk + total["grid"]) / (walk + total["anchor"]), 2),
    }


if __name__ == "__main__":
    main()
