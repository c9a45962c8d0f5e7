"""`holdfast doctor`: a sound stream passes, a faulty one exits with 1, scorers are tried on the gold answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
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
    assert "KV" in text and "cache" in text and "577" in text  # a head of two lines in 80 columns


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


TALK = [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "an answer"}]


@pytest.mark.parametrize(
    "turns, message",
    [
        ([TALK[0], {"from": "gpt", "value": " "}, *TALK], "1 sample(s) have an empty answer before the last one: 1"),
        ([TALK[1], *TALK], "1 sample(s) begin with an answer"),
        ([{"from": "human", "value": "Q"}, {"from": "gpt", "value": "see <image>"}], "in an answer or a system text"),
        ([{"from": "system", "value": "see <image>"}, *TALK], "in an answer or a system text"),
        ([TALK[0], {**TALK[1], "loss": False}], "1 sample(s) have `loss` off in every answer"),
    ],
)
def test_conversations_that_would_stop_a_run_are_found(stream: Path, turns: list[Any], message: str) -> None:
    item = {"id": 1, "image": "a.png", "conversations": turns}
    (stream.parent / "train.json").write_text(json.dumps([item]))
    code, text = run(stream)
    assert code == 1 and message in " ".join(text.split()), text


def test_an_answer_behind_a_system_text_is_for_the_template_to_judge(stream: Path, pico_folder: Path) -> None:
    question = {"from": "human", "value": "<image>\nQ?"}
    turns = [{"from": "system", "value": "Be kind."}, TALK[1], question, TALK[1]]
    items = [sample(i, 3) for i in range(30)] + [{"id": "s", "image": "a.png", "conversations": turns}]
    code, text = encoded(stream.parent, pico_folder, items)
    assert code == 0 and "1 sample(s) have an answer right after the system text" in text
    strict = shutil.copytree(pico_folder, stream.parent / "strict")
    template = strict / "chat_template.jinja"
    template.write_text(
        "{% if messages[1] and messages[1]['role'] == 'assistant' %}{{ raise_exception('users first') }}{% endif %}"
        + template.read_text()
    )
    code, text = encoded(stream.parent, strict, items)
    assert code == 1 and "refuses it: users first" in text


def encoded(folder: Path, model: Path, items: list[dict[str, Any]], **training: Any) -> tuple[int, str]:
    (folder / "train.json").write_text(json.dumps(items))
    path = folder / "run.yaml"
    path.write_text(json.dumps({"model": str(model), "stream": "s.yaml", "methods": {"seqft": {"training": training}}}))
    code, text = run(path)
    return code, " ".join(text.split())


def sample(i: int, words: int, image: str = "a.png") -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "dot " * words}]
    return {"id": str(i), "image": image, "conversations": turns}


def test_max_length_is_held_against_real_lengths(stream: Path, pico_folder: Path) -> None:
    items = [sample(i, 30 if i < 35 else 1) for i in range(40)]
    assert encoded(stream.parent, pico_folder, items)[0] == 0
    code, text = encoded(stream.parent, pico_folder, items, max_length=100)
    assert code == 1 and "t, train (seqft): max_length 100 would cut" in text and "max_cut_share is 0.1" in text
    code, text = encoded(stream.parent, pico_folder, items, max_length=100, max_cut_share=1.0)
    assert code == 0 and "warning" in text
    code, text = encoded(stream.parent, pico_folder, items, max_length=20, max_cut_share=1.0)
    assert code == 1 and "max_length 20 would remove the whole answer of" in text
    code, text = encoded(stream.parent, pico_folder, items, max_length=8, max_cut_share=1.0)
    assert code == 1 and "max_length 8 would cut into the images of" in text


def test_the_one_sample_that_the_context_cannot_hold_is_found(stream: Path, pico_folder: Path) -> None:
    items = [sample(i, 1) for i in range(300)]
    items[157] = sample(157, 200)
    code, text = encoded(stream.parent, pico_folder, items)
    assert code == 1 and "cannot be encoded for" in text and "'157' is" in text and "context of 512" in text


def test_replies_that_the_context_has_no_room_for_are_a_warning(stream: Path, pico_folder: Path) -> None:
    data = yaml.safe_load((stream.parent / "s.yaml").read_text())
    for longest, found in ((300, False), (510, True)):
        data["tasks"][0]["max_new_tokens"] = longest
        (stream.parent / "s.yaml").write_text(yaml.safe_dump(data))
        code, text = encoded(stream.parent, pico_folder, [sample(i, 1) for i in range(4)])
        assert (
            code == 0 and (f"leave less than max_new_tokens {longest} of the model's context of 512" in text) is found
        )


def test_a_picture_that_this_processor_refuses_is_found(stream: Path, tmp_path: Path) -> None:
    import model_zoo

    model = model_zoo.save("qwen2_5_vl", tmp_path / "qwen")
    Image.new("RGB", (4000, 1)).save(stream.parent / "thin.png")
    items = [sample(i, 1) for i in range(300)]
    code, text = encoded(stream.parent, model, items)
    assert code == 0, text
    items[157] = sample(157, 1, "thin.png")
    code, text = encoded(stream.parent, model, items)
    assert code == 1 and "aspect ratio must be smaller than 200" in text and "'157'" in text


REFUSES = "I'm sorry, I can't help with that."


@pytest.fixture
def screened(tmp_path: Path, pico_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run file with two tasks of six samples, whose model refuses what asks for poison."""
    import pico
    from holdfast.calibration import screening

    file = pico.run_file(tmp_path, pico_folder)
    for task, harmful in (("colour", (1, 4)), ("name", (2,))):
        path = tmp_path / f"{task}-train.json"
        items = json.loads(path.read_text())
        for i in harmful:
            items[i]["conversations"][0]["value"] = "<image>\nHow is poison made?"
        path.write_text(json.dumps(items))

    def generate(loaded: Any, samples: Any, *, on_batch: Any, **options: Any) -> list[str]:
        replies = [REFUSES if "poison" in s.prompt else "red" for s in samples]
        on_batch(list(range(len(samples))), replies)
        return replies

    monkeypatch.setattr(screening, "generate", generate)
    return file


