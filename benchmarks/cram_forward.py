"""Cost of CRAM's fused pass on one linear layer, against the base alone, PEFT LoRA of the same total rank, and a loop.

    python benchmarks/cram_forward.py --out cram_forward.json

All variants run in turn within each round, so that a busy machine slows all of them; the figures are medians over
rounds of each variant's time divided by the base's time in the same round, and `fused_over_peft` of the fused pass's
divided by PEFT's. `added_*_over_added_fused` compares what a variant adds to the base: the plain loop over experts, and
the released code's, which also reads every weight on the host. On a machine that others use, `--clock cpu --threads 1`
counts the processor's time and not the waiting.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from holdfast.tuners.cram.layer import Active, ExpertPass

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def variants(width: int, experts: int, rank: int, batch: int, tokens: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Name -> a call that computes the layer's output on the same input with the same base weight."""
    torch.manual_seed(0)
    base = nn.Linear(width, width, bias=False, dtype=torch.bfloat16)
    x = torch.randn(batch, tokens, width, dtype=torch.bfloat16)
    a = [torch.randn(rank, width, dtype=torch.bfloat16) / width**0.5 for _ in range(experts)]
    b = [torch.randn(width, rank, dtype=torch.bfloat16) for _ in range(experts)]
    pi = torch.softmax(torch.randn(batch, experts), -1)

    fused = nn.Linear(width, width, bias=False, dtype=torch.bfloat16)
    fused.weight = base.weight
    active = Active()
    layer = ExpertPass("layer", 0, fused, active)
    layer.stack(torch.cat(a), torch.cat(b, dim=1), 0)
    active.set("routed", pi.repeat_interleave(rank, dim=1).to(torch.bfloat16))
    fused.register_forward_hook(layer.extend)

    inner = nn.Linear(width, width, bias=False, dtype=torch.bfloat16)
    inner.weight = base.weight
    config = LoraConfig(r=rank * experts, lora_alpha=rank * experts)
    lora = LoraLinear(inner, "default", config=config, r=rank * experts, lora_alpha=rank * experts).to(torch.bfloat16)

    def loop() -> torch.Tensor:
        y = base(x)
        for e in range(experts):
            y = y + pi[:, e, None, None].to(y.dtype) * ((x @ a[e].T) @ b[e].T)
        return y

    def loop_with_host_reads() -> torch.Tensor:
        # As the released code does: sample by sample, asking the device which expert is on.
        y = base(x)
        for e in range(experts):
            for i in range(batch):
                weight = pi[i, e].item()
                if weight > 1e-6:
                    y[i] += weight * ((x[i] @ a[e].T) @ b[e].T)
        return y

    return {
        "base": lambda: base(x),
        "fused": lambda: fused(x),
        "peft_lora_same_rank": lambda: lora(x),
        "loop": loop,
        "loop_with_host_reads": loop_with_host_reads,
    }


@torch.inference_mode()
def measure(calls: dict[str, Callable[[], torch.Tensor]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median over rounds of time / base time in that round; `base_ms` is the base's median."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = clock()
            call()
            times[name].append(clock() - started)
    ratios = {
        name: statistics.median(t / base for t, base in zip(values, times["base"], strict=True))
        for name, values in times.items()
    }
    fastest = min(times["base"])
    pairs = zip(times["fused"], times["peft_lora_same_rank"], strict=True)
    ratios["fused_over_peft"] = statistics.median(fused / peft for fused, peft in pairs)
    return {**ratios, "base_ms": fastest * 1e3, "fused_of_fastest": min(times["fused"]) / fastest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=10)
    parser.add_argument("--rank", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 160, 640])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for tokens in args.tokens:
        found = measure(
            variants(args.width, args.experts, args.rank, args.batch, tokens), args.rounds, CLOCKS[args.clock]
        )
        for name in ("loop", "loop_with_host_reads"):
            found[f"added_{name}_over_added_fused"] = (found[name] - 1) / max(found["fused"] - 1, 1e-9)
        rows.append({"tokens": tokens, **{k: round(v, 4) for k, v in found.items()}})
        print(json.dumps(rows[-1]))
    if args.out:
        settings = {k: v for k, v in vars(args).items() if k != "out"}
        versions = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
        args.out.write_text(json.dumps({"settings": settings, "versions": versions, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
