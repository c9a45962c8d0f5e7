"""A stream's table, of the embedded or the small world: methods x seeds x {clean, injected}, resumable, with intervals.

    python benchmarks/five_seeds.py --seeds 0..4 --conditions clean,injected --prompts 200 --jobs 2

A cell is a run directory OUT/<condition>/seed-<n>; a killed table goes on where it stopped. The table is printed as
Markdown and written to OUT/table.md and OUT/table.json after every finished cell. `--draw validation` scores on the
validation draw: choose settings there, report on `test`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Before torch is imported: one thread per process, no spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from safetensors import safe_open

from holdfast import experiment
from holdfast.cli.list import WORLDS
from holdfast.errors import HoldfastError
from holdfast.files import atomic_path, write_json
from holdfast.metrics.intervals import over_seeds
from holdfast.metrics.paired import holm, paired_seeds, paired_t
from holdfast.stream.summary import summarize_run
from holdfast.tiny.recipe import KEEP_BOUNDS
from holdfast.tiny.stream import StreamSize, write_stream

METHODS = (
    "seqft",
    "hpa",
    "hpa_damping_1_percent",
    "hpa_eps",
    "hpa_phi",
    "hpa_no_projection",
    "largest_change",
    "random_columns",
    "interpolation",
    "largest_change_matched",
    "random_columns_matched",
    "interpolation_matched",
    "cram",
    "cram_hpa",
    "anchor",
    "cram_anchor",
)
# Rows that are no method of their own: a method with other options.
VARIANTS: dict[str, dict[str, Any]] = {
    "hpa_damping_1_percent": {"method": "hpa", "calibration": {"damping": 0.01}},
    "hpa_damping_100_percent": {"method": "hpa", "calibration": {"damping": 1.0}},
    "anchor_benign": {"method": "anchor", "benign_samples": None, "edit": {"benign_share": 0.6}},
    "anchor_drop": {"method": "anchor", "training": {"screen": "drop"}},
    "guardspace_released": {
        "method": "guardspace",
        "null_below": 1e-6,
        "training": {"rank": 16, "alpha": 16},
    },  # alpha / r is 1
    "hpa_drop": {"method": "hpa", "training": {"screen": "drop"}},
    "hpa_screen": {"method": "hpa", "screen": True},
    "hpa_benign": {"method": "hpa", "benign_samples": None},
}
# Beside a cell's data: what they were written for.
SIZE = "size.json"
# (key in summary.json, heading, whether more is better)
FIGURES = (
    ("ap", "AP", True),
    ("mft", "just learned", True),
    ("bwt", "BWT", True),
    ("masr", "MASR", False),
    ("compliance_mean", "= comply", False),
    ("collapse_mean", "+ collapse", False),
    ("over_refusal", "over-refusal", False),
    ("helpful", "helpful", True),
)
# (key of `costs_of`, heading, how it is written)
COSTS = (
    ("train", "training, s", ".0f"),
    ("edit", "calibration + edit, s", ".0f"),
    ("peak_gb", "memory, GB", ".2f"),
    ("kept_mb", "kept, MB", ".1f"),
    ("parameters", "extra parameters", ",.0f"),
    ("request_ms", "a request, ms", ".0f"),
)


def main() -> None:
    options = parse()
    cells = [(condition, seed) for seed in options.seeds for condition in options.conditions]
    for number, (condition, seed) in enumerate([] if options.table_only else cells, 1):
        started = time.monotonic()
        run_cell(options, condition, seed)
        print(f"[{number}/{len(cells)}] {condition}, seed {seed}: {time.monotonic() - started:.0f} s", flush=True)
        publish(options)
    publish(options)
    print((options.out / "table.md").read_text())


def run_cell(options: argparse.Namespace, condition: str, seed: int) -> None:
    harmful = options.harmful if condition == "injected" else 0.0
    recipe = importlib.import_module(WORLDS[options.world])
    data = options.out / "data" / condition / f"seed-{seed}"
    asked = {"prompts": options.prompts, "world": options.world, "harmful": harmful}
    if data.exists():
        require_same_size(data, asked)
    else:
        settings = recipe.SETTINGS
        size = StreamSize(
            train=settings.steps * settings.batch,
            test=options.prompts,
            safety=options.prompts,
            validation=options.prompts,
            safety_validation=options.prompts,
        )
        tasks = options.order or recipe.DEMO.tasks
        write_stream(data, seed=seed, harmful=harmful, size=size, task_names=tasks, world=recipe.WORLD)
        write_json(data / SIZE, asked)
    file = data / ("stream.yaml" if options.draw == "test" else "validation.yaml")
    plain = recipe.run_data(
        file,
        options.methods,
        seed=seed,
        harmful=harmful,
        settings=recipe.SETTINGS,
        limit_between=options.between,
        keep_bounds=options.keep_bounds,
    )
    chosen = json.loads(options.settings.read_text()) if options.settings else {}
    for name, row in {**VARIANTS, **chosen}.items():
        if name in options.methods:
            # Over what the world gives the method that it is of.
            own = recipe.run_data(file, [row["method"]], seed=seed)["methods"][row["method"]]
            plain["methods"][name] = merged(own, row)
    config = experiment.decode_run(plain, base=Path.cwd())
    experiment.run(config, cell_dir(options, condition, seed), jobs=options.jobs, progress=Lines(condition, seed))


def require_same_size(data: Path, asked: Mapping[str, Any]) -> None:
    """Raises SystemExit: the data of a cell are of another size than asked for, so its figures would be, too."""
    found = json.loads((data / SIZE).read_text()) if (data / SIZE).is_file() else {}
    for name, value in found.items():
        if value != asked[name]:
            raise SystemExit(
                f"{data} was written with {name} {value}, and {name} is {asked[name]} now: the table would say that "
                "its figures are of the latter. Give the same, or another --out."
            )


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Both, group by group; the second decides."""
    done = dict(first)
    for key, value in second.items():
        old = done.get(key)
        done[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return done


def cell_dir(options: argparse.Namespace, condition: str, seed: int) -> Path:
    return options.out / options.draw / condition / f"seed-{seed}"


class Lines:
    """A line per finished step: a long table is followed in a log, not on a screen."""

    def __init__(self, condition: str, seed: int) -> None:
        self.where = f"{condition}, seed {seed}"
        self.seen: set[tuple[str, int]] = set()

    def __call__(self, event: str, *, method: str = "", step: int = 0, task: str = "", **_: Any) -> None:
        if event == "step_done" and (method, step) not in self.seen:
            self.seen.add((method, step))
            print(f"{time.strftime('%H:%M:%S')} {self.where}: {method} {step + 1} {task}", flush=True)


def publish(options: argparse.Namespace) -> None:
    """Write the table of the cells that are finished so far."""
    parts, plain = [], {}
    for condition in options.conditions:
        summaries = dict(finished(options, condition))
        if not summaries:
            continue
        rows = {m: row_of([s["methods"].get(m) for s in summaries.values()]) for m in options.methods}
        start = row_of([s["theta_0"] for s in summaries.values()])
        plain[condition] = {"seeds": list(summaries), "theta_0": start, "methods": rows}
        costs = {m: costs_of(options, condition, summaries, m) for m in options.methods}
        plain[condition]["costs"] = costs
        parts.append(markdown(condition, options, list(summaries), start, rows, costs))
    write_json(options.out / "table.json", plain)
    with atomic_path(options.out / "table.md") as temporary:
        temporary.write_text("\n".join(parts))


def finished(options: argparse.Namespace, condition: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for seed in options.seeds:
        try:
            summary = summarize_run(cell_dir(options, condition, seed))
        except HoldfastError:
            continue  # not begun
        if all(summary["methods"].get(m, {}).get("complete") for m in options.methods):
            yield seed, summary


def row_of(methods: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """Mean, standard deviation and 95 % t interval over seeds of every figure that all seeds have."""
    row = {}
    for key, _, _ in FIGURES:
        values = [m[key] for m in methods if m is not None and m.get(key) is not None]
        if values and len(values) == len(methods):
            row[key] = {**over_seeds(values).to_json(), "values": values}
    return row


def costs_of(
    options: argparse.Namespace, condition: str, summaries: Mapping[int, Mapping[str, Any]], method: str
) -> dict[str, float]:
    """Means over seeds, of a whole stream: seconds of this machine, and what is kept beside one released model.

    Kept are what the last step carries to the next, and adapters of its checkpoint; the latter alone are extra
    parameters. `peak_gb`: the most that the process held while it learned and edited, libraries and all.
    """
    found: list[dict[str, float]] = []
    for seed, summary in summaries.items():
        figures = summary["methods"][method]
        seconds = figures["seconds"]
        run = cell_dir(options, condition, seed)
        last = max(
            (run / "methods" / method).glob("*/record.json"), key=lambda path: int(path.parent.name.split("-")[0])
        )
        adapters = [
            run / str(place).removeprefix("run:") for place in json.loads(last.read_text())["checkpoint"]["adapters"]
        ]
        size = sum(
            file.stat().st_size
            for folder in (last.parent / "carry", *adapters)
            for file in folder.rglob("*")
            if file.is_file()
        )
        row = {"train": seconds["train"], "edit": seconds["begin"] + seconds["end"], "kept_mb": size / 1e6}
        row["parameters"] = float(sum(parameters_of(file) for one in adapters for file in one.rglob("*.safetensors")))
        if figures["request_seconds"] is not None:
            row["request_ms"] = 1000 * figures["request_seconds"]
        # Of learning and editing; of answering it is much the same for all.
        peaks = [peak.get("host", 0) for phase, peak in figures["peak_bytes"].items() if phase != "evaluate"]
        if any(peaks):
            row["peak_gb"] = max(peaks) / 1e9
        found.append(row)
    return {key: sum(row[key] for row in found) / len(found) for key in found[0] if all(key in row for row in found)}


def parameters_of(file: Path) -> int:
    """How many numbers lie in a safetensors file."""
    with safe_open(file, framework="np") as tensors:
        names = [name for name in tensors.keys() if "probe" not in name]  # noqa: SIM118 (what a base is told by)
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)


def markdown(
    condition: str,
    options: argparse.Namespace,
    seeds: Sequence[int],
    start: Mapping[str, Any],
    rows: Mapping[str, Any],
    costs: Mapping[str, Mapping[str, float]],
) -> str:
    name = "clean" if condition == "clean" else f"{100 * options.harmful:g} % harmful samples in every task"
    bounds = "-".join(f"{b:g}" for b in options.keep_bounds)
    lines = [
        f"### {name}: {options.draw} draw, {len(seeds)} seed(s), {options.prompts} prompts per set, p {bounds} %, "
        f"damping {importlib.import_module(WORLDS[options.world]).DAMPING:g}",
        "",
        "% over seeds: mean ± standard deviation [95 % interval of the mean]",
        "",
        "| method | " + " | ".join(heading for _, heading, _ in (*FIGURES, *COSTS)) + " |",
        "|---|" + "---:|" * (len(FIGURES) + len(COSTS)),
        "| before any task | " + " | ".join(cell(start.get(key)) for key, _, _ in FIGURES) + " |" + " |" * len(COSTS),
    ]
    for method, row in rows.items():
        figures = " | ".join(cell(row.get(key)) for key, _, _ in FIGURES)
        paid = " | ".join(f"{costs[method][key]:{form}}" if key in costs[method] else "–" for key, _, form in COSTS)
        lines.append(f"| {method} | {figures} | {paid} |")
    lines += [
        "",
        f"Seconds are this machine's, of a whole stream, {options.jobs} process(es) side by side. Calibrations are "
        "part of an edit, which takes one layer after another; what guardspace, safe_anchor and one_shot do with "
        "safety data is part of their training. Memory: the most that a process held while it learned and edited, "
        "with libraries and what methods before left in it. Kept: beside one released model, without data (replay) and "
        "another model (safe_lora, resta). A request: generating alone, in batches.",
    ]
    return "\n".join([*lines, "", *differences(rows, options.against), ""])


# What the methods are compared by, seed by seed.
COMPARED = ("ap", "bwt", "masr", "compliance_mean", "over_refusal")


def differences(rows: Mapping[str, Any], against: str) -> list[str]:
    """`against` minus every other method, by seed: the methods of a seed share data, prompts and initial factors."""
    first = rows.get(against, {})
    headings = {key: heading.removeprefix("= ") for key, heading, _ in FIGURES}
    others = [
        name for name, row in rows.items() if name != against and all(key in row and key in first for key in COMPARED)
    ]
    if not others or len(first[COMPARED[0]]["values"]) < 2:
        return []
    # A column is a family: what is said of many methods at once is corrected for their number.
    corrected = {
        key: holm([paired_t(first[key]["values"], rows[name][key]["values"]).p for name in others]) for key in COMPARED
    }
    lines = [
        f"{against} minus the other, paired by seed, in points: mean [95 % interval]; * where the interval leaves out "
        f"zero, ** where it does so among {len(others)} comparisons too (paired t, Holm)",
        "",
        f"| {against} minus | " + " | ".join(headings[key] for key in COMPARED) + " |",
        "|---|" + "---:|" * len(COMPARED),
    ]
    for place, name in enumerate(others):
        cells = [difference(first[key], rows[name][key], corrected[key][place]) for key in COMPARED]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def difference(first: Mapping[str, Any], other: Mapping[str, Any], corrected: float) -> str:
    test = paired_seeds(first["values"], other["values"])
    assert test.interval is not None
    paired = test.interval.to_json()
    clear = test.interval.leaves_out_zero
    star = " **" if clear and corrected < 0.05 else " *" if clear else ""
    return cell({**paired, "std": None}) + interval(paired) + star


def interval(figure: Mapping[str, Any]) -> str:
    if figure.get("low") is None:
        return ""
    return f" [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]".replace("-", "−")


def cell(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "–"
    text = f"{100 * figure['value']:.1f}"
    if figure.get("std") is not None and not math.isnan(figure["std"]):
        text += f" ± {100 * figure['std']:.1f}" + interval(figure)
    return text.replace("-", "−")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=seeds, default=seeds("0..4"), help="0..4 or 0,3,7")
    parser.add_argument("--conditions", type=names, default=["clean", "injected"])
    parser.add_argument("--methods", type=names, default=list(METHODS))
    parser.add_argument("--prompts", type=int, default=200, help="per test split and side of a safety set")
    parser.add_argument("--between", type=int, default=0, help="of them along the way; not part of any figure shown")
    parser.add_argument(
        "--harmful", type=float, default=0.01, help="share of harmful samples of the injected condition"
    )
    parser.add_argument("--order", type=names, default=None, help="tasks in this order; give it an --out of its own")
    parser.add_argument(
        "--world", choices=WORLDS, default="tiny", help="small: a pretrained model, an hour a method; --out of its own"
    )
    parser.add_argument("--draw", choices=("test", "validation"), default="test")
    parser.add_argument(
        "--settings", type=Path, default=None, help="chosen.json of choose.py; give it an --out of its own"
    )
    parser.add_argument("--keep-bounds", type=bounds, default=KEEP_BOUNDS, help="p_min,p_max in percent")
    parser.add_argument("--against", default="hpa", help="the method that the others are compared with")
    parser.add_argument("--table-only", action="store_true", help="of the cells that are finished; run nothing")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/five_seeds"))
    return parser.parse_args()


def seeds(text: str) -> list[int]:
    first, dots, last = text.partition("..")
    return list(range(int(first), int(last) + 1)) if dots else [int(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def bounds(text: str) -> tuple[float, float]:
    low, high = (float(part) for part in text.split(","))
    return low, high


if __name__ == "__main__":
    sys.exit(main())