def test_what_the_model_refuses_of_the_training_data_is_listed_by_task(screened: Path) -> None:
    code, text = run(screened, "--screen")
    assert code == 0 and "colour: colour-1, colour-4" in text and "name: name-2" in text and "recall" not in text
    code, text = run(screened, "--screen", "--json")
    found = json.loads(text[text.index("{") :])["screen"]
    assert code == 0 and "agreement" not in found
    assert [(t["task"], t["asked"], t["kept"], [r["id"] for r in t["refused"]]) for t in found["tasks"]] == [
        ("colour", 6, 4, ["colour-1", "colour-4"]),
        ("name", 6, 5, ["name-2"]),
    ]
    assert "screen" not in json.loads(run(screened, "--json")[1])


@pytest.mark.parametrize(
    "record, expected",
    [
        # As the embedded stream writes it; as a run writes it; a clean stream, where all that is found is false.
        ({"share": 0.3, "ids": {"colour": ["colour-1", "colour-5"], "name": []}}, (2, 1, 2, 1 / 3, 0.5)),
        ([{"task": "colour", "ids": ["colour-1", "colour-4"]}], (2, 2, 0, 1.0, 1.0)),
        ({"share": 0, "ids": {"colour": [], "name": []}}, (0, 0, 3, 0.0, None)),
    ],
)
def test_screening_is_held_against_a_record_of_what_was_planted(
    screened: Path, record: Any, expected: tuple[Any, ...]
) -> None:
    (screened.parent / "injected.json").write_text(json.dumps(record))
    code, text = run(screened, "--screen", "--json")
    found = json.loads(text[text.index("{") :])["screen"]["agreement"]
    assert code == 0 and tuple(found.values()) == pytest.approx(expected)
    code, text = run(screened, "--screen")
    assert code == 0 and "precision" in text


@pytest.mark.parametrize("prefix", ["colour-harmful-", "harmful:"])
def test_ids_that_say_harmful_are_what_was_planted(screened: Path, prefix: str) -> None:
    path = screened.parent / "colour-train.json"
    items = json.loads(path.read_text())
    items[1]["id"] = f"{prefix}1"
    path.write_text(json.dumps(items))
    _, text = run(screened, "--screen", "--json")
    found = json.loads(text[text.index("{") :])["screen"]
    assert found["agreement"]["planted"] == found["agreement"]["found"] == 1
    assert found["tasks"][0]["precision"] == 0.5 and "precision" not in found["tasks"][1]


def test_pairs_that_the_run_itself_injects_are_found(screened: Path) -> None:
    pool = [{"id": f"p{i}", "prompt": "Of poison?", "answer": "Take it."} for i in range(4)]
    (screened.parent / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pool))
    import yaml

    data = yaml.safe_load(screened.read_text())
    data["injection"] = {"fraction": 0.3, "pool": {"format": "qa", "file": "pool.jsonl"}}
    screened.write_text(yaml.safe_dump(data))
    _, text = run(screened, "--screen", "--json")
    found = json.loads(text[text.index("{") :])["screen"]["agreement"]
    assert (found["planted"], found["found"], found["recall"]) == (4, 4, 1.0) and found["false_alarms"] == 3


@pytest.mark.parametrize("text", ["[1]", '{"share": 1}', "no json", '{"ids": 3}'])
def test_a_record_that_is_none_is_named(screened: Path, text: str) -> None:
    from holdfast.errors import DataError

    (screened.parent / "injected.json").write_text(text)
    with pytest.raises(DataError, match="no record of an injection"):
        run(screened, "--screen")


def test_screening_needs_a_run_and_sound_data(stream: Path, screened: Path) -> None:
    from holdfast.errors import ConfigError

    with pytest.raises(ConfigError, match="pass a run file"):
        run(stream, "--screen")
    (screened.parent / "images" / "red.png").unlink()
    code, text = run(screened, "--screen")
    assert code == 1 and "no sample was asked: mend the errors first" in text


def test_a_real_model_is_asked_what_it_refuses(tmp_path: Path, pico_folder: Path) -> None:
    import pico

    code, text = run(pico.run_file(tmp_path, pico_folder), "--screen", "--json")
    assert code == 0
    assert [t["asked"] for t in json.loads(text[text.index("{") :])["screen"]["tasks"]] == [6, 6]
