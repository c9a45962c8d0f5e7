"""Schema of a run directory: where things lie, what they hold, how a configuration is compared.

```
RUN/config.json                          what was asked for, resolved; a run directory belongs to one configuration
                                         ("versions" of packages; "continued": what a later call changed, where it may)
RUN/pictures.json                        size, time and (where there are few) hash of every picture
RUN/theta_0/record.json                  the starting model: scores of every task, safety
RUN/theta_0/predictions/*.jsonl
RUN/methods/<name>/<t>-<task>/           t = 1..n, as in theta_t: the model after t tasks
    phases.json                          marks of the finished phases (begin, train, end) with the checkpoint each gave
    record.json                          written last, in one rename: the only mark that a step is done
    predictions/{task,safety}-*.jsonl    one answer per line
    edit.json, curvature.safetensors     what the method chose to keep
RUN/summary.json                         figures of all methods (holdfast.stream.summary)
RUN/data/                                the stream itself, where the run was asked to draw it (the demo)
```

record.json: `{"format", "method", "t", "task", "tasks": [names 1..t], "seed", "checkpoint": {"base", "adapters"},
"scores": {task: {"value", "n", "scorer", "mode", "unscored"}}, "safety": {set: {...}}, "seconds": {phase: s},
"peak_bytes": {phase: {"host", "device"}}, "answering": {"requests", "seconds"}, "versions": {...}}`. Rates are 0..1, an
absent figure is null. Paths inside the run directory are relative to it, marked `run:`, so that the directory can be
moved.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from holdfast import files
from holdfast.data.names import slug
from holdfast.errors import RunError
from holdfast.files import write_json
from holdfast.stream.protocol import Checkpoint

FORMAT = "holdfast.record/1"
CONFIG_FORMAT = "holdfast.run/1"
_PACKAGES = ("holdfast", "torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One finished step: a method's checkpoint after task t (t = 0, method "" and task "": theta_0)."""

    method: str
    t: int
    task: str
    tasks: tuple[str, ...]
    seed: int
    checkpoint: Checkpoint
    scores: Mapping[str, Mapping[str, Any]]
    safety: Mapping[str, Mapping[str, Any]]
    seconds: Mapping[str, float]
    peak_bytes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    answering: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run directory, and reading and writing of its records."""

    root: Path

    @property
    def config_path(self) -> Path:
        """Where the resolved configuration lies."""
        return self.root / "config.json"

    @property
    def summary_path(self) -> Path:
        """Where the figures of all methods lie."""
        return self.root / "summary.json"

    @property
    def mark_path(self) -> Path:
        """What says that a grid's cell is finished, and what it was asked for; other runs have none."""
        return self.root / "finished.json"

    @property
    def theta_0_dir(self) -> Path:
        """Folder of the starting model's record and answers."""
        return self.root / "theta_0"

    def read_config(self) -> dict[str, Any]:
        """config.json. Raises RunError: damaged, or of something else."""
        config = read_json(self.config_path)
        parts = [config.get("config"), config.get("methods")] if isinstance(config, dict) else [None]
        if not all(isinstance(part, dict) for part in parts):
            raise RunError(f"{self.config_path} was not written by this version of holdfast, or is damaged.")
        found: dict[str, Any] = config
        return found

    def method_dir(self, method: str) -> Path:
        """Folder of one method's steps."""
        return self.root / "methods" / method

    def step_dir(self, method: str, step: int, task: str) -> Path:
        """Folder of task `step` (0-based): `methods/<method>/<step + 1>-<task>`."""
        return self.method_dir(method) / f"{step + 1}-{slug(task)}"

    def write_record(self, folder: Path, record: Record) -> None:
        """Write record.json of a finished step in one rename, paths inside the run relative to it.

        Raises: StorageError: the disk is full or the folder cannot be written.
        """
        checkpoint = Checkpoint(
            base=self.relative(record.checkpoint.base),
            adapters=tuple(self.relative(a) for a in record.checkpoint.adapters),
        )
        data = {
            "format": FORMAT,
            "method": record.method,
            "t": record.t,
            "task": record.task,
            "tasks": list(record.tasks),
            "seed": record.seed,
            "checkpoint": checkpoint.to_json(),
            "scores": record.scores,
            "safety": record.safety,
            "seconds": record.seconds,
            "peak_bytes": record.peak_bytes,
            "answering": record.answering,
            "versions": record.versions,
        }
        write_json(folder / "record.json", data)

    def read_record(self, folder: Path) -> Record | None:
        """The record in `folder`, or None when the step is not done.

        Raises:
            RunError: it is of another format or lacks a key.
        """
        path = folder / "record.json"
        if not path.is_file():
            return None
        data = read_json(path)
        found = data.get("format") if isinstance(data, dict) else None
        if found != FORMAT:
            raise RunError(
                f"{path}: format is {found!r}, expected {FORMAT!r}. Delete {folder} to have this step made again."
            )
        kinds = {"tasks": list} | dict.fromkeys(
            ("scores", "safety", "seconds", "peak_bytes", "answering", "versions", "checkpoint"), dict
        )
        for key, kind in kinds.items():
            if not isinstance(data.get(key, kind()), kind):
                raise RunError(
                    f"{path}: {key} is {data[key]!r:.60}; expected a {kind.__name__}. Delete {folder} to have this "
                    "step made again."
                )
        try:
            return Record(
                method=data["method"],
                t=data["t"],
                task=data["task"],
                tasks=tuple(data["tasks"]),
                seed=data["seed"],
                checkpoint=self.resolve(Checkpoint.from_json(data["checkpoint"])),
                scores=data["scores"],
                safety=data["safety"],
                seconds=data["seconds"],
                peak_bytes=data.get("peak_bytes", {}),  # records of before it was measured
                answering=data.get("answering", {}),
                versions=data["versions"],
            )
        except KeyError as error:
            raise RunError(f"{path}: key {error} is missing. Delete {folder} to have this step made again.") from None

    def records(self, method: str, task_names: Sequence[str]) -> list[Record]:
        """Records of the leading finished steps of `method`, in order."""
        found = []
        for step, task in enumerate(task_names):
            record = self.read_record(self.step_dir(method, step, task))
            if record is None:
                break
            found.append(record)
        return found

    def methods(self) -> list[str]:
        """Names of the methods that have a folder here."""
        folder = self.root / "methods"
        return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []

    def relative(self, path: str) -> str:
        """`path` relative to the run directory when it lies inside, else unchanged (a hub id, a folder elsewhere)."""
        absolute = Path(path).absolute()
        root = self.root.absolute()
        return f"run:{absolute.relative_to(root).as_posix()}" if absolute.is_relative_to(root) else path

    def resolve(self, checkpoint: Checkpoint) -> Checkpoint:
        """Inverse of `relative` for every path of a checkpoint."""

        def full(path: str) -> str:
            return str(self.root.absolute() / path.removeprefix("run:")) if path.startswith("run:") else path

        return Checkpoint(base=full(checkpoint.base), adapters=tuple(full(a) for a in checkpoint.adapters))


