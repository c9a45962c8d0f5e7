"""The loop over tasks: begin, train, end, evaluate, record; whatever is finished is never done again.

A step is done when its record.json exists, and only then. Inside a step each finished phase leaves a mark with the
checkpoint it gave, so a run that was killed goes on at the phase it was in. Methods and evaluators do the rest: a phase
that is called again must give the same result (see `TaskContext`).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.data.names import slug
from holdfast.errors import RunError, TrainingError
from holdfast.files import Lock, full_disk_errors, write_json
from holdfast.share import ALONE, Share
from holdfast.stream.memory import PeakMemory
from holdfast.stream.protocol import Checkpoint, Evaluator, Method, TaskContext, TimesAnswers, silent
from holdfast.stream.record import DIVERGED, AsToday, Record, RunDirectory, claim, read_json, versions

Progress = Callable[..., None]


@dataclass(frozen=True, kw_only=True)
class StreamRun:
    """One stream, one starting model, one seed, one directory; methods are run in it one by one.

    config: the resolved configuration that all methods share, as plain JSON data.
    methods: method name -> its resolved configuration, of the methods that this call runs.
    stream: handed to methods and evaluator untouched.
    grows: keys of `config` that may get more at their end in an old directory (see `claim`): its stream goes on.
    today: what an old directory recorded, in the options of today (see `claim`).
    share: this process's part, where several work on the run; the first of them holds the directory and writes.
    """

    directory: RunDirectory
    stream: Any
    task_names: Sequence[str]
    theta_0: Checkpoint
    seed: int
    config: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]
    progress: Progress = silent
    grows: Collection[str] = ()
    today: AsToday = lambda method, recorded: recorded
    share: Share = ALONE

    def __post_init__(self) -> None:
        folders = [slug(name) for name in self.task_names]
        if not folders:
            raise RunError("The stream has no task; a run needs at least one.")
        if len(set(folders)) < len(folders):
            raise RunError(f"Task names must differ as folder names; found {', '.join(folders)}.")

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the directory for this process and check that it belongs to this configuration.

        Raises: RunError: another process holds it, it belongs to another run, or not all processes see it.
        """

        def begin() -> None:
            _sweep(self.directory.root.glob(".*.tmp"))
            for text in claim(self.directory, self.config, self.methods, grows=self.grows, today=self.today):
                self.progress("continued", text=text)

        with self._lock(self.directory.root):
            self.share.by_chief(begin)
            if not self.directory.config_path.is_file():
                raise RunError(
                    f"Process {self.share.rank} of {self.share.world} does not see {self.directory.config_path}, which "
                    "the first process has just written. On several machines the run directory must be one folder "
                    "that all of them see at once."
                )
            yield

    @contextmanager
    def _lock(self, folder: Path) -> Iterator[None]:
        """Hold `folder` for this run: its first process does, and the others hear where it cannot."""
        with ExitStack() as stack:
            self.share.by_chief(lambda: stack.enter_context(_lock(folder)))
            yield

    def _read(self, folder: Path) -> Record | None:
        """The record of a finished step; every process reads before the first one writes another."""
        record = self.directory.read_record(folder)
        self.share.wait()
        return record

    def evaluate_theta_0(self, evaluator: Evaluator) -> Record:
        """Scores and safety of the starting model, made once per run directory.

        A stream that has grown since is asked again; the evaluator has the answers that were given.
        """
        folder = self.directory.theta_0_dir
        record = self._read(folder)
        if record is not None and record.tasks == tuple(self.task_names):
            return record
        with self._lock(folder), full_disk_errors(folder):
            started, peak = time.perf_counter(), PeakMemory()
            rows = evaluator(
                self.theta_0, stream=self.stream, step=None, out_dir=folder / "predictions", progress=self.progress
            )
            made = Record(
                method="",
                t=0,
                task="",
                tasks=tuple(self.task_names),
                seed=self.seed,
                checkpoint=self.theta_0,
                scores=rows["scores"],
                safety=rows["safety"],
                seconds={"evaluate": round(time.perf_counter() - started, 3)},
                peak_bytes={"evaluate": peak.bytes()},
                answering=_answering(evaluator),
                versions=versions(),
            )
            return self._write(folder, made, lambda: _sweep(folder.rglob(".*.tmp")))

    def _write(self, folder: Path, record: Record, then: Callable[[], None]) -> Record:
        """Write a step's record; what is written is what every process goes on with."""

        def write() -> None:
            self.directory.write_record(folder, record)
            then()

        self.share.by_chief(write)
        written = record if self.share.chief else self.directory.read_record(folder)
        if written is None:
            raise RunError(f"{folder}: process {self.share.rank} does not see the record that the first has written.")
        return written

    def run_method(self, method: Method, evaluator: Evaluator) -> list[Record]:
        """Every task of the stream with `method`; finished steps are read, not made.

        Raises:
            RunError: another process runs this method here, or its record has a gap.
            StorageError: the disk is full; the same call resumes once there is space.
        """
        folder = self.directory.method_dir(method.name)
        records: list[Record] = []
        with self._lock(folder), full_disk_errors(folder):
            self.share.by_chief(lambda: self._refuse_gaps(method.name))
            for step, task in enumerate(self.task_names):
                work_dir = self.directory.step_dir(method.name, step, task)
                record = self._read(work_dir)
                if record is None:
                    record = self._run_step(method, evaluator, step, work_dir, records)
                records.append(record)
                self.share.by_chief(lambda: self._retain(method.name, records))
                self.progress("step_done", method=method.name, step=step, task=task)
        return records

    def _run_step(
        self, method: Method, evaluator: Evaluator, step: int, work_dir: Path, records: Sequence[Record]
    ) -> Record:
        def progress(event: str, **values: Any) -> None:
            self.progress(event, method=method.name, step=step, task=self.task_names[step], **values)

        work_dir.mkdir(parents=True, exist_ok=True)
        ctx = TaskContext(
            stream=self.stream,
            step=step,
            task_names=tuple(self.task_names[: step + 1]),
            theta_0=self.theta_0,
            previous=records[-1].checkpoint if records else self.theta_0,
            work_dir=work_dir,
            previous_work_dir=(
                self.directory.step_dir(method.name, step - 1, self.task_names[step - 1]) if step else None
            ),
            seed=self.seed,
            progress=progress,
        )
        marks = _Marks(work_dir / "phases.json", self.directory, progress, self.share)
        marks.phase("begin", lambda: method.begin_task(ctx))
        try:
            trained = marks.checkpoint("train", lambda: method.train_task(ctx), together=True)
        except TrainingError as error:
            if self.share.chief:
                write_json(work_dir / DIVERGED, {"error": str(error)})  # with it, a lower learning rate may follow
            raise
        final = marks.checkpoint("end", lambda: method.end_task(ctx, trained))
        progress("phase", phase="evaluate")
        started, peak = time.perf_counter(), PeakMemory()
        rows = evaluator(final, stream=self.stream, step=step, out_dir=work_dir / "predictions", progress=progress)
        seconds = {**marks.seconds, "evaluate": round(time.perf_counter() - started, 3)}
        peaks = {**marks.peaks, "evaluate": peak.bytes()}
        record = Record(
            method=method.name,
            t=step + 1,
            task=self.task_names[step],
            tasks=ctx.task_names,
            seed=self.seed,
            checkpoint=final,
            scores=rows["scores"],
            safety=rows["safety"],
            seconds=seconds,
            peak_bytes=peaks,
            answering=_answering(evaluator),
            versions=versions(),
        )
        return self._write(work_dir, record, lambda: (work_dir / DIVERGED).unlink(missing_ok=True))

    def _refuse_gaps(self, method: str) -> None:
        done = [
            self.directory.read_record(self.directory.step_dir(method, step, task)) is not None
            for step, task in enumerate(self.task_names)
        ]
        if True in done and not all(done[: len(done) - done[::-1].index(True)]):
            missing = self.task_names[done.index(False)]
            raise RunError(
                f"{self.directory.method_dir(method)}: task {missing!r} has no record, but a later task has one. "
                "Delete the later task's folder to have it made again."
            )

    def _retain(self, method: str, records: Sequence[Record]) -> None:
        """Remove what no later step can need; safe to repeat, so a kill between record and removal loses nothing."""
        _sweep(self.directory.method_dir(method).rglob(".*.tmp"))
        needed = [Path(p).absolute() for record in records[-2:] for p in record.checkpoint.paths]
        for record in records:
            work_dir = self.directory.step_dir(method, record.t - 1, record.task).absolute()
            current = record.t == len(records)
            going = [work_dir / "scratch"] + ([] if current else [work_dir / "carry"])
            if record.t < len(records) - 1:
                going += [Path(p).absolute() for p in record.checkpoint.paths]
            for path in going:
                # A checkpoint may lie in an older step's folder (an expert that all later checkpoints use).
                inside = path.is_relative_to(self.directory.method_dir(method).absolute())
                used = any(n == path or n.is_relative_to(path) for n in needed)
                if inside and not used:
                    _remove(path)


