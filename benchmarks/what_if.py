"""Fifty settings of an HPA edit at LLaVA-1.5-7B's shapes, from a saved calibration and an adapter: no base is read.

python benchmarks/what_if.py [--rank 128] [--threads 2] [--work DIR] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import synthetic_7b as synthetic

SWEEP = """
import json, sys, time
from pathlib import Path
from holdfast.checkpoints.curvature_file import Curvature
from holdfast.editing.measure import measure_pair
from holdfast.functional.hpa import HpaConfig
from holdfast.rules.what_if import grid, sweep
import synthetic_7b as synthetic
before, adapter, curvature = map(Path, sys.argv[1:4])
began, cpu = time.perf_counter(), time.process_time()
layers = measure_pair(before, adapter, Curvature.load(curvature))
read = time.perf_counter() - began
keeps, focuses, alphas = [(p, 3 * p) for p in (1, 2, 5, 10, 20)], [1.5, 2, 3, 4, 5], [(0.4, 0.8), (0.0, 1.0)]
configs = grid(keeps, focuses, alphas, HpaConfig())
rows = sweep(layers, configs)
print(json.dumps({"settings": len(rows), "layers": len(layers), "read_seconds": read,
                  "sweep_seconds": time.perf_counter() - began - read, "seconds": time.perf_counter() - began,
                  "cpu_seconds": time.process_time() - cpu, "peak_mb": synthetic.memory_mb("VmHWM")}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with synthetic.workplace(args.work) as place:
        synthetic.sparse_checkpoint(place / "base")
        synthetic.write_adapter(place / "adapter", synthetic.BLOCKS_7B, rank=args.rank)
        synthetic.curvature(synthetic.BLOCKS_7B).save(place / "curvature.safetensors")
        paths = [str(place / name) for name in ("base", "adapter", "curvature.safetensors")]
        result = synthetic.in_clean_process(SWEEP, *paths, threads=args.threads)
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
