"""The streaming edit at LLaVA-1.5-7B's shapes against a plain buffered copy of the same bytes, in the same run.

    python benchmarks/edit_7b.py [--blocks 8] [--threads 2] [--rounds 3] [--work DIR] [--out FILE]

The copy reads BEFORE and AFTER and writes one of them, with one reused 64 MB buffer and an fsync per file: the edit's
own reads and writes and nothing else. Each round copies, then edits, both from a cold cache. Memory is the peak of a
process that does the edit alone, less what it held after its imports. The whole 7B is extrapolated by bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import time
from pathlib import Path

import torch

import synthetic_7b as synthetic

EDIT = """
import json, sys, time
from pathlib import Path
import torch
import synthetic_7b as synthetic
from holdfast.checkpoints.curvature_file import Curvature
from holdfast.editing.editor import edit_checkpoint
from holdfast.rules.hpa import HpaRule
before, after, curvature, out = map(Path, sys.argv[1:5])
loaded = Curvature.load(curvature)
imports = synthetic.memory_mb("VmRSS")
began, cpu = time.perf_counter(), time.process_time()
report = edit_checkpoint(before, after, rule=HpaRule(), curvature=loaded, out=out, verify=False)
seconds = time.perf_counter() - began
print(json.dumps({
    "seconds": seconds, "cpu_seconds": time.process_time() - cpu, "phases": report.seconds,
    "layers": len(report.layers),
    "imports_mb": imports, "above_imports_mb": synthetic.memory_mb() - imports, "threads": torch.get_num_threads(),
}))
"""


def plain_copy(read: list[Path], written: Path, out: Path) -> float:
    """Seconds to read every file of the folders and to write those of one of them."""
    buffer = bytearray(64 << 20)
    view = memoryview(buffer)
    out.mkdir()
    began = time.perf_counter()
    for folder in read:
        for path in sorted(folder.glob("*.safetensors")):
            target = (out / path.name).open("wb", buffering=0) if folder == written else None
            with path.open("rb", buffering=0) as source:
                while count := source.readinto(buffer):
                    if target is not None:
                        target.write(view[:count])
            if target is not None:
                os.fsync(target.fileno())
                target.close()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rounds = []
    with synthetic.workplace(args.work) as place:
        before, after = place / "before", place / "after"
        nbytes = synthetic.write_checkpoint(before, args.blocks, seed=0)
        synthetic.write_checkpoint(after, args.blocks, seed=0, change=0.01)
        synthetic.curvature(args.blocks).save(place / "curvature.safetensors")
        for _ in range(args.rounds):
            for folder in (before, after):
                synthetic.drop_from_cache(folder)
            copy_seconds = plain_copy([before, after], after, place / "copy")
            shutil.rmtree(place / "copy")
            for folder in (before, after):
                synthetic.drop_from_cache(folder)
            paths = [str(place / name) for name in ("before", "after", "curvature.safetensors", "edited")]
            edit = synthetic.in_clean_process(EDIT, *paths, threads=args.threads)
            shutil.rmtree(place / "edited")
            rounds.append({"copy_seconds": copy_seconds, **edit, "ratio": edit["seconds"] / copy_seconds})
            print(
                f"copy {copy_seconds:.2f} s, edit {edit['seconds']:.2f} s, ratio {rounds[-1]['ratio']:.2f}", flush=True
            )
    scale = synthetic.BYTES_7B / nbytes
    result = {
        "blocks": args.blocks,
        "bytes_per_checkpoint": nbytes,
        "ratio_to_copy": statistics.median(r["ratio"] for r in rounds),
        "edit_seconds": statistics.median(r["seconds"] for r in rounds),
        "whole_7b_cpu_seconds_extrapolated": statistics.median(r["cpu_seconds"] for r in rounds) * scale,
        "whole_7b_seconds_extrapolated": statistics.median(r["seconds"] for r in rounds) * scale,
        "peak_above_imports_mb": max(r["above_imports_mb"] for r in rounds),
        "imports_mb": max(r["imports_mb"] for r in rounds),
        "torch": torch.__version__,
        "cpu_count": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "machine": platform.machine(),
        "rounds": rounds,
    }
    text = json.dumps({k: v for k, v in result.items() if k != "rounds"}, indent=2)
    print(text)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
