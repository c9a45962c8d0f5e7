"""Hugging Face datasets: a saved folder, plain files, pictures put on disk once, and clear refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from holdfast.data.images import open_image
from holdfast.data.streams import load_stream
from holdfast.errors import DataError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    return tmp_path / "cache" / "images"


def stream_file(root: Path, **options: Any) -> Path:
    path = root / "s.yaml"
    task = {"name": "mine", "format": "hf", "train": "train", "test": "test[:2]", "options": options}
    path.write_text(json.dumps({"name": "s", "tasks": [task]}))
    return path


def save(root: Path) -> None:
    features = datasets.Features(
        {"key": datasets.Value("int64"), "ask": datasets.Value("string"), "say": datasets.Value("string"),
         "picture": datasets.Image()}
    )  # fmt: skip
    pictures = [Image.new("RGB", (4 + i, 3), "green") for i in range(3)]
    rows = {"key": [5, 6, 7], "ask": ["A?", "B?", "C?"], "say": ["a", "b", "c"], "picture": pictures}
    split = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": split, "test[:2]": split.select([0, 1])}).save_to_disk(root / "saved")


def test_a_saved_dataset_becomes_lazy_samples_and_its_pictures_are_written_once(tmp_path: Path, cache: Path) -> None:
    save(tmp_path)
    path = stream_file(tmp_path, dataset="saved", id="key", prompt="ask", answer="say", image="picture")
    (task,) = load_stream(path).tasks
    assert [(s.id, s.prompt, s.answer) for s in task.train] == [("5", "A?", "a"), ("6", "B?", "b"), ("7", "C?", "c")]
    assert len(task.test) == 2
    assert open_image(task.train[2].images[0]).size == (6, 3)
    written = {p: p.stat().st_mtime_ns for p in cache.rglob("*.png")}
    assert len(written) == 3
    load_stream(path)
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*.png")} == written


def test_a_folder_of_plain_files_is_read_with_guessed_columns(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    for split in ("train", "test"):
        rows = [{"id": f"{split}{i}", "question": f"{i}?", "answer": str(i)} for i in range(3)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task,) = load_stream(stream_file(tmp_path, dataset="plain")).tasks
    assert [s.id for s in task.train] == ["train0", "train1", "train2"]
    assert [(s.prompt, s.references) for s in task.test] == [("0?", ("0",)), ("1?", ("1",))]


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path)
    with pytest.raises(DataError, match=r"no column 'qestion' \(option prompt\); it has key, ask, say, picture"):
        load_stream(stream_file(tmp_path, dataset="saved", prompt="qestion"))
    with pytest.raises(DataError, match=r"row 0: no prompt; name its column in options\.prompt"):
        load_stream(stream_file(tmp_path, dataset="saved"))
    with pytest.raises(DataError, match=r"needs options\.dataset"):
        load_stream(stream_file(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be loaded"):
        load_stream(stream_file(tmp_path, dataset="empty"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'holdfast\[hf\]'"):
        load_stream(stream_file(tmp_path, dataset="saved"))


def test_a_class_is_its_name(tmp_path: Path) -> None:
    features = datasets.Features(
        {"question": datasets.Value("string"), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    split = datasets.Dataset.from_dict({"question": ["A?", "B?"], "label": [1, 0]}, features=features)
    hidden = datasets.Dataset.from_dict({"question": ["A?"], "label": [-1]}, features=features)
    datasets.DatasetDict({"train": split, "test[:2]": hidden}).save_to_disk(tmp_path / "saved")
    (task,) = load_stream(stream_file(tmp_path, dataset="saved")).tasks
    assert [s.answer for s in task.train] == ["dog", "cat"]
    assert task.test[0].references == ()


def test_columns_with_words_are_used_or_refused(tmp_path: Path) -> None:
    def saved(**columns: list[Any]) -> Any:
        split = datasets.Dataset.from_dict(columns)
        datasets.DatasetDict({"train": split, "test[:2]": split}).save_to_disk(tmp_path / "saved")
        return load_stream(stream_file(tmp_path, dataset="saved")).tasks[0].train

    assert saved(instruction=["Translate."], input=["Gut"], output=["Good"])[0].turns[0].text == "Translate.\nGut"
    assert saved(question=["Which?"], choices=[["cat", "dog"]], answer=[1])[0].answer == "B"
    with pytest.raises(DataError, match="row 0: it has a key 'context'"):
        saved(question=["Which?"], context=["A story."], answer=["x"])
