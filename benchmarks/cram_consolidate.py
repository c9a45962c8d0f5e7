"""Time of CRAM's consolidation (QR, small SVD, novelty) for all attention linears at 7B shapes.

python benchmarks/cram_consolidate.py --out cram_consolidate.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from holdfast.tuners.cram.cram_config import CramConfig
from holdfast.tuners.cram.phases import consolidate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--linears", type=int, default=128, help="32 blocks of q, k, v, o")
    parser.add_argument("--old-experts", type=int, default=9)
    parser.add_argument("--rank", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    config = CramConfig()
    buffer, history = {}, {}
    for i in range(args.linears):
        a = torch.randn(config.buffer_rank, args.width, generator=generator) / args.width**0.5
        b = torch.randn(args.width, config.buffer_rank, generator=generator) * 0.9 ** torch.arange(config.buffer_rank)
        buffer[str(i)] = (a, b)
        history[str(i)] = [torch.randn(args.rank, args.width, generator=generator) for _ in range(args.old_experts)]
    consolidate({"0": buffer["0"]}, {"0": history["0"]}, config, seed=0)
    started, cpu = time.perf_counter(), time.process_time()
    made = consolidate(buffer, history, config, seed=0)
    row = {
        "seconds": round(time.perf_counter() - started, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
        "mean_rank": sum(e.rank for e in made.values()) / len(made),
        **{k: v for k, v in vars(args).items() if k != "out"},
    }
    print(json.dumps(row))
    if args.out:
        args.out.write_text(json.dumps(row, indent=2) + "\n")


if __name__ == "__main__":
    main()
