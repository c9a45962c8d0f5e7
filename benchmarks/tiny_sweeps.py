"""Sweeps over the tiny world (`tiny_world.py` plays the runs) and their tables.

    python benchmarks/tiny_sweeps.py runs settings --seeds 0,1 > runs.json
    python benchmarks/tiny_world.py --runs runs.json --out results.jsonl --part 0/2 & ... --part 1/2
    python benchmarks/tiny_sweeps.py table results.jsonl

A table row is one setting: mean and standard deviation over its seeds, in percent, on the validation draw.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

CONDITIONS: dict[str, dict[str, Any]] = {"clean": {}, "injected": {"harmful": 0.01}}
CONTROLS: list[dict[str, Any]] = [
    {"rule": "change", "match": True},
    {"rule": "random", "match": True},
    {"rule": "interpolate", "match": True},
]


def settings() -> list[dict[str, Any]]:
    """Strength of plain tuning."""
    grid = itertools.product((4e-4, 7e-4, 1e-3), (40, 60))
    return [{"lr": lr, "steps": steps} for lr, steps in grid]


def edits() -> list[dict[str, Any]]:
    """HPA and its controls at equal distance, for several p."""
    found: list[dict[str, Any]] = [{"rule": "none"}]
    for p in ((5, 15), (10, 30), (20, 40)):
        found += [rule | {"p": p} for rule in ({"rule": "hpa"}, *CONTROLS)]
    return found


def hessian() -> list[dict[str, Any]]:
    """What the calibration and the choice of columns change, one thing at a time."""
    base = {"rule": "hpa"}
    one = [
        {"damping": 0.1}, {"damping": 1.0}, {"shrinkage": 0.5}, {"shrinkage": 0.9}, {"shrinkage": 0.99},
        {"safety_count": 32}, {"shrinkage": 0.9, "safety_count": 32},
        {"tokens": "text"}, {"tokens": "answer"}, {"tokens": "request"},
        {"form": "multiply"}, {"criterion": "eps"}, {"criterion": "eps", "shrinkage": 0.9}, {"criterion": "phi"},
        {"ratio": 4.0}, {"p": (15, 5)}, {"p": (10, 30)},
    ]  # fmt: skip
    return [base, *(base | change for change in one), *CONTROLS]


ANCHOR: dict[str, Any] = {
    "rule": "anchor", "train_dtype": "float32", "benign": 48, "benign_share": 0.6, "screen": True,
}  # fmt: skip


def anchor() -> list[dict[str, Any]]:
    """The anchored edit's settings and what it is calibrated on, one thing at a time."""
    one: list[dict[str, Any]] = [
        {"safety_count": 2}, {"safety_count": 4}, {"safety_count": 32}, {"safety_kind": "text"},
        {"benign": 0, "benign_share": None}, {"benign": 12}, {"task_count": 16},
        {"mu_s": 0.1}, {"mu_s": 0.3}, {"mu_s": 3.0}, {"mu_s": 10.0},
        {"mu_p": 0.0}, {"mu_p": 0.03}, {"mu_p": 0.1}, {"mu_p": 1.0}, {"mu_p": 3.0},
        {"lam": 0.003}, {"lam": 0.01}, {"lam": 0.1}, {"lam": 0.3},
        {"past": "diagonal"}, {"past": "low-rank"}, {"mu_depth": 0.5}, {"mu_depth": -0.5},
    ]  # fmt: skip
    return [ANCHOR, *(ANCHOR | change for change in one)]


SWEEPS = {"anchor": anchor, "settings": settings, "edits": edits, "hessian": hessian}
SHOWN = ("ap", "learned", "bwt", "masr", "comply", "collapse", "over_refusal", "helpful")


def setting_of(run: dict[str, Any], usual: dict[str, Any]) -> str:
    """What differs from the usual run, seed apart."""
    return (
        ", ".join(f"{k} {_short(v)}" for k, v in run.items() if v != usual[k] and k not in ("seed", "note")) or "usual"
    )


def _short(value: Any) -> str:
    return (
        "-".join(map(str, value))
        if isinstance(value, list)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def table(files: list[Path], usual: dict[str, Any]) -> str:
    """Markdown of all results, grouped by setting."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for file in files:
        for text in file.read_text().splitlines():
            result = json.loads(text)
            groups[setting_of(result["run"], usual)].append(result)
    lines = ["| setting | n | " + " | ".join(SHOWN) + " | distance |", "|---" * (len(SHOWN) + 3) + "|"]
    for name, results in groups.items():
        cells = []
        for key in SHOWN:
            values = [100 * r[key] for r in results]
            spread = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        distances = [e["distance"] for r in results for e in r["edits"]]
        cells.append(f"{100 * math.fsum(distances) / len(distances):.2f} %" if distances else "")
        lines.append(f"| {name} | {len(results)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    runs = verbs.add_parser("runs", help="print a sweep's runs as JSON")
    runs.add_argument("sweep", choices=sorted(SWEEPS))
    runs.add_argument("--seeds", default="0")
    runs.add_argument("--conditions", default="clean")
    tables = verbs.add_parser("table", help="print a table of results")
    tables.add_argument("results", type=Path, nargs="+")
    args = parser.parse_args()
    if args.verb == "runs":
        seeds, conditions = [int(s) for s in args.seeds.split(",")], args.conditions.split(",")
        grid = itertools.product(seeds, SWEEPS[args.sweep](), conditions)
        print(json.dumps([run | CONDITIONS[c] | {"seed": seed} for seed, run, c in grid], indent=0))
        return
    from dataclasses import asdict

    from tiny_world import Run

    print(table(args.results, json.loads(json.dumps(asdict(Run())))))


if __name__ == "__main__":
    main()
