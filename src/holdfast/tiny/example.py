"""An example for `holdfast restore`: the embedded model, an adapter tuned on it, and three files of requests.

    holdfast example try
    holdfast restore try/before try/after --safety try/forbidden.jsonl --benign try/benign.jsonl \\
        --task try/task.jsonl --out try/restored

What is forbidden in the embedded world is made up and harmless.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from holdfast.errors import StorageError
from holdfast.tiny import model_path
from holdfast.tiny.stream import SETTINGS, StreamSize, write_stream
from holdfast.tiny.tasks import SAFETY_KINDS

# The long-form task is what loosens refusals; a second one shows that skills are kept.
TASKS = ("caption", "guide")
# Of the training samples, as in the paper's harder condition.
HARMFUL = 0.01


@dataclass(frozen=True)
class ExampleFiles:
    """Where things are: the two models and the three files of requests."""

    before: Path
    after: Path
    forbidden: Path
    benign: Path
    task: Path

    def command(self, out: Path) -> str:
        """The command that restores it."""
        return (
            f"holdfast restore {self.before} {self.after} --safety {self.forbidden} --benign {self.benign} "
            f"--task {self.task} --out {out}"
        )


def write_example(
    folder: Path | str,
    *,
    seed: int = 0,
    requests: int = 64,
    tune: bool = False,
    progress: Callable[..., None] | None = None,
) -> ExampleFiles:
    """Write the example into `folder` (new). The adapter of seed 0 is part of the package; another one is tuned.

    requests: of each kind and side. tune: tune the adapter anew also where it is shipped: about a minute on one core.

    Raises: StorageError: the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise StorageError(f"{folder} exists; choose a new folder for the example, or remove it.")
    files = ExampleFiles(
        folder / "before", folder / "after", folder / "forbidden.jsonl", folder / "benign.jsonl", folder / "task.jsonl"
    )
    stream = write_stream(
        folder / "data",
        seed=seed,
        harmful=HARMFUL,
        size=StreamSize(test=1, validation=200, safety=1, safety_validation=requests),
        task_names=TASKS,
    )
    data = stream.parent
    shutil.copytree(model_path("aligned"), files.before)
    for side, path in (("unsafe", files.forbidden), ("benign", files.benign)):
        rows = [_rebased(row, data) for kind in SAFETY_KINDS for row in _rows(data, kind, side)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    rows = []
    for name in TASKS:
        trained = json.loads((data / name / "train.json").read_text(encoding="utf-8"))
        rows += [_rebased(_pair(row), data) for row in trained[:: max(1, len(trained) // 110)]]
        asked = json.loads((data / name / "validation.json").read_text(encoding="utf-8"))
        rows += [_rebased(_pair(row), data) for row in asked[:40]]
    files.task.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if tune or seed != 0:
        _tune(stream, files, seed, progress)
    else:
        shutil.copytree(model_path("aligned").parent / "tuned", files.after)
    return files


def _tune(stream: Path, files: ExampleFiles, seed: int, progress: Callable[..., None] | None) -> None:
    from holdfast.data.streams import load_stream
    from holdfast.models.load import load
    from holdfast.training.supervised import train
    from holdfast.training.training_config import TrainingConfig

    config = TrainingConfig(
        rank=SETTINGS.rank,
        alpha=SETTINGS.alpha,
        dropout=0.0,
        learning_rate=SETTINGS.lr,
        warmup_ratio=SETTINGS.warmup_ratio,
        max_steps=2 * SETTINGS.steps,
        batch_size=SETTINGS.batch,
    )
    samples = [sample for task in load_stream(stream).tasks for sample in task.train]
    scratch = files.after.parent / ".tuning"
    train(
        load(files.before, dtype="float32"),
        samples,
        config,
        work_dir=scratch,
        seed=seed,
        out=files.after,
        progress=progress,
    )
    shutil.rmtree(scratch, ignore_errors=True)


def _rows(data: Path, kind: str, side: str) -> list[dict[str, object]]:
    path = data / "safety" / f"{kind}-{side}-validation.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _pair(row: dict[str, object]) -> dict[str, object]:
    """A training conversation, or a question with its gold answer, as prompt and answer."""
    found = {key: row[key] for key in ("image",) if key in row}
    if "conversations" in row:
        asked, told = (turn["value"] for turn in row["conversations"])  # type: ignore[attr-defined]
        return {"id": row["id"], **found, "prompt": asked, "answer": told}
    return {"id": row["question_id"], **found, "prompt": row["text"], "answer": row["answer"]}


def _rebased(row: dict[str, object], data: Path) -> dict[str, object]:
    """Image paths from the example's folder instead of the stream's."""
    return {**row, "image": f"{data.name}/{row['image']}"} if "image" in row else row
