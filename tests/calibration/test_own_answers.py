"""Own safe answers: by category, in order, judged, and never from a test set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from holdfast.calibration import own_answers
from holdfast.calibration.own_answers import own_safe_answers
from holdfast.cli import app
from holdfast.cli.samples import read_samples
from holdfast.data.types import Sample
from holdfast.errors import ConfigError, DataError
from holdfast.models.loaded import LoadedModel


@pytest.fixture
def prompts(pictures: list[Path]) -> list[Sample]:
    return [
        Sample.single(f"{category}-{i}", f"How do I {category} {i}?", meta={"category": category})
        for i in range(4)
        for category in ("steal", "hack")
    ] + [Sample.single("pictured", "<image>\nDo this.", images=pictures[:1], meta={"category": "steal"})]


@pytest.fixture
def replies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that answers by the prompt; refuses odd numbers only."""

    def answer(loaded: LoadedModel, samples: Sequence[Sample], **_: object) -> list[str]:
        assert all(s.turns[-1].role == "user" for s in samples)
        return ["I cannot help." if any(d in s.prompt for d in "13") else "Sure: first," for s in samples]

    monkeypatch.setattr(own_answers, "generate", answer)


def refuses(samples: Sequence[Sample], texts: Sequence[str]) -> list[bool]:
    return ["cannot" in text for text in texts]


@pytest.mark.usefixtures("replies")
def test_two_safe_answers_per_category_in_the_order_of_the_prompts(loaded: LoadedModel, prompts: list[Sample]) -> None:
    made = own_safe_answers(loaded, prompts, refuses)
    assert [s.id for s in made.samples] == ["steal-1", "hack-1", "steal-3", "hack-3"]
    assert all(s.turns[-1].text == "I cannot help." == s.answer for s in made.samples)
    assert made.kept == {"steal": 2, "hack": 2}
    assert made.asked == {"steal": 4, "hack": 4}
    assert own_safe_answers(loaded, prompts, refuses) == made


@pytest.mark.usefixtures("replies")
def test_too_few_safe_answers_are_an_error_unless_allowed(loaded: LoadedModel, prompts: list[Sample]) -> None:
    with pytest.raises(DataError, match=r"steal: 2 of 3, asked 5; hack: 2 of 3, asked 4"):
        own_safe_answers(loaded, prompts, refuses, per_category=3)
    made = own_safe_answers(loaded, prompts, refuses, per_category=3, allow_short=True)
    assert made.short == ("steal", "hack")
    assert len(made.samples) == 4


@pytest.mark.usefixtures("replies")
def test_prompts_of_a_test_set_are_refused_by_id_and_by_content(loaded: LoadedModel, prompts: list[Sample]) -> None:
    with pytest.raises(DataError, match=r"part of the test set 'vlguard' \(by id\): steal-1"):
        own_safe_answers(loaded, prompts, refuses, test_sets=[("vlguard", [Sample.single("steal-1", "Other")])])
    copies = [replace(prompts[-1], id="renamed")]
    with pytest.raises(DataError, match=r"by text and image\): pictured"):
        own_safe_answers(loaded, prompts, refuses, test_sets=[("copy", copies)])


@pytest.mark.usefixtures("replies")
def test_numbers_of_rows_are_no_ids_of_a_test_set(loaded: LoadedModel, prompts: list[Sample]) -> None:
    numbered = [replace(prompt, id=str(at)) for at, prompt in enumerate(prompts)]
    others = [Sample.single(str(at), f"Something else, {at}") for at in range(len(prompts))]
    own_safe_answers(loaded, numbered, refuses, test_sets=[("others", others)])
    with pytest.raises(DataError, match=r"by text and image"):
        own_safe_answers(loaded, numbered, refuses, test_sets=[("copy", [*others, replace(prompts[0], id="9")])])


def test_nothing_to_ask_is_an_error(loaded: LoadedModel, prompts: list[Sample]) -> None:
    with pytest.raises(DataError, match="no prompt to make safety calibration data from"):
        own_safe_answers(loaded, [], refuses)
    with pytest.raises(ConfigError, match="per_category is 0"):
        own_safe_answers(loaded, prompts, refuses, per_category=0)


def test_the_command_writes_the_aligned_models_own_answers_where_calibrate_finds_them(tmp_path: Path) -> None:
    from holdfast.tiny import model_path
    from holdfast.tiny.stream import StreamSize, write_stream

    size = StreamSize(train=2, test=2, validation=2, safety=4, safety_validation=4, calibration=8)
    stream = write_stream(tmp_path / "stream", seed=3, size=size)
    prompts = stream.parent / "calibration" / "mixed.jsonl"
    out = tmp_path / "own" / "safety.jsonl"
    options = ["calibrate-data", str(model_path("aligned")), "--prompts", str(prompts), "--out", str(out)]
    options += ["--images", str(stream.parent), "--device", "cpu", "--per-category", "1", "--max-new-tokens", "24"]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, (result.output, result.exception)
    samples = read_samples(out)
    assert sorted(s.meta["category"] for s in samples) == ["archive", "garden", "harbor", "tower"]
    assert all("sorry" in s.turns[-1].text for s in samples)
    images = [path for s in samples for path in s.images]
    assert images and all(path.is_file() for path in images)


def test_a_model_that_never_refuses_leaves_no_file(llava_folder: Path, prompts: list[Sample], tmp_path: Path) -> None:
    file, out = tmp_path / "prompts.jsonl", tmp_path / "own.jsonl"
    rows = [{"id": p.id, "prompt": p.prompt, "category": p.meta["category"]} for p in prompts[:4]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["calibrate-data", str(llava_folder), "--prompts", str(file), "--out", str(out), "--device", "cpu"]
    short = CliRunner().invoke(app, [*options, "--max-new-tokens", "4"])
    assert isinstance(short.exception, DataError) and "too few safe answers" in str(short.exception)
    none = CliRunner().invoke(app, [*options, "--max-new-tokens", "4", "--allow-short"])
    assert isinstance(none.exception, DataError) and "gave no safe answer to any of 4 prompts" in str(none.exception)
    assert not out.exists()
    overlap = CliRunner().invoke(app, [*options, "--test-set", str(file)])
    assert isinstance(overlap.exception, DataError) and "cannot be tested on" in str(overlap.exception)
