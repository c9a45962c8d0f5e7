"""Datasets of the hub as tasks: names and splits, and what is refused. Reading them is `test_hub`'s."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.data.hub_stream import replace_stream, task_from_hub
from holdfast.data.streams import SafetySpec, StreamSpec, TaskSpec
from holdfast.errors import ConfigError

SPEC = StreamSpec(
    name="own",
    tasks=(TaskSpec(name="old", test=("test.json",)),),
    safety=(SafetySpec(name="red team", format="qa", options={}),),
)


@pytest.mark.parametrize(
    "text, name, train, test",
    [
        ("me/charts", "charts", "train", "test"),
        ("me-too/a_b.c:train_sft/validation", "a_b.c", "train_sft", "validation"),
    ],
)
def test_a_dataset_is_a_task(text: str, name: str, train: str, test: str) -> None:
    task = task_from_hub(text)
    assert (task.name, task.format, task.train, task.test) == (name, "hf", (train,), (test,))
    assert task.options["dataset"] == text.partition(":")[0]


@pytest.mark.parametrize("text", ["charts", "", "a/b/c", "me/charts:train", "https://hub/me/charts", "me/ch arts"])
def test_what_is_no_dataset_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected owner/name"):
        replace_stream(SPEC, [text])


def test_tasks_are_replaced_and_safety_stays(tmp_path: Path) -> None:
    found = replace_stream(SPEC, ["me/one", "me/two:a/b"])
    assert [task.name for task in found.tasks] == ["one", "two"] and found.safety == SPEC.safety
    with pytest.raises(ConfigError, match="one"):
        replace_stream(SPEC, ["me/one", "you/one"])
    path = tmp_path / "other.yaml"
    path.write_text("name: other\ntasks: [{name: t, test: t.json}]\n", encoding="utf-8")
    assert replace_stream(SPEC, [str(path)]).name == "other"
    with pytest.raises(ConfigError, match="pass it alone"):
        replace_stream(SPEC, [str(path), "me/one"])
