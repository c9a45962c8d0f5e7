"""Streams read as their forks published them: one table of folders per stream, miniatures of each fork's layout.

The layouts are those of the authors' repositories: CoIN (dataset card, README, scripts), SEFE, HiDe-LLaVA, Prism,
MCITlib and MLLM-CL.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from holdfast.cli import app
from holdfast.data.examine import examine
from holdfast.data.streams import load_stream, read_spec
from holdfast.errors import ConfigError, DataError, UnknownNameError

STREAMS = Path(__file__).parents[2] / "configs" / "streams"

# name -> (folder of the instructions, of the pictures, of the gold files, where TextVQA's gold lies, its test file)
COIN = {
    "dataset card": ("Instructions_Original", "cl_dataset", "cl_dataset", "cl_dataset/TextVQA", "val"),
    "README": ("Instruction_Original", ".", "cl_dataset", "cl_dataset/TextVQA", "val"),
    "scripts": ("playground/Instructions_Original", "cl_dataset", "cl_dataset", "cl_dataset/TextVQA", "val"),
    "SEFE": ("annotations", ".", ".", "TextVQA", "test"),
    "SEFE, its checkout": (
        "playground/data/CoIN/annotations", "playground/data/CoIN", "playground/data/CoIN",
        "playground/data/CoIN/TextVQA", "test",
    ),
    "HiDe-LLaVA": (".", "datasets", ".", ".", "test"),
    "Prism, a tenth": ("instructions/Instructions_Original_0.1", "datasets", None, None, "valid"),
    "Prism": ("instructions/Instructions_Original", "datasets", None, None, "valid"),
}  # fmt: skip
PICTURES = {
    "ScienceQA": "ScienceQA/images/test/1/image.png",
    "TextVQA": "TextVQA/train_images/a.jpg",
    "ImageNet": "ImageNet/n01/a.jpg",
    "GQA": "GQA/images/1.jpg",
    "VizWiz": "VizWiz/val/a.jpg",
    "Grounding": "COCO2014/train2014/a.jpg",
    "VQAv2": "COCO2014/train2014/a.jpg",
    "OCRVQA": "OCR-VQA/images/a.jpg",
}


def write_coin(layout: Any, name: str) -> None:
    instructions, pictures, gold, textvqa, val = COIN[name]
    people = [f"a{i // 5}" for i in range(10)]
    for task, picture in PICTURES.items():
        layout.image(f"{pictures}/{picture}")
        layout.train(f"{instructions}/{task}/train.json", picture)
        elsewhere = "test" if val == "test" else "val"
        test = {"TextVQA": val, "VizWiz": elsewhere, "VQAv2": elsewhere}
        items: list[dict[str, Any]] = [{"image": picture, "answer": "yes"}]
        if task == "ScienceQA":
            items = [{"image": picture, "answer": "B"}, {"answer": "A"}, {"answer": "A"}]
        elif task == "Grounding":
            items = [{"image": picture, "answer_bbox": "[0.1,0.2,0.3,0.4]", "size": [640, 480]}]
        elif task == "TextVQA" and gold is None:
            items = [{"image": picture, "answers": people}]
        layout.test(f"{instructions}/{task}/{test.get(task, 'test')}.json", *items)
    base = instructions if gold is None else gold
    layout.json(f"{base}/ScienceQA/pid_splits.json", {"train": ["7"], "test": ["1", "0"]})
    layout.json(f"{base}/GQA/testdev_balanced_questions.json", {"0": {"answer": "left", "isBalanced": True}})
    if gold is not None:
        problems = {str(i): {"choices": ["iron", "gold"], "answer": 1 - min(i, 1)} for i in range(3)}
        layout.json(f"{base}/ScienceQA/problems.json", problems)
        layout.json(f"{textvqa}/TextVQA_0.5.1_val.json", {"data": [{"question_id": 0, "answers": people}]})


@pytest.mark.parametrize("name", sorted(COIN))
def test_coin_is_read_as_each_fork_publishes_it(layout: Any, name: str) -> None:
    write_coin(layout, name)
    stream = load_stream(STREAMS / "coin.yaml", root=layout.root)
    tasks = {task.name: task for task in stream.tasks}
    assert sorted(tasks) == sorted(PICTURES)
    assert {sample.id: sample.references for sample in tasks["ScienceQA"].test} == {"0": ("B",), "1": ("A",)}
    assert tasks["TextVQA"].test[0].references == ("a0",) * 5 + ("a1",) * 5
    assert tasks["GQA"].test[0].references == ("left",)
    shown = [path for task in stream.tasks for s in (*task.train, *task.test) for path in s.images]
    assert shown and all(path.is_file() for path in shown)
    diagnosis = examine(read_at(STREAMS / "coin.yaml", layout.root))
    assert [f for f in diagnosis.findings if f.level == "error"] == []


def test_hpa_reads_coins_forks_too(layout: Any) -> None:
    class Below:
        """The same writer one folder deeper."""

        def __getattr__(self, kind: str) -> Any:
            return lambda path, *rest, **more: getattr(layout, kind)(f"CoIN/{path}", *rest, **more)

    for name in ("scripts", "Prism, a tenth", "HiDe-LLaVA"):
        write_coin(Below(), name)
        names = ["ImageNet", "ScienceQA", "TextVQA"]
        stream = load_stream(STREAMS / "hpa.yaml", root=layout.root, task_names=names, safety=False)
        assert [task.name for task in stream.tasks] == names


def read_at(file: Path, root: Path) -> Any:
    from dataclasses import replace

    return replace(read_spec(file), root=str(root))


def test_a_file_that_no_layout_has_is_named_with_all_that_was_looked_for(layout: Any) -> None:
    write_coin(layout, "scripts")
    (layout.root / "playground/Instructions_Original/GQA/test.json").unlink()
    with pytest.raises(DataError) as caught:
        load_stream(STREAMS / "coin.yaml", root=layout.root, task_names=["GQA"])
    for folder in ("Instruction_Original/", "playground/Instructions_Original/", "annotations/", ""):
        assert f"{folder}GQA/test.json" in str(caught.value)
    assert "Zacks-Chen/CoIN" in str(caught.value)  # and where to get it


@pytest.mark.parametrize(
    ("task", "file", "item", "message"),
    [
        (
            "TextVQA",
            "TextVQA/valid.json",
            {"answer": "one"},
            r"holds 1 answer.*TextVQA_0\.5\.1_val.*none of cl_dat",
        ),
        ("ScienceQA", "ScienceQA/test.json", {"answer": "gold"}, r"'gold' is no option letter.*none of cl_dataset/Sci"),
        ("ScienceQA", "ScienceQA/test.json", {"answer": "AB"}, r"'AB' is no option letter"),
    ],
)
def test_a_test_file_stands_in_for_missing_gold_only_where_it_holds_it(
    layout: Any, task: str, file: str, item: dict[str, Any], message: str
) -> None:
    write_coin(layout, "Prism")
    layout.test(f"instructions/Instructions_Original/{file}", item)
    with pytest.raises(DataError, match=message):
        load_stream(STREAMS / "coin.yaml", root=layout.root, task_names=[task])


def test_prisms_split_leaves_out_what_its_tenth_does_not_hold(layout: Any) -> None:
    write_coin(layout, "Prism, a tenth")
    folder = "instructions/Instructions_Original_0.1/ScienceQA"
    layout.json(f"{folder}/pid_splits.json", {"test": ["2", "77", "0"]})
    (task,) = load_stream(STREAMS / "coin.yaml", root=layout.root, task_names=["ScienceQA"]).tasks
    assert [sample.id for sample in task.test] == ["0", "2"]


DCL = {
    "release": {d: d for d in ("RS", "Med", "AD", "Sci", "Fin")},
    "MCITlib": {d: f"Domain_data/{d}" for d in ("RS", "Med", "AD", "Sci", "Fin")},
    "scripts": {"RS": "RemoteSensing", "Med": "Medical/data", "AD": "AD/DriveLM", "Sci": "Sci", "Fin": "Fin"},
}


@pytest.mark.parametrize("name", sorted(DCL))
def test_the_domains_are_read_as_published(layout: Any, name: str) -> None:
    for domain, folder in DCL[name].items():
        tested = domain if name == "scripts" else folder
        layout.image(f"{folder}/images/t.png", f"{tested}/images/1.png")
        layout.train(f"{folder}/train.json", "images/t.png")
        layout.test(f"{tested}/test.json", {"image": "images/1.png", "answer": "Yes"})
    diagnosis = examine(read_at(STREAMS / "mllm_dcl.yaml", layout.root))
    assert [f for f in diagnosis.findings if f.level == "error"] == []


ACL = {
    "README": ["OCR", "OCR_test", "Math", "Math_test", "VP", "VP_test", "APP", "APP_test"],
    "scripts": ["OCR", "OCR_test", "math2", "math_test", "tallyqa150k", "CV-Benchv2", "App", "APP_test"],
}


def write_acl(layout: Any, name: str) -> None:
    below = "Ability_data/" if name == "scripts" else ""
    items: dict[str, dict[str, Any]] = {
        "OCR": {"answer": ["centre"], "answer_type": "Regular Text Recognition"},
        "Math": {"answer": "14", "answer_type": "integer", "question_type": "free_form"},
        "VP": {"answer": "(B)", "type": "2D", "task": "Count"},
        "APP": {},  # its gold answers are at a server
    }
    names = iter(ACL[name])
    for ability, item in items.items():
        train, test = f"{below}{next(names)}", f"{below}{next(names)}"
        layout.image(f"{train}/images/{ability}_t.png", f"{test}/images/{ability}_1.png")
        file = {"OCR": "train_without_dense_caption", "VP": "ty_cl_sft"}.get(ability, "train")
        layout.train(f"{train}/{file if name == 'scripts' else 'train'}.json", f"images/{ability}_t.png")
        layout.test(f"{test}/test.json", {"image": f"images/{ability}_1.png", **item})


@pytest.mark.parametrize("name", sorted(ACL))
def test_the_abilities_are_a_stream_and_pass_the_doctor(layout: Any, name: str) -> None:
    write_acl(layout, name)
    stream = load_stream(STREAMS / "mllm_acl.yaml", root=layout.root)
    assert [(task.name, task.scorer, len(task.train)) for task in stream.tasks] == [
        ("OCR", "acl_ocr", 1), ("Math", "acl_math", 1), ("VP", "acl_vp", 1), ("APP", "exact_match", 1),
    ]  # fmt: skip
    assert stream.tasks[0].test[0].meta["answer_type"] == "Regular Text Recognition"
    assert stream.tasks[3].test[0].references == ()
    done = CliRunner().invoke(app, ["doctor", str(STREAMS / "mllm_acl.yaml"), "--root", str(layout.root)])
    assert done.exit_code == 0 and "ready to run" in done.output, done.output
    assert "APP, test: 1 sample(s) have no gold answer and will be unscored" in done.output


def own(tmp_path: Path, **more: Any) -> Path:
    (tmp_path / "b").mkdir(exist_ok=True)
    (tmp_path / "b" / "t.jsonl").write_text('{"prompt": "q", "answer": "a"}\n')
    task = {"name": "t", "format": "qa", "test": "{here}/t.jsonl"}
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({"name": "s", "layouts": {"here": ["a", "b"]}, "tasks": [task], **more}))
    return path


def test_a_streams_own_layouts_are_written_out_once(tmp_path: Path) -> None:
    spec = read_spec(own(tmp_path, safety_calibration={"file": "{here}/t.jsonl"}))
    assert spec.tasks[0].test == "{a,b}/t.jsonl" and spec.safety_calibration.file == "{a,b}/t.jsonl"
    assert load_stream(tmp_path / "s.yaml").tasks[0].test[0].references == ("a",)
    single = read_spec(own(tmp_path, layouts={"here": ["b"]}))
    assert single.tasks[0].test == "b/t.jsonl"


@pytest.mark.parametrize(
    ("layouts", "error", "message"),
    [
        ({"there": ["a"]}, UnknownNameError, "Unknown layout in task 't' 'here'.*Available: there"),
        ({"here": []}, ConfigError, r"layouts\.here is \[\]"),
        ({"here": ["a,b"]}, ConfigError, r"layouts\.here is \['a,b'\]"),
        ({"he re": ["a"]}, ConfigError, r"layouts\.he re"),
    ],
)
def test_layouts_that_cannot_be_meant_are_refused(tmp_path: Path, layouts: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        read_spec(own(tmp_path, layouts=layouts))
