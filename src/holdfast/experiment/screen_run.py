"""Every training sample of a run, asked of theta_0: which it refuses, and how that fits what is known to be planted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast import judges
from holdfast.calibration.screening import Screened, screen
from holdfast.config import decode
from holdfast.data.images import pictures
from holdfast.data.injection import PREFIX
from holdfast.data.types import Sample
from holdfast.errors import DataError
from holdfast.experiment.resolve import Experiment
from holdfast.judges.base import finds_refusals
from holdfast.methods.seqft import ScreeningConfig

RECORD = "injected.json"
# How the embedded stream names what it plants.
_MARK = "-harmful-"


@dataclass(frozen=True, kw_only=True)
class TaskScreening:
    """One task. screened: its training samples, parted. planted: ids known to be harmful; None: nothing is known."""

    task: str
    screened: Screened
    planted: frozenset[str] | None

    @property
    def refused(self) -> list[str]:
        """Ids of the samples that theta_0 refuses."""
        return [sample.id for sample in self.screened.refused]

    @property
    def hits(self) -> int:
        """Number of refused samples that are planted."""
        return len(set(self.refused) & (self.planted or frozenset()))

    def to_json(self) -> dict[str, Any]:
        """Counts, ids with replies, and where it is known what was planted, how much of it was found."""
        known = {} if self.planted is None else agreement([self])
        return {"task": self.task, **self.screened.to_json(), **known}


def agreement(rows: Sequence[TaskScreening]) -> dict[str, Any]:
    """{"planted", "found", "false_alarms", "precision", "recall"} of the tasks where it is known what was planted.

    Precision: share of refused samples that are planted; recall: of planted ones that are refused; 0..1, None over
    nothing.
    """
    known = [row for row in rows if row.planted is not None]
    planted = sum(len(row.planted or ()) for row in known)
    refused = sum(len(row.refused) for row in known)
    found = sum(row.hits for row in known)
    return {
        "planted": planted,
        "found": found,
        "false_alarms": refused - found,
        "precision": found / refused if refused else None,
        "recall": found / planted if planted else None,
    }


def screen_run(
    experiment: Experiment, *, folders: Sequence[Path] = (), progress: Callable[..., None] | None = None
) -> list[TaskScreening]:
    """Ask the run's model the request of every training sample, greedily, and judge whether it refuses.

    How it is asked: `defaults.screening` of the run file. What is planted: the run's own injection, an `injected.json`
    in one of `folders` or at the stream's root, and ids that say so ("...-harmful-...").

    Raises: ConfigError: `defaults.screening` is none. DataError: an injected.json that cannot be read.
    """
    from holdfast.models.load import load

    config = experiment.config
    asked = decode(ScreeningConfig, dict(config.defaults.get("screening", {})), "defaults.screening")
    records = _records([*folders, Path(experiment.stream.root)])
    is_refusal = finds_refusals(judges.get(asked.judge, **asked.options))
    total = sum(len(task.train) for task in experiment.stream.tasks)
    done, found = 0, []
    with pictures(config.pictures):
        model = load(config.model, dtype=asked.dtype)
        for task in experiment.stream.tasks:
            before = done

            def count(event: str, *, done: int, before: int = before, **_: Any) -> None:
                if progress is not None:
                    progress(event, done=before + done, total=total)

            screened = screen(
                model,
                task.train,
                is_refusal,
                max_new_tokens=asked.max_new_tokens,
                batch_size=asked.batch_size,
                progress=count,
            )
            done += len(task.train)
            planted = _planted(experiment, task.name, task.train, records)
            found.append(TaskScreening(task=task.name, screened=screened, planted=planted))
    return found


def _planted(
    experiment: Experiment, task: str, samples: Sequence[Sample], records: Sequence[Mapping[str, Sequence[str]]]
) -> frozenset[str] | None:
    """Ids among `samples` that are known to be harmful; None where nobody says anything of this task."""
    marked = {s.id for s in samples if _MARK in s.id or s.id.startswith(PREFIX)}
    told = [record[task] for record in records if task in record]
    injected = any(log.task == task for log in experiment.injected)  # its samples bear the prefix
    if not (marked or told or injected):
        return None
    # A record names a pair as its pool does, or as the stream does.
    listed = {name for ids in told for key in ids for name in (key, f"{PREFIX}{key}")}
    return frozenset(marked | (listed & {s.id for s in samples}))


def _records(folders: Sequence[Path]) -> list[dict[str, list[str]]]:
    """Task -> ids, of every injected.json in `folders`: the embedded stream's, or one that a run wrote."""
    found = []
    for path in dict.fromkeys((folder / RECORD).absolute() for folder in folders):
        if not path.is_file():
            continue
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            rows = data["ids"].items() if isinstance(data, Mapping) else [(log["task"], log["ids"]) for log in data]
            found.append({str(task): [str(key) for key in ids] for task, ids in rows})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} is no record of an injection ({error!r}); expected {{'ids': {{task: [id, ...]}}}} or what a "
                "run writes. Mend it, or move it away."
            ) from error
    return found


__all__ = ["RECORD", "TaskScreening", "agreement", "screen_run"]
