"""`holdfast doctor`: a sound stream passes, a faulty one exits with 1, scorers are tried on the gold answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from holdfast.cli import app


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "dot"}]
    (tmp_path / "train.json").write_text(json.dumps([{"id": 1, "image": "a.png", "conversations": turns}]))
    (tmp_path / "test.json").write_text(
        json.dumps([{"question_id": 1, "image": "a.png", "text": "Q", "answer": "dot"}])
    )
    return write(tmp_path, {})


def write(folder: Path, task: dict[str, Any]) -> Path:
    path = folder / "s.yaml"
    path.write_text(
        json.dumps({"name": "s", "tasks": [{"name": "t", "train": "train.json", "test": "test.json", **task}]})
    )
    return path


def run(*args: Any) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", *map(str, args)], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_a_sound_stream_is_ready(stream: Path) -> None:
    code, text = run(stream)
    assert code == 0 and "ready to run" in text and "40x30" in text


def test_memory_is_estimated_for_a_model(stream: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 50,
              "vision_config": {"image_size": 336, "patch_size": 14}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    code, text = run(stream, "--model", folder, "--batch-size", 2, "--json")
    memory = json.loads(text)["memory"]["t, train"]
    assert code == 0 and memory["image_tokens"] == 576 and memory["decoded_bytes"] == 3 * 40 * 30
    code, text = run(stream, "--model", folder)
    assert "KV cache" in text and "577" in text


def test_faults_are_shown_and_fail(stream: Path) -> None:
    (stream.parent / "a.png").unlink()
    code, text = run(stream)
    assert code == 1 and "2 error(s)" in text and "1 of 1 images are missing" in text
    code, text = run(stream, "--json")
    assert code == 1 and json.loads(text)["ok"] is False


def test_a_scorer_that_does_not_fit_the_answers_is_found(stream: Path) -> None:
    code, text = run(write(stream.parent, {"scorer": "vqa", "scorer_mode": "paper"}))
    assert code == 1 and "vqa cannot score 1 of 1 samples" in text and "needs exactly 10" in text
    code, text = run(write(stream.parent, {"scorer": "option_letter"}))
    assert code == 0 and "1 of 1 gold answers are wrong by option_letter" in text
    code, text = run(write(stream.parent, {"scorer": "anls", "scorer_options": {"treshold": 1}}))
    assert code == 1 and "refused its options" in text


def test_captions_without_java_are_an_error(stream: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(stream.parent))
    code, text = run(write(stream.parent, {"scorer": "captions"}))
    assert code == 1 and "METEOR would be missing" in text


@pytest.mark.parametrize("name", ["coin", "ucit", "mllm_dcl", "trigap", "hpa"])
def test_shipped_streams_say_what_to_obtain(name: str, tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "configs" / "streams" / f"{name}.yaml"
    code, text = run(path, "--root", tmp_path / "none")
    assert code == 1 and "to obtain" in text and "Hugging Face" in text
    code, text = run(path, "--root", tmp_path)
    assert code == 1 and "does not exist" in text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"methods": ["hpaa"]}, "hpaa"),
        ({"methdos": ["seqft"]}, "Did you mean 'methods'"),
        ({"model": "/nonexistent/model"}, "/nonexistent/model is no folder"),
        ({"injection": {"fraction": 0.5, "pool": {"file": "none.json"}}}, "injection.pool"),
        ({"injection": {"fraction": 5}}, "expected a share in (0, 1]"),
        (
            {"safety_calibration": {"prompts": {"name": "p", "format": "qa", "options": {"unsafe": "gone.json"}}}},
            "gone",
        ),
        ({"methods": ["seqft", "hpa"]}, "hpa needs safety calibration samples"),
        ({"methods": {"../up": {"method": "seqft"}}}, "cannot be a folder name"),
    ],
)
def test_a_run_file_is_checked_beyond_its_stream(stream: Path, change: dict[str, Any], message: str) -> None:
    path = stream.parent / "run.yaml"
    sound = {"model": "owner/name", "stream": "s.yaml", "methods": ["seqft"]}
    path.write_text(json.dumps(sound))
    code, text = run(path)
    assert code == 0 and "ready to run" in text
    path.write_text(json.dumps(sound | change))
    code, text = run(path)
    assert code == 1 and message in " ".join(text.split()), text
