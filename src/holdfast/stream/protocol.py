"""What the runner knows: a context, a checkpoint as a value, a method, an evaluator. No torch, no method's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from holdfast.checkpoints.value import Checkpoint

__all__ = [
    "Checkpoint",
    "ChecksStream",
    "Evaluator",
    "HasStrength",
    "LearnsTogether",
    "Method",
    "TaskContext",
    "TimesAnswers",
    "silent",
]


def silent(event: str, **values: Any) -> None:
    """A progress callback that shows nothing."""
    del event, values


@dataclass(frozen=True, kw_only=True)
class TaskContext:
    """All that a method may look at while task `step` is learned.

    A method keeps nothing between tasks outside `work_dir` (this step's own folder) and `previous_work_dir` (the last
    step's), so resuming is right by construction. `stream` is opaque to the runner: the object that the caller passed
    in (a `holdfast.data.types.Stream`); `stream.tasks[step]` is the task at hand.

    What a phase leaves in `work_dir` when it is killed is there when the phase is called again; a phase must give the
    same result then. What may go, and when, is told by where it lies (`holdfast.stream.runner` removes it):

    - `scratch_dir`: unedited weights, a trainer's state. Removed once this step's record is written.
    - `carry_dir`: what the next step needs (a Fisher matrix, a replay buffer). Removed once the next step's record is.
    - a folder that the step's checkpoint names: kept while it is, or is part of, the current or previous checkpoint.
    - any other file in `work_dir` (figures of an edit, a calibration): small, kept for good.
    """

    stream: Any
    step: int
    task_names: tuple[str, ...]  # tasks 0..step
    theta_0: Checkpoint
    previous: Checkpoint  # the checkpoint this task starts from: end_task's result of the step before, or theta_0
    work_dir: Path
    previous_work_dir: Path | None
    seed: int
    # Called with an event name ("train", "calibrate", ...), done= and total=; drives progress bars, never results.
    progress: Callable[..., None] = field(default=silent)

    @property
    def task_name(self) -> str:
        """Name of the task at hand."""
        return self.task_names[-1]

    @property
    def scratch_dir(self) -> Path:
        """This step's folder for what goes once its record is written; not made yet."""
        return self.work_dir / "scratch"

    @property
    def carry_dir(self) -> Path:
        """This step's folder for what the next step needs; not made yet."""
        return self.work_dir / "carry"

    @property
    def previous_carry_dir(self) -> Path | None:
        """The last step's `carry_dir`, or None at the first task."""
        return None if self.previous_work_dir is None else self.previous_work_dir / "carry"


@runtime_checkable
class Method(Protocol):
    """All that the runner knows of a method."""

    name: str

    def begin_task(self, ctx: TaskContext) -> None:
        """Prepare what training needs; called again after a kill, it must give the same result."""
        ...

    def train_task(self, ctx: TaskContext) -> Checkpoint:
        """The checkpoint after training on the task at hand, starting from `ctx.previous`."""
        ...

    def end_task(self, ctx: TaskContext, trained: Checkpoint) -> Checkpoint:
        """The checkpoint that the next task starts from and that is evaluated: `trained`, edited or as it is."""
        ...


@runtime_checkable
class ChecksStream(Protocol):
    """A method that cannot run on every stream, and says so before anything is computed."""

    def check_stream(self, stream: Any) -> None:
        """Raises the error that its first step would end in."""


@runtime_checkable
class LearnsTogether(Protocol):
    """A method whose `train_task` several processes may call at once for one task, each with a part of its samples.

    `begin_task` and `end_task` are called by the first process alone, which also writes every file.
    """

    @property
    def together(self) -> frozenset[str]:
        """How they may work: "copies", each with a base of its own; "shards", with a base that is shared out."""
        ...


@runtime_checkable
class HasStrength(Protocol):
    """A method whose edit after a task has a strength: the larger, the closer to the model before the task."""

    @property
    def strength(self) -> float:
        """The one that its options say, above 0 or 0 for no edit."""
        ...

    def end_task_at(self, ctx: TaskContext, trained: Checkpoint, *, strength: float, out: Path) -> Checkpoint:
        """As `end_task`, at another strength; the checkpoint is the folder `out` alone, whole or not there at all."""
        ...


class Evaluator(Protocol):
    """Asks a checkpoint every task so far and every safety set; returns the rows of a record (schema: stream.record).

    It writes per-sample answers below `out_dir` as it goes and, called again after a crash, repeats none of them.
    `step` is None for theta_0, which is asked every task of the stream.
    """

    def __call__(
        self, checkpoint: Checkpoint, *, stream: Any, step: int | None, out_dir: Path, progress: Callable[..., None]
    ) -> dict[str, Any]: ...


@runtime_checkable
class TimesAnswers(Protocol):
    """An evaluator that says what answering took: {"requests", "seconds"} of its last call, for the record."""

    answering: dict[str, float]
