"""A run directory -> what a report shows. Reads records and answers; an unfinished run is shown as far as it got.

Every figure is the summary's, made anew from the records, so a report never shows a number that they do not hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.data.names import slug
from holdfast.errors import RunError
from holdfast.files import read_jsonl
from holdfast.metrics.intervals import Interval
from holdfast.reports.titles import title_of
from holdfast.stream.record import Record, RunDirectory, read_json
from holdfast.stream.summary import summarize_run

Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class MethodView:
    """One method of one run. figures: its entry in the summary (schema: `holdfast.stream.summary`), rates in 0..1.

    tasks: those that are finished, of the stream's `total`.
    """

    name: str
    tasks: tuple[str, ...]
    total: int
    figures: Mapping[str, Any]
    behaviour: dict[str, float]
    edits: list[tuple[str, Rows]]
    folder: Path
    records: tuple[Record, ...]

    @property
    def finished(self) -> int:
        """Number of tasks that were learned."""
        return len(self.tasks)

    @property
    def progress(self) -> str:
        """`"2 of 3 tasks"` of an unfinished method, else nothing."""
        return "" if self.finished == self.total else f"{self.finished} of {self.total} tasks"

    @property
    def label(self) -> str:
        """What tables and figures call it."""
        return labelled(self.name, self.progress)

    @property
    def title(self) -> str:
        """What readers call it."""
        return labelled(title_of(self.name), self.progress)

    @property
    def matrix(self) -> list[list[float | None]]:
        """Accuracy, rates 0..1: a row per task learned, a column per task, None above the diagonal."""
        return list(self.figures["accuracy"])

    @property
    def safety_sets(self) -> list[str]:
        """Names of the safety sets."""
        return list(self.figures["asr"])

    def figure(self, key: str) -> float | None:
        """A figure after the last finished task; None where it is not defined."""
        value = self.figures.get(key)
        return None if value is None else float(value)

    def along(self, key: str) -> list[float | None]:
        """A mean over the safety sets after each task: masr, compliance, collapse, over_refusal, helpful."""
        return list(self.figures["steps_mean"][key])

    def bounds(self, key: str) -> tuple[float, float] | None:
        """What a mean over the safety sets could be whatever the unscored replies are; None where none is unscored."""
        found = self.figures.get("bounds", {}).get(key)
        return (found[0], found[1]) if found and found[1] - found[0] > 1e-9 else None

    def interval(self, key: str) -> Interval | None:
        """The bootstrap interval over test samples that the summary holds for `key`, if any."""
        found = self.figures["intervals"].get(key)
        if not found:
            return None
        plain: dict[str, Any] = {k: math.nan if v is None and k != "std" else v for k, v in found.items()}
        return Interval(**plain)


@dataclass(frozen=True, kw_only=True)
class RunView:
    """One run directory: its methods in the order they were asked for.

    others: folders that hold further methods of the same run (cells of a grid that varies its methods).
    cell: of a finished cell of a grid, what it was asked for; None: the folder is none.
    """

    path: Path
    stream: str
    condition: str
    seed: int
    tasks: tuple[str, ...]
    theta_0: Record
    start: Mapping[str, Any]  # theta_0's entry in the summary
    methods: dict[str, MethodView]
    config: dict[str, Any]
    versions: dict[str, str]
    others: tuple[Path, ...] = ()
    cell: Mapping[str, Any] | None = None


class NothingFinishedError(RunError):
    """A run directory in which no task is finished yet."""


def load_run(path: Path | str) -> RunView:
    """Read the run directory `path`.

    Raises:
        RunError: no run there. NothingFinishedError: no finished step yet.
    """
    try:
        return _load_run(Path(path))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RunError(f"{path}: a record in it is damaged ({type(error).__name__}: {error}).") from error


def _load_run(path: Path) -> RunView:
    directory = RunDirectory(path)
    if not directory.config_path.is_file():
        raise RunError(
            f"{path} is no run directory (no config.json). Give the folder that `holdfast run` or `holdfast demo` "
            "wrote with --out."
        )
    summary = summarize_run(path)
    theta_0 = directory.read_record(directory.theta_0_dir)
    if theta_0 is None or not summary["methods"]:
        raise NothingFinishedError(
            f"{path}: no task is finished yet. Run it on (the same command resumes), then report."
        )
    views = {}
    for name, figures in summary["methods"].items():
        records = directory.records(name, theta_0.tasks)
        folders = [directory.step_dir(name, step, record.task) for step, record in enumerate(records)]
        rows = [(record.task, _edit_rows(f / "edit.json")) for record, f in zip(records, folders, strict=True)]
        views[name] = MethodView(
            name=name,
            tasks=theta_0.tasks[: len(records)],
            total=len(theta_0.tasks),
            figures=figures,
            behaviour=behaviour(records[-1]),
            edits=[(task, found) for task, found in rows if found],
            folder=directory.method_dir(name),
            records=tuple(records),
        )
    return RunView(
        path=path,
        stream=str(summary["name"]),
        condition=_condition(summary["config"]),
        seed=int(summary["seed"]),
        tasks=theta_0.tasks,
        theta_0=theta_0,
        start=summary["theta_0"],
        methods=views,
        config=directory.read_config(),
        versions=dict(theta_0.versions),
        cell=_cell(directory.mark_path),
    )


def _cell(path: Path) -> Mapping[str, Any] | None:
    mark = read_json(path) if path.is_file() else {}
    return mark["config"] if isinstance(mark.get("config"), Mapping) else None


def labelled(name: str, *notes: str) -> str:
    """`name (note, note)`, without those that are empty."""
    said = ", ".join(note for note in notes if note)
    return f"{name} ({said})" if said else name


def read_rows(path: Path) -> Rows:
    """Rows of a JSONL file; a last line cut off by a crash is left out.

    Raises: RunError: another line that is no JSON.
    """
    if not path.is_file():
        return []
    return read_jsonl(path, "answers", error=RunError, torn_end=True)


def task_rows(folder: Path, task: str) -> Rows:
    """Answers to one task's test samples, from the step folder (or theta_0's)."""
    return read_rows(folder / "predictions" / f"task-{slug(task)}.jsonl")


def safety_rows(folder: Path, name: str) -> Rows:
    """Replies to one safety set, both sides."""
    return read_rows(folder / "predictions" / f"safety-{slug(name)}.jsonl")


def step_folder(view: MethodView, step: int) -> Path:
    """Folder of step `step` (0-based) of a method."""
    return view.folder / f"{step + 1}-{slug(view.tasks[step])}"


def behaviour(record: Record) -> dict[str, float]:
    """Mean over the safety sets of the shares of refusal, compliance, other_safe, collapse and unscored; they
    sum to 1."""
    shares: dict[str, list[float]] = {
        "refusal": [],
        "compliance": [],
        "other_safe": [],
        "collapse": [],
        "unscored": [],
    }
    for row in record.safety.values():
        n = max(1, int(row.get("n") or 0))
        missing = int(row.get("unscored") or 0) / n
        shares["unscored"].append(missing)
        for kind in ("refusal", "compliance", "other_safe", "collapse"):
            shares[kind].append(float(row.get(kind) or 0.0) * (1 - missing))
    return {kind: sum(values) / len(values) if values else 0.0 for kind, values in shares.items()}


def _edit_rows(path: Path) -> Rows:
    if not path.is_file():
        return []
    data = read_json(path)
    rows = data.get("layers", data.get("rows", [])) if isinstance(data, Mapping) else data
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise RunError(f"{path} holds no rows of layers. Restore it, or move it away to have a report without it.")
    return [_named(row) for row in rows]


def _named(row: Mapping[str, Any]) -> dict[str, Any]:
    """A layer's row with `linear`, the part of its name that is the same in every decoder block."""
    name = str(row.get("name", row.get("layer", "")))
    parts = name.removesuffix(".weight").split(".")
    digits = [i for i, part in enumerate(parts) if part.isdigit()]
    return {**row, "linear": ".".join(parts[digits[-1] + 1 :] if digits else parts[-1:])}


def _find(data: Any, *keys: str) -> Any:
    for key in keys:
        if not isinstance(data, Mapping) or key not in data:
            return None
        data = data[key]
    return data


def _condition(config: Mapping[str, Any]) -> str:
    """How the training data was tampered with, if it was: what separates two groups of runs in one report."""
    injection = config.get("injection")
    fraction = _find(injection, "fraction") if injection else None
    return f"{100 * float(fraction):g} % harmful samples injected" if fraction else "clean data"
