"""The LoRA route at LLaVA-1.5-7B's shapes: adapter in, edited adapter out.

    python benchmarks/lora_route.py [--rank 128] [--threads 2] [--measured-blocks 4] [--work DIR] [--out FILE]

With the coefficient dropped, BEFORE is 32 blocks of headers over holes, for its weights are not read (but for 3 KiB of
each tensor, its fingerprint). With the coefficient measured, BEFORE is a few blocks of real bytes, read once; the time
beside it is that of reading those bytes and doing nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from pathlib import Path

import torch

import synthetic_7b as synthetic

EDIT = """
import json, sys, time
from pathlib import Path
import synthetic_7b as synthetic
from holdfast.checkpoints.curvature_file import Curvature
from holdfast.editing.editor import edit_checkpoint
from holdfast.rules.hpa import HpaRule
before, adapter, curvature, out = map(Path, sys.argv[1:5])
loaded = Curvature.load(curvature)
imports = synthetic.memory_mb("VmRSS")
began, cpu = time.perf_counter(), time.process_time()
report = edit_checkpoint(before, adapter, rule=HpaRule(), curvature=loaded, out=out, export="adapter",
                         coefficient=sys.argv[5], verify=False)
print(json.dumps({"seconds": time.perf_counter() - began,
                  "cpu_seconds": time.process_time() - cpu, "phases": report.seconds, "layers": len(report.layers),
                  "above_imports_mb": synthetic.memory_mb() - imports,
                  "largest_coefficient_error": max(r.get("coefficient_error") or 0 for r in report.layers)}))
"""


def read_all(folder: Path) -> float:
    buffer = bytearray(64 << 20)
    began = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measured-blocks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict = {"rank": args.rank, "torch": torch.__version__, "cpu_count": os.cpu_count()}
    with synthetic.workplace(args.work) as place:
        synthetic.sparse_checkpoint(place / "sparse")
        for dtype in (torch.bfloat16, torch.float32):
            name = str(dtype).removeprefix("torch.")
            adapter = place / f"adapter-{name}"
            nbytes = synthetic.write_adapter(adapter, synthetic.BLOCKS_7B, rank=args.rank, dtype=dtype)
            synthetic.curvature(synthetic.BLOCKS_7B).save(place / "curvature.safetensors")
            runs = []
            for _ in range(args.rounds):
                paths = [str(place / p) for p in ("sparse", adapter.name, "curvature.safetensors", "edited")]
                runs.append(synthetic.in_clean_process(EDIT, *paths, "drop", threads=args.threads))
                shutil.rmtree(place / "edited")
            shutil.rmtree(adapter)
            best, memory = min(r["seconds"] for r in runs), max(r["above_imports_mb"] for r in runs)
            median = statistics.median(r["seconds"] for r in runs)
            cpu = statistics.median(r["cpu_seconds"] for r in runs)
            result[f"dropped_{name}"] = {"adapter_bytes": nbytes, "seconds": median, "fastest": best, "runs": runs}
            print(
                f"dropped, {name}: {median:.2f} s (fastest {best:.2f}, {cpu:.2f} s of CPU), {nbytes / 1e6:.0f} MB; "
                f"{memory:.0f} MB above the imports",
                flush=True,
            )
        blocks = args.measured_blocks
        base_bytes = synthetic.write_checkpoint(place / "real", blocks, seed=0)
        synthetic.write_adapter(place / "adapter", blocks, rank=args.rank)
        synthetic.curvature(blocks).save(place / "curvature.safetensors")
        synthetic.drop_from_cache(place / "real")
        read_seconds = read_all(place / "real")
        synthetic.drop_from_cache(place / "real")
        paths = [str(place / p) for p in ("real", "adapter", "curvature.safetensors", "edited")]
        measured = synthetic.in_clean_process(EDIT, *paths, "measure", threads=args.threads)
    result["measured"] = {"blocks": blocks, "base_bytes": base_bytes, "read_seconds": read_seconds, **measured}
    print(
        f"measured, {blocks} blocks: {measured['seconds']:.2f} s; reading the base alone {read_seconds:.2f} s; "
        f"{measured['above_imports_mb']:.0f} MB above the imports"
    )
    print(f"largest relative error of leaving the coefficient out: {measured['largest_coefficient_error']:.1e}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