class _Marks:
    """phases.json of one step: which phases are finished, the checkpoint each gave, the seconds and memory each took.

    Written by the first process; the others read what it says.
    """

    def __init__(self, path: Path, directory: RunDirectory, progress: Progress, share: Share) -> None:
        self._path, self._directory, self._progress, self._share = path, directory, progress, share
        self._done: dict[str, Any] = self._read()
        share.wait()

    def _read(self) -> dict[str, Any]:
        return read_json(self._path) if self._path.is_file() else {}

    @property
    def seconds(self) -> dict[str, float]:
        return {name: mark["seconds"] for name, mark in self._done.items()}

    @property
    def peaks(self) -> dict[str, dict[str, int]]:
        return {name: mark.get("peak_bytes", {}) for name, mark in self._done.items()}

    def phase(self, name: str, work: Callable[[], Any], *, together: bool = False) -> Any:
        """Do `work` where it is not done. together: in every process, instead of in the first one alone."""
        self._progress("phase", phase=name)
        if name in self._done:
            return None
        started, peak = time.perf_counter(), PeakMemory()
        result = work() if together else self._share.by_chief(work)
        cost = {"seconds": round(time.perf_counter() - started, 3), "peak_bytes": peak.bytes()}
        self._share.by_chief(lambda: self._mark(name, result, cost))
        self._done = self._done if self._share.chief else self._read()
        return result

    def _mark(self, name: str, result: Any, cost: Mapping[str, Any]) -> None:
        mark: dict[str, Any] = dict(cost)
        if isinstance(result, Checkpoint):
            mark["checkpoint"] = Checkpoint(
                base=self._directory.relative(result.base),
                adapters=tuple(self._directory.relative(a) for a in result.adapters),
            ).to_json()
        self._done[name] = mark
        write_json(self._path, self._done)

    def checkpoint(self, name: str, work: Callable[[], Checkpoint], *, together: bool = False) -> Checkpoint:
        self.phase(name, work, together=together)
        if "checkpoint" not in self._done[name]:
            raise RunError(f"Phase {name!r} returned no Checkpoint; a method's {name}_task must return one.")
        checkpoint = self._directory.resolve(Checkpoint.from_json(self._done[name]["checkpoint"]))
        root = self._directory.root.absolute()
        for path in checkpoint.paths:
            if Path(path).is_relative_to(root) and not Path(path).exists():
                raise RunError(
                    f"{self._path} says that phase {name!r} is finished, but its checkpoint {path} is gone. "
                    f"Delete {self._path.parent} to have this step made again."
                )
        return checkpoint


def _answering(evaluator: Evaluator) -> dict[str, float]:
    return dict(evaluator.answering) if isinstance(evaluator, TimesAnswers) else {}


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold `folder` until the block or the process ends; an operating-system lock, so a killed run leaves none."""
    busy = f"{folder} is in use by another holdfast process. Wait for it, or choose another --out."
    with Lock(folder / ".lock", busy=busy, error=RunError):
        yield


def _sweep(left: Iterable[Path]) -> None:
    """Remove the temporary files and folders that a killed write left; only for folders whose lock is held."""
    for path in list(left):  # all of them first: one may lie in another
        _delete(path)


def _remove(path: Path) -> None:
    # One rename first: a kill in the middle of the removal must not leave half a checkpoint under its own name.
    doomed = path.with_name(f".{path.name}.removed")
    _delete(doomed)  # what an earlier, killed removal left
    if path.exists():
        path.rename(doomed)
        _delete(doomed)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
