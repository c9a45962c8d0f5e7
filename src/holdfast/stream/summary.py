"""Records of a run directory -> summary.json: the figures of every method, and nothing that is not in the records.

```
{"format", "name", "seed", "tasks": [...], "safety_sets": [...], "versions", "config",
 "theta_0": {"scores": {task: value}, "asr": {set: rate}, ..., "masr", "compliance_mean", ...},
 "methods": {name: {
    "steps": t, "complete": bool, "config": {...},
    "accuracy": [[A[t][j] or null]],           rows = after task t, columns = task j
    "ap", "mft", "maa", "bwt", "bwt_t", "forgetting", "running": [...],
    "asr" | "refusal" | "compliance" | "other_safe" | "collapse": {set: [after task 1..t]},
    "benign": {set: {"over_refusal": [...], "helpful": [...]}},
    "masr", "dasr", "compliance_mean", "collapse_mean", "over_refusal", "helpful": after the last task, mean over sets,
    "bounds": {"masr" | "compliance_mean" | "collapse_mean" | "over_refusal" | "helpful": [low, high] or null},
    "steps_mean": {"masr" | "compliance" | "collapse" | "over_refusal" | "helpful": [after task 1..t]},
    "judges": {judge: {set: [asr]}},            the other judges
    "intervals": {"ap" | "bwt" | "masr" | "compliance_mean" | "over_refusal": {"value", "low", "high", "n", ...}},
    "unscored": {"tasks": n, "safety": n}, "seconds": {phase: s}, "peak_bytes": {phase: {"host", "device"}},
    "request_seconds": s}}}
```
"request_seconds" is wall clock of generating an answer after the last step, in batches (null: not measured).
"bounds" are what a mean over the sets could be, whatever the unscored replies are.
Rates are 0..1; what is not defined (BWT of one task, a set that no judge could score) is null. Intervals resample test
prompts, so they say how sure the figure of these weights is; the spread over seeds is another question.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from holdfast.data.names import slug
from holdfast.errors import RunError
from holdfast.files import read_jsonl, write_json
from holdfast.metrics.continual import summarize as summarize_matrix
from holdfast.metrics.intervals import bootstrap, bootstrap_ap, bootstrap_bwt, wilson
from holdfast.metrics.safety import worst_case
from holdfast.stream.memory import highest
from holdfast.stream.record import Record, RunDirectory, versions

FORMAT = "holdfast.summary/1"
# What depends on the machine.
COSTS = ("seconds", "peak_bytes", "request_seconds")
_RATES = ("asr", "refusal", "compliance", "other_safe", "collapse")
_BENIGN = ("over_refusal", "helpful")


def write_summary(root: Path) -> dict[str, Any]:
    """Assemble `root`/summary.json from the records that are there, and return it."""
    summary = summarize_run(root)
    write_json(RunDirectory(root).summary_path, summary)
    return summary


def summarize_run(root: Path) -> dict[str, Any]:
    """The summary of a run directory, finished or not.

    Raises: RunError: not a run directory, or no record of theta_0.
    """
    directory = RunDirectory(root)
    if not directory.config_path.is_file():
        raise RunError(
            f"{root} has no config.json; expected a run directory made by `holdfast run` or `holdfast demo`."
        )
    stored = directory.read_config()
    theta_0 = directory.read_record(directory.theta_0_dir)
    if theta_0 is None:
        raise RunError(f"{root} has no record of theta_0 yet; run it first, or repeat the command to resume it.")
    methods = {}
    for name in stored["methods"]:
        records = directory.records(name, theta_0.tasks)
        if records:
            methods[name] = {
                **_method(directory, name, records, theta_0),
                "config": stored["methods"][name],
            }
    return {
        "format": FORMAT,
        "name": stored["config"].get("name", root.name),
        "seed": theta_0.seed,
        "tasks": list(theta_0.tasks),
        "safety_sets": list(theta_0.safety),
        "versions": versions(),
        "config": stored["config"],
        "theta_0": _theta_0(directory, theta_0),
        "methods": methods,
    }


def without_timings(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The summary without the machine's time and memory: what two runs of one configuration must have in common."""
    methods = {n: {k: v for k, v in m.items() if k not in COSTS} for n, m in summary["methods"].items()}
    theta_0 = {k: v for k, v in summary["theta_0"].items() if k not in COSTS}
    return {**summary, "theta_0": theta_0, "methods": methods}


def predictions(folder: Path, kind: str, name: str) -> list[dict[str, Any]]:
    """Lines of `folder`/predictions/<kind>-<name>.jsonl; kind is `task` or `safety`.

    Raises: RunError: the file is not there.
    """
    path = folder / "predictions" / f"{kind}-{slug(name)}.jsonl"
    if not path.is_file():
        raise RunError(f"{path} is missing, but its record is there. Delete {folder} to have this step made again.")
    return read_jsonl(path, "answers", error=RunError)


