"""Datasets of the Hugging Face Hub as tasks, without a stream file: `holdfast run --stream owner/name`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from holdfast.data.streams import StreamSpec, TaskSpec, read_spec
from holdfast.errors import ConfigError

_HUB = re.compile(r"(?P<dataset>[\w.-]+/(?P<name>[\w.-]+))(?::(?P<train>[\w.-]+)/(?P<test>[\w.-]+))?")


def task_from_hub(text: str) -> TaskSpec:
    """A task of `owner/name`, or of `owner/name:train_split/test_split`; the splits are train and test otherwise.

    Columns are guessed from their usual names (`data.hub`); answers are scored by exact match. A stream file says more.

    Raises: ConfigError: it is no dataset's name.
    """
    found = _HUB.fullmatch(text)
    if found is None:
        raise ConfigError(
            f"--stream {text!r} is neither a stream file (.yaml) nor a dataset; expected owner/name, or "
            "owner/name:train_split/test_split."
        )
    return TaskSpec(
        name=found["name"],
        format="hf",
        train=(found["train"] or "train",),
        test=(found["test"] or "test",),
        options={"dataset": found["dataset"]},
    )


def replace_stream(spec: StreamSpec, given: Sequence[str]) -> StreamSpec:
    """`spec` with other tasks: a stream file takes its place, datasets become its tasks; its safety sets stay.

    Raises: ConfigError: no dataset's name, a stream file beside something else, a task's name twice.
    """
    files = [text for text in given if Path(text).suffix in (".yaml", ".yml")]
    if files and len(given) > 1:
        raise ConfigError(f"--stream {files[0]} is a whole stream; pass it alone, or datasets of the hub alone.")
    if files:
        return read_spec(Path(files[0]))
    return replace(spec, tasks=tuple(task_from_hub(text) for text in given))
