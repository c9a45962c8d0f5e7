"""A stream file becomes a Stream; what is wrong in it is named with its place and a remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from holdfast.data.streams import load_stream, read_spec, stream_spec
from holdfast.errors import ConfigError, DataError, UnknownNameError

TRAIN = [
    {
        "id": 7,
        "image": "img/a.png",
        "conversations": [{"from": "human", "value": "What is it? <image>"}, {"from": "gpt", "value": "A dot"}],
    },
    {"id": "7", "conversations": [{"from": "human", "value": "Two plus two?"}, {"from": "gpt", "value": "4"}]},
]
TEST = [{"question_id": 1, "image": "img/a.png", "text": "What is it?", "answer": "A dot", "kind": "shape"}]


def write_stream(root: Path, *, train: Any = TRAIN, test: Any = TEST, **task: Any) -> Path:
    (root / "data" / "img").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(root / "data" / "img" / "a.png")
    (root / "data" / "train.json").write_text(json.dumps(train))
    (root / "data" / "test.json").write_text(json.dumps(test))
    spec = {
        "name": "mini",
        "root": "data",
        "tasks": [{"name": "dots", "train": "train.json", "test": ["val.json", "test.json"], **task}],
    }
    path = root / "mini.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def test_a_stream_file_becomes_samples_with_images_left_on_disk(tmp_path: Path) -> None:
    stream = load_stream(write_stream(tmp_path, scorer_mode="paper", max_new_tokens=16))
    (task,) = stream.tasks
    assert [s.id for s in task.train] == ["7", "7#2"]
    assert task.train[0].turns[0].text == "<image>\nWhat is it?"
    assert task.train[0].images == (tmp_path / "data/img/a.png",)
    assert task.train[1].images == () and task.train[1].answer == "4"
    assert task.test[0].references == ("A dot",) and task.test[0].meta == {"kind": "shape"}
    assert task.test[0].request == task.test[0].turns[:1]
    assert (task.scorer, task.scorer_mode, task.max_new_tokens) == ("exact_match", "paper", 16)


def test_the_first_alias_that_exists_is_read_and_a_missing_file_says_how_to_obtain_it(tmp_path: Path) -> None:
    path = write_stream(tmp_path, obtain="Fetch dots/DOTS from the hub.")
    (tmp_path / "data" / "test.json").rename(tmp_path / "data" / "tset.json")
    with pytest.raises(DataError, match=r"val\.json does not exist \(nor under .* test\.json\).*Fetch dots/DOTS"):
        load_stream(path)


def test_a_run_file_embeds_a_stream_by_mapping_or_by_path(tmp_path: Path) -> None:
    path = write_stream(tmp_path)
    by_path = stream_spec("mini.yaml", base=tmp_path)
    by_mapping = stream_spec(yaml.safe_load(path.read_text()), base=tmp_path)
    assert by_path == by_mapping == read_spec(path)
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump({"stream": "mini.yaml", "model": "m", "seed": 1}))
    assert read_spec(run) == by_path


def test_limits_take_the_front_and_a_split_limit_wins(tmp_path: Path) -> None:
    many = [{"question_id": i, "text": "q", "answer": "a"} for i in range(9)]
    (task,) = load_stream(write_stream(tmp_path, test=many, limit=1, test_limit=4)).tasks
    assert [s.id for s in task.test] == ["0", "1", "2", "3"] and len(task.train) == 1


def test_root_takes_environment_variables_and_an_unset_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_stream(tmp_path)
    spec = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**spec, "root": "${HOLDFAST_TEST_ROOT}/data"}))
    monkeypatch.setenv("HOLDFAST_TEST_ROOT", str(tmp_path))
    assert load_stream(path).root == tmp_path / "data"
    monkeypatch.delenv("HOLDFAST_TEST_ROOT")
    with pytest.raises(ConfigError, match=r"HOLDFAST_TEST_ROOT.*not set"):
        load_stream(path)
    assert load_stream(path, root=tmp_path / "data").root == tmp_path / "data"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"test": []}, DataError, "test split .*is empty"),
        ({"test": TEST * 2}, DataError, r"1 duplicate id\(s\): '1' \(2 times\)"),
        ({"test": [{"question_id": 1, "text": "q", "image": "../../etc/x.png"}]}, DataError, "leaves the data root"),
        ({"test": [{"question_id": 1, "text": "q", "image": "/etc/x.png"}]}, DataError, "leaves the data root"),
        ({"test": [{"question_id": 1, "text": "q", "image": "C:\\x.png"}]}, DataError, "leaves the data root"),
        ({"test": [{"question_id": 1, "answer": "q"}]}, DataError, r"item 0 \(id 1\).*no prompt"),
        ({"test": ["text"]}, DataError, "item 0: expected an object, found str"),
        ({"test": {"rows": []}}, DataError, "expected a list of objects, found keys 'rows'"),
        ({"train": [{"id": 1, "conversations": [{"from": "human", "value": "q"}]}]}, DataError, "no answer to learn"),
        ({"train": [{"id": 1, "conversations": [{"from": "alien", "value": "q"}]}]}, DataError, "turn 0 is"),
        (
            {"train": [{"id": 1, "conversations": [{"from": "human", "value": "<image> q"}]}]},
            DataError,
            r"1 <image> mark\(s\) for 0 image",
        ),
        ({"format": "lava"}, UnknownNameError, "Unknown format 'lava'. Did you mean 'llava'"),
        ({"scorr": "anls"}, UnknownNameError, r"tasks\[0\].scorr: unknown key. Did you mean 'scorer'"),
        ({"options": {"sufix": "x"}}, UnknownNameError, "option of task 'dots' 'sufix'"),
        ({"limit": 0}, ConfigError, "limit is 0"),
        ({"name": "a/b"}, ConfigError, "cannot be a folder name"),
    ],
)
def test_bad_input_is_refused_in_words(tmp_path: Path, change: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        load_stream(write_stream(tmp_path, **change))


@pytest.mark.parametrize(("key", "kind"), [("tasks", "tasks"), ("safety", "safety sets")])
def test_two_names_that_become_one_file_name_are_refused(tmp_path: Path, key: str, kind: str) -> None:
    path = write_stream(tmp_path)
    spec = yaml.safe_load(path.read_text())
    spec[key] = [{"name": name, "format": "qa", "test": "test.json"} for name in ("a b", "b", "a-b")]
    if key == "safety":
        spec[key] = [{"name": item["name"], "format": "qa"} for item in spec[key]]
    message = rf"stream 'mini': the {kind} 'a b' and 'a-b' would write to the same files \('a-b'\)\. Rename one"
    with pytest.raises(ConfigError, match=message):
        stream_spec(spec, base=tmp_path)
    path.write_text(yaml.safe_dump(spec))
    with pytest.raises(ConfigError, match=message):
        read_spec(path)
    # A task and a safety set of one name lie in different files.
    spec = yaml.safe_load(write_stream(tmp_path).read_text())
    assert stream_spec({**spec, "safety": [{"name": "dots", "format": "qa"}]}, base=tmp_path).safety[0].name == "dots"


def test_duplicate_test_ids_are_numbered_on_request(tmp_path: Path) -> None:
    (task,) = load_stream(write_stream(tmp_path, test=TEST * 2, duplicate_ids="rename")).tasks
    assert [s.id for s in task.test] == ["1", "1#2"]


def test_a_file_in_another_encoding_or_cut_short_is_named_with_the_place(tmp_path: Path) -> None:
    path = write_stream(tmp_path)
    (tmp_path / "data/test.json").write_bytes('[{"question_id": 1, "text": "café", "answer": "x"}]'.encode("latin-1"))
    with pytest.raises(DataError, match=r"not UTF-8: byte 0xe9 at offset 32.*iconv"):
        load_stream(path)
    (tmp_path / "data/test.json").write_text('[{"question_id": 1,')
    with pytest.raises(DataError, match=r"not valid JSON.*line 1, column 20"):
        load_stream(path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_are_read(tmp_path: Path, encoding: str) -> None:
    path = write_stream(tmp_path)
    (tmp_path / "data/test.json").write_bytes(json.dumps(TEST).replace("A dot", "Ä dot").encode(encoding))
    assert load_stream(path).tasks[0].test[0].answer == "Ä dot"


def test_own_data_as_json_lines_with_a_safety_set_and_calibration(tmp_path: Path) -> None:
    path = write_stream(tmp_path)
    rows = [{"prompt": "Sum?", "answers": ["4", "four"], "level": 1}, {"prompt": "Odd\u2028line?", "answer": 5}]
    (tmp_path / "data/own.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n")
    (tmp_path / "data/harm.jsonl").write_text(json.dumps({"id": "h", "prompt": "Do harm"}) + "\n")
    spec = yaml.safe_load(path.read_text())
    spec["tasks"] = [{"name": "own", "format": "qa", "test": "own.jsonl"}]
    spec["safety"] = [{"name": "red", "format": "qa", "options": {"unsafe": "harm.jsonl"}, "max_new_tokens": 9}]
    spec["safety_calibration"] = {"file": "own.jsonl", "limit": 1}
    path.write_text(yaml.safe_dump(spec))
    stream = load_stream(path)
    assert [s.references for s in stream.tasks[0].test] == [("4", "four"), ("5",)]
    assert [s.id for s in stream.tasks[0].test] == ["0", "1"] and stream.tasks[0].test[0].meta == {"level": 1}
    assert stream.safety[0].unsafe[0].prompt == "Do harm" and stream.safety[0].max_new_tokens == 9
    assert len(stream.safety_calibration) == 1
    spec["safety"][0]["options"]["unsave"] = "x"
    path.write_text(yaml.safe_dump(spec))
    with pytest.raises(ConfigError, match=r"safety set 'red'.*refused its options.*unsave"):
        load_stream(path)