def _theta_0(directory: RunDirectory, record: Record) -> dict[str, Any]:
    return {
        "scores": {task: row["value"] for task, row in record.scores.items()},
        **{rate: {s: _rate_of(row, rate) for s, row in record.safety.items()} for rate in _RATES},
        "benign": {s: {k: row["benign"][k] for k in _BENIGN} for s, row in record.safety.items() if "benign" in row},
        **_means(record),
        "bounds": _bounds(record),
        "intervals": _safety_intervals(directory.theta_0_dir, record),
        "unscored": _unscored([record]),
        "seconds": dict(record.seconds),
        "peak_bytes": _peaks([record]),
        "request_seconds": _request_seconds(record),
    }


def _method(directory: RunDirectory, name: str, records: Sequence[Record], theta_0: Record) -> dict[str, Any]:
    steps, last = len(records), records[-1]
    tasks = theta_0.tasks[:steps]
    matrix = [
        [record.scores[task]["value"] if j <= t else None for j, task in enumerate(tasks)]
        for t, record in enumerate(records)
    ]
    figures = summarize_matrix(np.array(matrix, dtype=np.float64), missing="propagate").to_json()
    figures.pop("last")
    means = [_means(record) for record in records]
    start = _means(theta_0)["masr"]
    final = means[-1]
    folders = [directory.step_dir(name, step, task) for step, task in enumerate(tasks)]
    return {
        "steps": steps,
        "complete": steps == len(theta_0.tasks),
        "accuracy": matrix,
        **figures,
        **{rate: {s: [_rate_of(r.safety[s], rate) for r in records] for s in last.safety} for rate in _RATES},
        "benign": {
            # A step that asked nothing on the way has no benign row.
            s: {k: [r.safety[s].get("benign", {}).get(k) for r in records] for k in _BENIGN}
            for s, row in last.safety.items()
            if "benign" in row
        },
        **final,
        "bounds": _bounds(last),
        "dasr": None if final["masr"] is None or start is None else final["masr"] - start,
        "steps_mean": {
            "masr": [m["masr"] for m in means],
            "compliance": [m["compliance_mean"] for m in means],
            "collapse": [m["collapse_mean"] for m in means],
            "over_refusal": [m["over_refusal"] for m in means],
            "helpful": [m["helpful"] for m in means],
        },
        "judges": {
            judge: {s: [r.safety[s]["judges"][judge]["asr"] for r in records] for s in last.safety}
            for judge in _other_judges(last)
        },
        "intervals": {**_task_intervals(folders, records, figures), **_safety_intervals(folders[-1], last)},
        "unscored": _unscored(records),
        "seconds": _seconds(records),
        "peak_bytes": _peaks(records),
        "request_seconds": _request_seconds(last),
    }


def _rate_of(row: Mapping[str, Any], rate: str) -> float | None:
    # Records of before the class existed counted such replies as another one.
    value: float | None = row.get(rate, 0.0) if rate == "other_safe" else row[rate]
    return value


def _means(record: Record) -> dict[str, float | None]:
    rows = list(record.safety.values())
    benign = [row["benign"] for row in rows if "benign" in row]
    return {
        "masr": _mean([row["asr"] for row in rows]),
        "compliance_mean": _mean([row["compliance"] for row in rows]),
        "collapse_mean": _mean([row["collapse"] for row in rows]),
        "over_refusal": _mean([row["over_refusal"] for row in benign]),
        "helpful": _mean([row["helpful"] for row in benign]),
    }


def _bounds(record: Record) -> dict[str, list[float] | None]:
    """Worst-case bounds of the means over the safety sets; null where a set was not asked on that side."""
    rows = list(record.safety.values())
    benign = [row for row in rows if "benign" in row]
    kinds = {"masr": (rows, "asr"), "compliance_mean": (rows, "compliance"), "collapse_mean": (rows, "collapse")}
    kinds |= {"over_refusal": (benign, "over_refusal"), "helpful": (benign, "helpful")}
    found: dict[str, list[float] | None] = {}
    for name, (some, key) in kinds.items():
        pairs = [_set_bounds(row, key) for row in some]
        known = [pair for pair in pairs if pair is not None]
        whole = bool(known) and len(known) == len(pairs)
        found[name] = [sum(side) / len(known) for side in zip(*known, strict=True)] if whole else None
    return found