def read_json(path: Path) -> Any:
    """The JSON of `path`.

    Raises:
        RunError: it is not JSON. holdfast writes it in one rename, so something else damaged it.
    """
    try:
        return files.read_json(path, "a record of a run", error=RunError)
    except RunError as error:
        raise RunError(
            f"{error} holdfast writes it in one rename, so another program changed it: "
            f"restore it, or delete {path.parent} to have it made again."
        ) from None


def versions() -> dict[str, str]:
    """Versions that decide what a number means, without importing the packages."""
    found = {"python": platform.python_version(), "platform": platform.machine()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


# Options of a method's `training` that change memory or time, and the result by no more than rounding.
FREE_OPTIONS = ("micro_batch_size", "save_steps", "workers")
# Options that a task which is not yet learned may be given anew; a half-learned one starts again.
NEXT_TASK_OPTIONS = ("max_length", "max_cut_share")
# Written into a step's folder where training stopped because a number was not finite.
DIVERGED = "diverged.json"


# (method, or None for what all share; what was recorded of it) -> the same in the options of today: by their names,
# with those that are new since then.
AsToday = Callable[[str | None, Mapping[str, Any]], Mapping[str, Any]]


def claim(
    run: RunDirectory,
    config: Mapping[str, Any],
    methods: Mapping[str, Mapping[str, Any]],
    *,
    grows: Collection[str] = (),
    today: AsToday = lambda method, recorded: recorded,
) -> tuple[str, ...]:
    """Write config.json of a new run directory, or check that an old one was made with the same configuration.

    A method that the directory does not know yet is added; a changed one is refused, but for what mends a run that
    stopped: FREE_OPTIONS of `training` at any time, NEXT_TASK_OPTIONS for the tasks not yet learned, and a lower
    learning rate after a divergence. Such changes, and other versions of packages, are kept under `continued`.

    grows: keys (dotted) of lists and mappings that may get more at their end: a stream whose next task has come.
    today: see `AsToday`; so a directory of an earlier version goes on with what it began with.

    Returns: sentences about what the run goes on with that it did not begin with.
    Raises:
        RunError: the folder holds something else, or another configuration (the differing keys are shown).
    """
    path = run.config_path
    if not path.is_file():
        found = run.root.iterdir() if run.root.is_dir() else ()
        strangers = sorted(p.name for p in found if not p.name.startswith(".") and p.name != "data")
        if strangers:
            raise RunError(
                f"{run.root} is not empty and holds no config.json of holdfast (found {', '.join(strangers[:5])}). "
                "Choose another --out."
            )
        write_json(path, {"format": CONFIG_FORMAT, "config": config, "methods": methods, "versions": versions()})
        return ()
    old = _claimed(run)
    recorded = {name: today(name, row) if name in methods else row for name, row in old["methods"].items()}
    changed = list(_changes(today(None, old["config"]), config, grows=grows))
    allowed: list[_Change] = []
    again: set[str] = set()  # methods whose half-learned task starts again
    for name in methods:
        for change in _changes(recorded[name], methods[name], f"methods.{name}") if name in recorded else ():
            mends = _mends(run, name, change)
            (changed if mends is None else allowed).append(change)
            if mends == "again":
                again.add(name)
    if changed:
        shown = [str(c) for c in changed[:20]] + ([f"... and {len(changed) - 20} more"] if len(changed) > 20 else [])
        raise RunError(
            f"{run.root} holds a run of another configuration:\n  "
            + "\n  ".join(shown)
            + "\nGo back to that configuration to resume it, or choose another --out. "
            f"What may change in it: {', '.join((*FREE_OPTIONS, *NEXT_TASK_OPTIONS))} of a method's training, and a "
            "lower learning_rate once training has diverged."
        )
    news = [str(change) for change in allowed]
    before, now = old.get("versions", {}), versions()
    news += [f"{name}: {before[name]} -> {now[name]}" for name in now if name in before and before[name] != now[name]]
    for name in again:
        _forget_half_learned(run, name)
    merged = {**old, "config": config, "methods": {**old["methods"], **methods}, "versions": now}
    if news:
        finished = {name: sum(1 for _ in run.method_dir(name).glob("*/record.json")) for name in run.methods()}
        merged["continued"] = [*old.get("continued", ()), {"with": news, "finished_tasks": finished}]
    if merged != old:
        write_json(path, merged)
    return tuple(f"continued with {text}" for text in news)


def unlike(
    run: RunDirectory,
    config: Mapping[str, Any],
    methods: Mapping[str, Mapping[str, Any]],
    *,
    grows: Collection[str] = (),
    today: AsToday = lambda method, recorded: recorded,
) -> list[str]:
    """How a finished run directory's config.json differs from a configuration of today; nothing is written.

    Arguments as those of `claim`. Raises: RunError: it is damaged.
    """
    old = _claimed(run)
    found = list(_changes(today(None, old["config"]), config, grows=grows))
    for name in methods.keys() & old["methods"].keys():
        found += _changes(today(name, old["methods"][name]), methods[name], f"methods.{name}")
    return [str(change) for change in found]


def _claimed(run: RunDirectory) -> dict[str, Any]:
    """config.json, with the groups that `claim` writes. Raises: RunError: damaged, or of something else."""
    found = read_json(run.config_path)
    if isinstance(found, dict) and found.get("format") == CONFIG_FORMAT:
        config, methods = found.get("config"), found.get("methods")
        if (
            isinstance(config, dict)
            and isinstance(methods, dict)
            and all(isinstance(m, dict) for m in methods.values())
        ):
            return found
    raise RunError(f"{run.config_path} was not written by this version of holdfast. Choose another --out.")


@dataclass(frozen=True)
class _Change:
    where: str
    old: Any
    new: Any
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


def _mends(run: RunDirectory, method: str, change: _Change) -> str | None:
    """Whether an old directory may go on with a change: "on", "again" (its half-learned task anew), or None."""
    *_, section, option = change.where.split(".")
    if section != "training":
        return None
    if option in FREE_OPTIONS:
        return "on"
    if option in NEXT_TASK_OPTIONS:
        return "again"
    lower = isinstance(change.old, int | float) and isinstance(change.new, int | float) and change.new < change.old
    if option == "learning_rate" and lower and any(run.method_dir(method).glob(f"*/{DIVERGED}")):
        return "again"
    return None


def _forget_half_learned(run: RunDirectory, method: str) -> None:
    """Remove what was learned of tasks that are not learned whole: it was made with other options."""
    for step in run.method_dir(method).iterdir() if run.method_dir(method).is_dir() else ():
        if step.is_dir() and not (step / "record.json").is_file():
            phases = step / "phases.json"
            if "train" in (read_json(phases) if phases.is_file() else {}):
                (step / DIVERGED).unlink(missing_ok=True)
            else:
                # All of it: a method may learn in parts of its own, and go on from those that it finds.
                shutil.rmtree(step)


def _changes(old: Any, new: Any, where: str = "", *, grows: Collection[str] = ()) -> Iterator[_Change]:
    if where in grows:
        new = _beginning(old, new)
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(k for k in new if k not in old)]:
            place = f"{where}.{key}" if where else str(key)
            if key not in new:
                yield _Change(place, old[key], None, f"{old[key]!r} -> absent")
            elif key not in old:
                if place in grows:
                    continue
                yield _Change(place, None, new[key], f"absent -> {new[key]!r}")
            else:
                yield from _changes(old[key], new[key], place, grows=grows)
    elif isinstance(old, list) and isinstance(new, list | tuple) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _changes(a, b, f"{where}[{i}]", grows=grows)
    elif old != new and not (isinstance(new, tuple) and old == list(new)):
        yield _Change(where, old, new, f"{old!r} -> {new!r}")


def _beginning(old: Any, new: Any) -> Any:
    """As much of `new` as `old` has, where no key is gone; lists are cut to the same length."""
    if isinstance(old, Mapping) and isinstance(new, Mapping) and set(old) <= set(new):
        return {key: new[key] for key in old}
    if isinstance(old, list) and isinstance(new, list | tuple):
        return list(new[: len(old)])
    return new
