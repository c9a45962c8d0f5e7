"""A method's settings, chosen on the validation draw with as many tries for one as for another.

    python benchmarks/choose.py --methods safe_delta,ewc --out runs/choose
    python benchmarks/five_seeds.py --settings runs/choose/chosen.json --methods safe_delta,ewc --conditions injected

A try is a row of `five_seeds.py` with other options; the authors' own are always one of them. What is best is said
before anything is run: AP minus MASR minus over-refusal, in points, after the last task of the validation draw, 1 %
harmful samples. No test request is read. A killed choice goes on where it stopped; OUT/chosen.json holds what was
taken, OUT/choose.md every try. Methods without a setting that is left open (joint, frozen, seqft) are not asked.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import five_seeds
from five_seeds import FIGURES, VARIANTS, cell, names, row_of, run_cell, seeds
from holdfast.errors import HoldfastError
from holdfast.files import atomic_path, write_json
from holdfast.stream.summary import summarize_run

# Each {} is what the method has by default (for safe_delta, the paper's 0.1 is the second).
TRIES: dict[str, tuple[dict[str, Any], ...]] = {
    "hpa": (
        {},
        {"calibration": {"damping": 0.01}},
        {"calibration": {"damping": 0.1}},
        {"edit": {"keep_bounds": [10, 30]}},
        {"edit": {"keep_bounds": [20, 40]}},
    ),
    "interpolation": ({}, {"factor": 0.7}, {"factor": 0.5}, {"factor": 0.4}, {"factor": 0.3}),
    "safe_delta": ({}, {"strength": 0.1}, {"strength": 1.0}, {"strength": 3.0}, {"strength": 30.0}),
    "model_tailor": (
        {},
        *({"tuned_share": 0.1 * k, "change_weight": w} for k, w in ((2, 0.8), (4, 0.8), (1, 0.5), (4, 0.5))),
    ),
    "safe_lora": ({}, {"lowest": 5}, {"lowest": 18}, {"lowest": 26}, {"lowest": 35}),
    "ties": ({}, {"density": 0.4}, {"density": 0.8}, {"weight": 2.0}, {"density": 0.4, "weight": 2.0}),
    "dare": ({}, {"drop": 0.7}, {"drop": 0.5}, {"drop": 0.5, "rescale": False}, {"drop": 0.7, "rescale": False}),
    "resta": ({}, {"alpha": 0.05}, {"alpha": 0.1}, {"alpha": 0.2}, {"alpha": 1.0}),
    "cgm": ({}, {"alpha": 0.02}, {"alpha": 0.05}, {"alpha": 1.0}, {"alpha": 5.0}),
    "cgm_plus": ({}, {"kept": 0.9}, {"kept": 0.8}, {"alpha": 0.2}, {"alpha": 5.0}),
    "ewc": ({}, {"weight": 1e2}, {"weight": 1e3}, {"weight": 1e5}, {"weight": 1e6}),
    "lwf": ({}, {"weight": 0.1}, {"weight": 0.3}, {"weight": 3.0}, {"weight": 10.0}),
    "o_lora": ({}, {"weight": 0.05}, {"weight": 5.0}, {"weight": 50.0}, {"norm_weight": 0.1}),
    "reg_lora": ({}, {"weight": 2.5e2}, {"weight": 2.5e4}, {"share": 0.1}, {"share": 0.1, "weight": 2.5e4}),
    "osf": ({}, {"kept": 0.25}, {"kept": 0.75}, {"kept": 0.9}, {"kept": 0.95}),
    "sppft": (
        {},
        *({"safety_layers": [low, high]} for low, high in ((0.0, 0.5), (0.2, 0.8), (0.4, 1.0), (0.0, 0.8))),
    ),
    "one_shot": (
        {},
        {"learning_rate": 1e-4},
        {"learning_rate": 5e-4},
        {"refusals": 8, "learning_rate": 1e-4},
        {"refusals": 8, "learning_rate": 5e-4},
    ),
    "safety_replay": ({}, {"repeat": 2}, {"repeat": 4}, {"repeat": 8}, {"repeat": 16}),
    "replay": ({}, {"share": 0.02}, {"share": 0.05}, {"share": 0.2}, {"share": 0.4}),
    "intruders": ({}, {"keep": 0.5}, {"keep": 0.25}, {"threshold": 0.8}, {"top": 16, "keep": 0.25}),
    "many": ({}, {"ridge": 1e-4}, {"ridge": 1e-3}, {"ridge": 1e-1}, {"ridge": 1.0}),
    "guardspace": ({}, {"energy": 0.8}, {"energy": 0.9}, {"energy": 0.95}, {"energy": 0.999}),
    "moelora": (
        {},
        {"experts": 4},
        {"experts": 2},
        {"training": {"learning_rate": 1.4e-3}},
        {"training": {"learning_rate": 2.8e-3}},
    ),
    "safe_anchor": ({}, {"directions": 8}, {"directions": 64}, {"tolerance": 0.02}, {"repair_steps": 40}),
}


def tries_of(method: str) -> dict[str, dict[str, Any]]:
    """Row name -> what every try changes of the method as the world has it."""
    return {f"{method}-{i}": {"method": method, **change} for i, change in enumerate(TRIES[method])}


def worth(figures: Mapping[str, Any]) -> float:
    """What is chosen by: AP less what is not refused and what is refused in vain, rates."""
    ap, masr, over_refusal = (float(figures[key]["value"]) for key in ("ap", "masr", "over_refusal"))
    return ap - masr - over_refusal


def summaries_of(options: argparse.Namespace) -> list[Mapping[str, Any]]:
    """The methods of every seed's run; intervals make a summary slow, so each is made once for all rows."""
    found: list[Mapping[str, Any]] = []
    for seed in options.seeds:
        try:
            found.append(summarize_run(five_seeds.cell_dir(options, "injected", seed))["methods"])
        except HoldfastError:
            found.append({})  # not begun
    return found


