"""Answers of a model to a list of samples, appended batch by batch, so that a kill loses at most one batch.

Several processes may share the work: each appends to a file of its own, and whatever files there are count when the
work is resumed, by however many processes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from holdfast.data.types import Sample
from holdfast.errors import RunError
from holdfast.files import append, parse_json, storage_errors
from holdfast.share import ALONE, Share

__all__ = ["ALONE", "Answer", "Share", "collect"]

# (samples of one batch) -> their answers
Answer = Callable[[list[Sample]], list[str]]


def collect(
    samples: Sequence[Sample],
    answer: Answer,
    *,
    path: Path,
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
    share: Share = ALONE,
) -> list[str]:
    """One answer per sample, in order. `path` holds finished batches; called again, only missing batches are asked.

    Batches are the same whether or not the work was interrupted, and however many processes share it, so the answers
    are too. on_batch: called with the number of samples of each batch, also of those found in files. A process that is
    not the chief gets the empty text for answers that it did not see.

    Raises: StorageError: a batch cannot be kept; those before it are.
    """
    order = sorted(range(len(samples)), key=lambda i: (-_size(samples[i]), i))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    own = _file_of(path, share.rank)
    _cut_torn_end(own)
    done = _read_all(path)
    # Everyone has read before anyone writes: what is missing is the same list for all.
    share.wait()
    for number, batch in enumerate(batches):
        if number in done and on_batch is not None:
            on_batch(len(batch))
    missing = [number for number in range(len(batches)) if number not in done]
    # Where the base's weights are shared out, everybody answers everything: no process can run a pass by itself.
    for number in missing if share.sharded else missing[share.rank :: share.world]:
        batch = batches[number]
        done[number] = answer([samples[i] for i in batch])
        if share.sharded and not share.chief:
            continue
        # One line per batch and one write per line: a torn line is a batch that was not finished.
        line = json.dumps({"batch": number, "texts": done[number]}, ensure_ascii=False)
        append(own, line.encode("utf-8", "replace") + b"\n")
        if on_batch is not None:
            on_batch(len(batch))
    share.wait()
    if share.world > 1 and share.chief:
        done = _read_all(path)
    answers = [""] * len(samples)
    for number, batch in enumerate(batches):
        if number in done:
            for index, text in zip(batch, done[number], strict=True):
                answers[index] = text
    return answers


def _file_of(path: Path, rank: int) -> Path:
    return path if rank == 0 else path.with_suffix(f".rank{rank}{path.suffix}")


def _cut_torn_end(path: Path) -> None:
    if path.is_file():
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(path, whole)


def _read_all(path: Path) -> dict[int, list[str]]:
    """Batch number -> answers, from whole lines of every process's file."""
    done: dict[int, list[str]] = {}
    for file in [path, *sorted(path.parent.glob(f"{path.stem}.rank*{path.suffix}"))]:
        if file.is_file():
            data = file.read_bytes()
            for line in data[: data.rfind(b"\n") + 1].splitlines():
                row = parse_json(line, file, error=RunError)
                done[row["batch"]] = row["texts"]
    return done


def _size(sample: Sample) -> int:
    # Like lengths share a batch, longest first: little padding, and what does not fit in memory fails at once.
    return sum(len(turn.text) for turn in sample.request) + 1000 * len(sample.images)
