"""The streaming edit against mergekit 0.1.5 on the same checkpoints: linear, ties, dare_ties. Imports excluded.

    python benchmarks/vs_mergekit.py [--blocks 3] [--threads 2] [--rounds 2] [--methods linear ...] [--work DIR]

mergekit gets an environment of its own, made here, because it pins other versions. Both read the same two checkpoints
of Llama 7B's widths from a cold cache and write one; each run is a process of its own. Seconds are from the end of the
imports until the bytes are on the disk; memory is the peak of the process, and its rise above the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch

import synthetic_7b as synthetic
from edit_7b import EDIT

VERSION = "0.1.5"

MERGE = """
import json, os, sys, time
from pathlib import Path
import torch, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
def memory_mb(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e6
config = MergeConfiguration.model_validate(yaml.safe_load(sys.argv[1]))
imports = memory_mb("VmRSS")
began, cpu = time.perf_counter(), time.process_time()
run_merge(config, sys.argv[2], MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=0,
          out_shard_size=256 * 2**20))
returned = time.perf_counter() - began
# holdfast returns when its bytes are on the disk; mergekit leaves them to the page cache.
for path in Path(sys.argv[2]).iterdir():
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
print(json.dumps({"seconds": time.perf_counter() - began, "returned_seconds": returned, "torch": torch.__version__,
                  "cpu_seconds": time.process_time() - cpu, "peak_mb": memory_mb("VmHWM"),
                  "above_imports_mb": memory_mb("VmHWM") - imports}))
"""


def recipe(method: str, before: Path, after: Path) -> str:
    if method == "linear":
        models = [{"model": str(p), "parameters": {"weight": 0.5}} for p in (before, after)]
        return json.dumps({"models": models, "merge_method": "linear", "dtype": "bfloat16"})
    models = [{"model": str(p), "parameters": {"weight": 0.5, "density": 0.5}} for p in (after, before)]
    return json.dumps({"models": models, "base_model": str(before), "merge_method": method, "dtype": "bfloat16"})


def make_environment(folder: Path) -> str:
    python = folder / "bin" / "python"
    # Asked of the package itself: an install that was interrupted leaves an interpreter behind.
    if not python.exists() or subprocess.run([python, "-c", "import mergekit"], capture_output=True).returncode != 0:
        venv.create(folder, with_pip=True)
        # The same torch on both sides: what is compared is the program around it.
        wanted = [f"mergekit=={VERSION}", f"torch=={torch.__version__.partition('+')[0]}"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True, stdout=sys.stderr)
    return str(python)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=["linear", "ties", "dare_ties"])
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "holdfast-mergekit")
    args = parser.parse_args()
    python = make_environment(args.venv)
    runs: dict[str, list[dict]] = {name: [] for name in ("holdfast", *args.methods)}
    with synthetic.workplace(args.work) as place:
        before, after = place / "before", place / "after"
        nbytes = synthetic.write_checkpoint(before, args.blocks, seed=0, prefix=synthetic.LLAMA)
        synthetic.write_checkpoint(after, args.blocks, seed=0, change=0.01, prefix=synthetic.LLAMA)
        synthetic.curvature(args.blocks).save(place / "curvature.safetensors")
        for _ in range(args.rounds):
            for name in runs:
                for folder in (before, after):
                    synthetic.drop_from_cache(folder)
                out = str(place / "out")
                if name == "holdfast":
                    paths = [str(before), str(after), str(place / "curvature.safetensors"), out]
                    run = synthetic.in_clean_process(EDIT, *paths, threads=args.threads)
                    run["peak_mb"] = run["imports_mb"] + run["above_imports_mb"]
                else:
                    run = synthetic.in_clean_process(
                        MERGE, recipe(name, before, after), out, python=python, threads=args.threads
                    )
                shutil.rmtree(out)
                runs[name].append(run)
                print(f"{name}: {run['seconds']:.2f} s, peak {run['peak_mb']:.0f} MB", flush=True)
    ours = statistics.median(r["seconds"] for r in runs["holdfast"])
    memory = max(r["peak_mb"] for r in runs["holdfast"])
    rows = {
        name: {
            "seconds": statistics.median(r["seconds"] for r in found),
            "returned_seconds": statistics.median(r.get("returned_seconds", r["seconds"]) for r in found),
            "cpu_seconds": statistics.median(r["cpu_seconds"] for r in found),
            "times_holdfast": statistics.median(r["seconds"] for r in found) / ours,
            "peak_mb": max(r["peak_mb"] for r in found),
            "above_imports_mb": max(r["above_imports_mb"] for r in found),
            "memory_times_holdfast": max(r["peak_mb"] for r in found) / memory,
        }
        for name, found in runs.items()
    }
    result = {
        "mergekit": VERSION,
        "blocks": args.blocks,
        "bytes_per_checkpoint": nbytes,
        "torch": torch.__version__,
        "cpu_count": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "rows": rows,
    }
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps({**result, "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
