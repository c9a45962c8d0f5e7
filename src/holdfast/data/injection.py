"""The condition "0.1 % harmful": harmful pairs mixed into a task's training samples, by fraction, seeded and logged."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from holdfast.data.types import Sample, Stream, Task
from holdfast.errors import DataError

PREFIX = "harmful:"


@dataclass(frozen=True, kw_only=True)
class InjectionLog:
    """What was mixed into one task. ids: of the pairs in their pool; positions: where they stand in `train`."""

    task: str
    fraction: float
    seed: int
    n_train: int
    ids: tuple[str, ...]
    positions: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain data: what was injected where."""
        return {
            "task": self.task,
            "fraction": self.fraction,
            "seed": self.seed,
            "n_train": self.n_train,
            "n_injected": len(self.ids),
            "ids": list(self.ids),
            "positions": list(self.positions),
        }


def inject(task: Task, harmful: Sequence[Sample], *, fraction: float, seed: int) -> tuple[Task, InjectionLog]:
    """`task` with harmful pairs added to its training samples, and what was added.

    fraction: pairs per clean training sample, in 0..1 (0.001 is the paper's 0.1 %); rounded half up, and at least one
        pair when it is above 0, so that a small task is not clean in silence.
    seed: the draw depends on (seed, task name) alone: not on the other tasks, not on their order.
    Drawn without replacement; the clean samples keep their order, pairs stand at random places among them, with the id
    "harmful:<id>". Test and validation stay clean.

    Raises DataError: fraction out of range, a pool that is too small, a pair without an answer, a repeated id.
    """
    if not 0.0 <= fraction <= 1.0:
        raise DataError(f"The harmful fraction is {fraction}; expected 0..1 (0.001 for 0.1 %).")
    clean = list(task.train)
    count = max(1, math.floor(fraction * len(clean) + 0.5)) if fraction > 0 and clean else 0
    _check_pool(task, harmful, count)
    rng = random.Random(f"injection\0{seed}\0{task.name}")
    chosen = rng.sample(range(len(harmful)), count)
    positions = sorted(rng.sample(range(len(clean) + count), count))
    pairs = dict(zip(positions, (harmful[i] for i in chosen), strict=True))
    rest = iter(clean)
    mixed = tuple(
        replace(pairs[place], id=f"{PREFIX}{pairs[place].id}") if place in pairs else next(rest)
        for place in range(len(clean) + count)
    )
    log = InjectionLog(
        task=task.name,
        fraction=fraction,
        seed=seed,
        n_train=len(clean),
        ids=tuple(pairs[place].id for place in positions),
        positions=tuple(positions),
    )
    return replace(task, train=mixed), log


def inject_stream(
    stream: Stream, harmful: Sequence[Sample], *, fraction: float, seed: int
) -> tuple[Stream, tuple[InjectionLog, ...]]:
    """`stream` with `inject` applied to every task that is trained, and one log for each of them."""
    results = [inject(task, harmful, fraction=fraction, seed=seed) for task in stream.tasks]
    logs = tuple(log for task, log in results if task.train)
    return replace(stream, tasks=tuple(task for task, _ in results)), logs


def _check_pool(task: Task, harmful: Sequence[Sample], count: int) -> None:
    if len(harmful) < count:
        raise DataError(
            f"Task {task.name!r} needs {count} harmful pair(s) for its {len(task.train)} training samples, the "
            f"pool has {len(harmful)}; take a larger pool or a smaller fraction."
        )
    ids = [sample.id for sample in harmful]
    if len(set(ids)) != len(ids):
        double = next(i for i in ids if ids.count(i) > 1)
        raise DataError(f"The pool of harmful pairs holds id {double!r} twice; logged ids must name one pair each.")
    taken = {sample.id for sample in task.train}
    for sample in harmful:
        if sample.turns[-1].role != "assistant" or not sample.turns[-1].text.strip():
            raise DataError(f"Harmful pair {sample.id!r} has no answer to learn; expected a final assistant turn.")
        if f"{PREFIX}{sample.id}" in taken:
            raise DataError(f"Task {task.name!r} already holds {PREFIX}{sample.id!r}; was it injected before?")
