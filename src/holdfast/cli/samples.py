"""Sample files as command-line arguments."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from holdfast.data.items import CHOICE_KEYS, is_spoken
from holdfast.data.sample_files import read_samples
from holdfast.data.streams import load_stream
from holdfast.data.types import Sample
from holdfast.errors import DataError
from holdfast.files import atomic_path


def read_calibration_sets(
    safety: Path, task: Path, *, safety_images: Path | None = None, task_images: Path | None = None
) -> tuple[list[Sample], list[Sample]]:
    """Safety and task samples of a calibration. Raises DataError: as `read_samples`, or both are the same samples."""
    sets = read_samples(safety, images=safety_images), read_samples(task, images=task_images)
    contents = [[(s.turns, s.references, [path.resolve() for path in s.images]) for s in samples] for samples in sets]
    if contents[0] == contents[1]:
        raise DataError(
            f"--safety {safety} and --task {task} are the same {len(sets[0])} samples; the edit weighs one against the "
            "other. Pass as --safety the aligned model's own safe answers (`holdfast calibrate-data`), as --task what "
            "was tuned on."
        )
    return sets


def read_test_sets(paths: list[Path]) -> list[tuple[str, list[Sample]]]:
    """(name, samples) of each file; a stream file stands for its test splits and both sides of its safety sets."""
    sets: list[tuple[str, list[Sample]]] = []
    for path in paths:
        if path.suffix in (".yaml", ".yml"):
            stream = load_stream(path)
            sets += [(task.name, list(task.test)) for task in stream.tasks]
            sets += [(s.name, [*s.unsafe, *s.benign]) for s in stream.safety]
        else:
            sets.append((str(path), read_samples(path)))
    return sets


def write_samples(path: Path, samples: Iterable[Sample], *, image_root: Path) -> None:
    """JSON lines that `read_samples(path, images=image_root)` reads back, written whole or not at all.

    image_root: what image paths are relative to; `path.parent` is where readers look by themselves.
    """
    lines = [json.dumps(_record(sample, image_root), ensure_ascii=False, sort_keys=True) for sample in samples]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _record(sample: Sample, image_root: Path) -> dict[str, Any]:
    # What a sample says is in its turns; a reader would take these for words that it has to show.
    about = {key: value for key, value in sample.meta.items() if not is_spoken(key) and key not in CHOICE_KEYS}
    record: dict[str, Any] = {**about, "id": sample.id}
    if all(turn.loss for turn in sample.turns) and [turn.role for turn in sample.turns] == ["user", "assistant"]:
        record |= {"prompt": sample.turns[0].text, "answer": sample.turns[1].text}
    else:
        speaker = {"user": "human", "assistant": "gpt", "system": "system"}
        record["conversations"] = [
            {"from": speaker[t.role], "value": t.text} | ({} if t.loss else {"loss": False}) for t in sample.turns
        ]
    if sample.images:
        record["images"] = [os.path.relpath(image, image_root) for image in sample.images]
    return record


__all__ = ["read_calibration_sets", "read_samples", "read_test_sets", "write_samples"]