def _set_bounds(row: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    stored = row.get("bounds", {}).get(key)
    if stored is not None:
        return float(stored[0]), float(stored[1])
    # A record made before bounds were stored says the same by its counts.
    side = row["benign"] if key in _BENIGN else row
    rate, n, unscored = side.get(key), side.get("n") or 0, side.get("unscored") or 0
    return worst_case(rate, n, unscored) if (rate is None) == (unscored == n) else None


def _mean(values: Sequence[float | None]) -> float | None:
    """Plain mean; a mean over fewer sets is another figure, so one absent value makes it absent."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _other_judges(record: Record) -> list[str]:
    return list(dict.fromkeys(judge for row in record.safety.values() for judge in row.get("judges", {})))


def _unscored(records: Sequence[Record]) -> dict[str, int]:
    return {
        "tasks": sum(row.get("unscored", 0) for r in records for row in r.scores.values()),
        "safety": sum(
            row.get("unscored", 0) + row.get("benign", {}).get("unscored", 0)
            for r in records
            for row in r.safety.values()
        ),
    }


def _seconds(records: Sequence[Record]) -> dict[str, float]:
    phases = dict.fromkeys(phase for record in records for phase in record.seconds)
    total = {phase: round(sum(r.seconds.get(phase, 0.0) for r in records), 3) for phase in phases}
    return {**total, "total": round(sum(total.values()), 3)}


def _peaks(records: Sequence[Record]) -> dict[str, dict[str, int]]:
    """The highest of every phase over the steps; a phase of which nothing is known is left out."""
    found: dict[str, dict[str, int]] = {}
    for record in records:
        for phase, peak in record.peak_bytes.items():
            if peak:
                found[phase] = highest(found.get(phase, {}), peak)
    return found


def _request_seconds(last: Record) -> float | None:
    asked = last.answering.get("requests", 0)
    return last.answering["seconds"] / asked if asked else None


def _task_intervals(folders: Sequence[Path], records: Sequence[Record], figures: Mapping[str, Any]) -> dict[str, Any]:
    """Intervals of AP and BWT; null where a scorer gives one figure per corpus and none per sample, and where the last
    step did not ask an earlier task (`limit_between` 0, before the stream's end). Of a task that it asked in part only,
    the samples that were asked both times count for BWT."""
    tasks = [record.task for record in records]
    final = [_values(folders[-1], records[-1], task) for task in tasks]
    learned = [_values(f, r, task) for f, r, task in zip(folders, records, tasks, strict=True)]
    scored = [[x for x in v.values() if x is not None] for v in final if v is not None]
    ap = bootstrap_ap(scored).to_json() if scored and len(scored) == len(tasks) else None
    pairs = [_both(a, b) for a, b in zip(learned[:-1], final[:-1], strict=True)]
    known = [p for p in pairs if p is not None]
    bwt = None
    if known and len(known) == len(pairs):
        bwt = bootstrap_bwt([a for a, _ in known], [b for _, b in known]).to_json()
    return {
        "ap": ap if figures["ap"] is not None else None,
        "bwt": bwt if figures["bwt"] is not None else None,
    }


def _values(folder: Path, record: Record, task: str) -> dict[str, float | None] | None:
    if not record.scores[task]["n"]:
        return None
    values = {row["id"]: row["value"] for row in predictions(folder, "task", task)}
    return values if any(v is not None for v in values.values()) else None


def _both(
    a: Mapping[str, float | None] | None, b: Mapping[str, float | None] | None
) -> tuple[list[float], list[float]] | None:
    """Scores of the samples that were scored both times."""
    if a is None or b is None:
        return None
    pairs = [(x, b.get(sample)) for sample, x in a.items()]
    kept = [(x, y) for x, y in pairs if x is not None and y is not None]
    return ([x for x, _ in kept], [y for _, y in kept]) if kept else None


def _safety_intervals(folder: Path, record: Record) -> dict[str, Any]:
    rows = {name: predictions(folder, "safety", name) for name in record.safety}

    def groups(side: str, hit: Callable[[Mapping[str, Any]], bool], key: str) -> list[list[float]]:
        found = ([r for r in lines if r["side"] == side and r[key] != "unscored"] for lines in rows.values())
        return [[float(hit(r)) for r in lines] for lines in found if lines]

    return {
        "masr": _rate_interval(groups("unsafe", lambda r: r["label"] == "unsafe", "label")),
        "compliance_mean": _rate_interval(groups("unsafe", lambda r: r["behaviour"] == "compliance", "behaviour")),
        "over_refusal": _rate_interval(groups("benign", lambda r: r["behaviour"] == "refusal", "behaviour")),
    }


def _rate_interval(groups: Sequence[Sequence[float]]) -> dict[str, Any] | None:
    if not groups:
        return None
    hits, n = int(sum(map(sum, groups))), sum(map(len, groups))
    if hits in (0, n):
        # Resampling a constant gives an interval without width; Wilson's has one.
        return wilson(hits, n).to_json()

    def mean_of_sets(means: list[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
        return np.mean([m[:, 0] for m in means], axis=0)

    return bootstrap(groups, mean_of_sets).to_json()
