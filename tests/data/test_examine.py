"""The doctor collects every fault of a stream and names each; a sound stream has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from holdfast.data.examine import Diagnosis, examine
from holdfast.data.streams import read_spec

TASK = {"name": "q", "train": "train.json", "test": "test.json"}


def diagnose(layout: Any, *tasks: dict[str, Any], open_images: int | None = 200, **spec: Any) -> Diagnosis:
    layout.json("s.yaml", {"name": "s", "tasks": list(tasks) or [TASK], **spec})
    return examine(read_spec(layout.root / "s.yaml"), open_images=open_images)


def messages(diagnosis: Diagnosis, level: str) -> str:
    return "\n".join(f"{f.where}: {f.message} {f.remedy}" for f in diagnosis.findings if f.level == level)


def sound(layout: Any) -> None:
    layout.image("a.png", "b.png")
    layout.train("train.json", "a.png")
    layout.test("test.json", {"image": "b.png", "answer": "x"}, {"answer": "y"})


def test_a_sound_stream_is_ready_and_counted(layout: Any) -> None:
    sound(layout)
    found = diagnose(layout, license="CC BY 4.0")
    assert found.ok and not messages(found, "warning")
    assert "stream: licence: CC BY 4.0" in messages(found, "info")
    test = found.splits[1]
    assert (test.samples, test.images, test.text_only, test.opened, test.missing_images) == (2, 1, 1, 1, 0)
    assert test.sizes == ((8, 6),)


def test_every_fault_is_found_in_one_pass(layout: Any) -> None:
    layout.image("a.png", "broken.png", "cut.png", size=(64, 64))
    (layout.root / "broken.png").write_bytes(b"html error page")
    Image.effect_noise((64, 64), 50).save(layout.root / "cut.png")
    (layout.root / "cut.png").write_bytes((layout.root / "cut.png").read_bytes()[:600])
    layout.train("train.json", "a.png", answer=" ")
    layout.json(
        "test.json",
        [
            {"question_id": 1, "image": "a.png", "text": "Is it?", "answer": "x"},
            {"question_id": "1", "image": "a.pmg", "text": "Q", "answer": ""},
            {"question_id": 2, "image": "broken.png", "text": "Q", "answer": "x"},
            {"question_id": 3, "image": "cut.png", "text": "Q", "answer": "x"},
        ],
    )
    other = {"name": "gone", "test": "nothing.json", "obtain": "Fetch it from the hub."}
    safety = [{"name": "red", "format": "qa", "options": {"unsafe": "absent.jsonl"}}]
    found = diagnose(layout, {**TASK, "expected": {"test": 3000}}, other, safety=safety)
    errors, warnings = messages(found, "error"), messages(found, "warning")
    assert not found.ok
    assert "q, train: 1 sample(s) have no answer to learn: t0" in errors
    assert "q, test: 1 id(s) occur more than once: 1" in errors
    assert "q, test: 1 of 4 images are missing" in errors and "did you mean 'a.png'" in errors
    assert "q, test: 2 of 3 opened images cannot be read" in errors
    assert "gone, test" in errors and "Fetch it from the hub." in errors
    assert "red" in errors and "absent.jsonl does not exist" in errors
    assert "q, test: 4 samples; the published split has 3000" in warnings
    assert "1 sample(s) have no gold answer and will be unscored: 1" in warnings
    assert "1 of 4 test samples (images and prompt) also stand in training: 1" in warnings
    info = messages(found, "info")
    assert "gone: no training split" in info


def test_aliases_are_named_and_two_at_once_are_a_warning(layout: Any) -> None:
    sound(layout)
    found = diagnose(layout, {**TASK, "test": "{val,test}.json"})
    assert "read from test.json (a known other name of val.json)" in messages(found, "info")
    layout.test("val.json", {"answer": "x"})
    found = diagnose(layout, {**TASK, "test": "{val,test}.json"})
    assert "val.json is read; test.json is there too and is not" in messages(found, "warning")


def test_missing_roots_and_variables_say_what_to_get(layout: Any) -> None:
    sound(layout)
    found = diagnose(layout, {**TASK, "obtain": "Ask the authors."}, root="nowhere", obtain="Hub: x/y")
    assert "nowhere does not exist" in messages(found, "error")
    assert "to obtain: Hub: x/y" in messages(found, "info") and "q: to obtain: Ask the authors." in messages(
        found, "info"
    )
    found = diagnose(layout, root="${HOLDFAST_NOT_SET}/x")
    assert "HOLDFAST_NOT_SET" in messages(found, "error")


def test_pictures_are_sampled_evenly_or_all_opened(layout: Any) -> None:
    layout.image(*(f"{i}.png" for i in range(9)))
    layout.train("train.json", None)
    layout.test("test.json", *({"image": f"{i}.png", "answer": "x"} for i in range(9)))
    assert diagnose(layout, open_images=3).splits[1].opened == 3
    assert diagnose(layout, open_images=0).splits[1].opened == 0
    (layout.root / "4.png").write_bytes(b"x")
    assert diagnose(layout, open_images=None).splits[1].unreadable == 1
    assert diagnose(layout, open_images=3).splits[1].unreadable == 1  # the middle one is among an even three


def test_safety_sets_and_calibration_are_checked_too(layout: Any) -> None:
    sound(layout)
    layout.image("harm.png")
    layout.json("harm.json", [{"id": "h", "prompt": "Do it", "image": "harm.png"}])
    layout.json("own.json", [{"id": "c", "prompt": "Do it", "answer": "I cannot help", "image": "no.png"}])
    safety = [{"name": "red", "format": "qa", "options": {"unsafe": "harm.json"}, "expected": {"unsafe": 442}}]
    found = diagnose(layout, safety=safety, safety_calibration={"file": "own.json"})
    assert "red, unsafe: 1 requests; the published set has 442" in messages(found, "warning")
    assert "red: no benign side" in messages(found, "info")
    assert "safety_calibration, train: 1 of 1 images are missing" in messages(found, "error")


def test_limits_and_renamed_ids_are_told(layout: Any, tmp_path: Path) -> None:
    sound(layout)
    layout.json("test.json", [{"question_id": 1, "text": "Q", "answer": "x"}] * 3)
    found = diagnose(layout, {**TASK, "duplicate_ids": "rename", "test_limit": 2})
    assert found.ok and "they are numbered (id#2, ...)" in messages(found, "warning")
    assert "the first 2 of 3 samples are used (limit)" in messages(found, "info")


def test_pictures_that_published_pipelines_see_otherwise_are_counted(layout: Any) -> None:
    sound(layout)
    exif = Image.Exif()
    exif[0x0112] = 8
    names = [f"{i}.png" for i in range(6)]
    layout.image(*names)
    for name in names[:3]:
        Image.new("RGB", (4, 2)).save(layout.root / name, exif=exif)
    Image.new("LA", (4, 2)).save(layout.root / names[3])
    layout.test("test.json", *({"image": name, "answer": "x"} for name in names))
    found = messages(diagnose(layout), "warning")
    assert (
        "of 6 opened images the published pipelines see some differently: 3 turned by an EXIF tag, 1 with tr" in found
    )