def figures_of(summaries: Sequence[Mapping[str, Any]], row: str) -> dict[str, Any] | None:
    """A row of the table; None: not all of its seeds are finished."""
    found = [methods.get(row, {}) for methods in summaries]
    return row_of(found) if all(method.get("complete") for method in found) else None


def publish(options: argparse.Namespace) -> None:
    lines = [
        f"Validation draw, seeds {', '.join(map(str, options.seeds))}, {options.prompts} prompts per set, "
        f"{100 * options.harmful:g} % harmful; **taken**: most AP - MASR - over-refusal.",
        "",
        "| method | setting | " + " | ".join(heading for _, heading, _ in FIGURES) + " | AP - MASR - over-refusal |",
        "|---|---|" + "---:|" * (len(FIGURES) + 1),
    ]
    chosen: dict[str, Any] = {}
    summaries = summaries_of(options)
    for method in options.methods:
        found = {row: figures_of(summaries, row) for row in tries_of(method)}
        known = {row: figures for row, figures in found.items() if figures is not None}
        if not known:
            continue
        best = max(known, key=lambda row: worth(known[row]))
        for (row, figures), change in zip(found.items(), TRIES[method], strict=True):
            if figures is None:
                continue
            said = json.dumps(change)[1:-1].replace('"', "") or "default"
            cells = " | ".join(cell(figures.get(key)) for key, _, _ in FIGURES)
            said = f"**{said}**" if row == best else said
            lines.append(f"| {method} | {said} | {cells} | {cell({'value': worth(figures)})} |")
        if len(known) == len(found):
            chosen[method] = tries_of(method)[best]
    write_json(options.out / "chosen.json", chosen)
    with atomic_path(options.out / "choose.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", type=names, default=list(TRIES))
    parser.add_argument("--seeds", type=seeds, default=[0])
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--harmful", type=float, default=0.01)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/choose"))
    options = parser.parse_args(
        words, argparse.Namespace(draw="validation", order=None, between=0, settings=None, world="tiny")
    )
    unknown = sorted(set(options.methods) - set(TRIES))
    if unknown:
        parser.error(f"{unknown[0]!r} has no settings to choose; there are {', '.join(TRIES)}")
    options.keep_bounds = five_seeds.KEEP_BOUNDS
    return options


def main() -> None:
    options = parse()
    # As many methods at once as processes: each has equally many tries, so none of the processes waits.
    for start in range(0, len(options.methods), options.jobs):
        methods = options.methods[start : start + options.jobs]
        rows = {row: change for method in methods for row, change in tries_of(method).items()}
        VARIANTS.update(rows)
        for seed in options.seeds:
            started = time.monotonic()
            asked = argparse.Namespace(**{**vars(options), "methods": list(rows)})
            run_cell(asked, "injected", seed)
            said = ", ".join(methods)
            print(f"{said}, seed {seed}: {len(rows)} tries, {time.monotonic() - started:.0f} s", flush=True)
            publish(options)
    publish(options)
    print((options.out / "choose.md").read_text())


if __name__ == "__main__":
    sys.exit(main())
