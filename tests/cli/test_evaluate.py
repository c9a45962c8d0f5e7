"""`holdfast evaluate` on a microscopic model: figures, resume, refusal of another question."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import model_zoo
from holdfast.cli import app
from holdfast.errors import ConfigError, DataError, ModelError, RunError, StorageError, UnknownNameError
from holdfast.files import Lock


@pytest.fixture
def data(tmp_path) -> Path:
    root = tmp_path / "data"
    root.mkdir()
    model_zoo.picture(root / "p.png")
    tests = [
        {"question_id": i, "image": "p.png", "text": f"<image>\nWhat colour? {i}", "answer": "red"} for i in range(4)
    ]
    (root / "test.json").write_text(json.dumps(tests))
    (root / "unsafe.jsonl").write_text("".join(json.dumps({"prompt": f"Forbidden {i}"}) + "\n" for i in range(3)))
    (root / "benign.jsonl").write_text(json.dumps({"prompt": "Allowed", "image": "p.png"}) + "\n")
    (root / "stream.yaml").write_text(
        "name: s\n"
        "tasks: [{name: colour, train: absent.json, test: test.json, max_new_tokens: 3}]\n"
        "safety: [{name: own, format: qa, max_new_tokens: 4, options: {unsafe: unsafe.jsonl, benign: benign.jsonl}}]\n"
    )
    return root


def call(*args: object, catch: bool = False):
    return CliRunner().invoke(app, ["evaluate", *map(str, args)], catch_exceptions=catch)


def test_scores_and_refusals_of_a_model_and_a_second_call_that_asks_nothing(pico_folder, data, tmp_path, monkeypatch):
    out, stream = tmp_path / "out", data / "stream.yaml"
    args = (pico_folder, "--tasks", stream, "--safety", stream, "--out", out, "--batch-size", 2)
    shown = call(*args)
    assert shown.exit_code == 0 and "colour" in shown.output and "keyword_strict" in shown.output
    result = json.loads((out / "evaluation.json").read_text())
    assert result["scores"]["colour"]["n"] == 4 and result["safety"]["own"]["n"] == 3
    assert result["safety"]["own"]["benign"]["n"] == 1 and result["ap"] == result["scores"]["colour"]["value"]
    assert (
        result["scores"]["colour"]["interval"]["low"] <= result["ap"] <= result["scores"]["colour"]["interval"]["high"]
    )
    assert result["safety"]["own"]["interval"]["kind"] == "wilson"
    assert "label" in result["safety"]["own"]["judges"]["keyword_strict"]["agreement"]
    assert len((out / "predictions/safety-own.jsonl").read_text().splitlines()) == 4

    monkeypatch.setattr("holdfast.evaluation.evaluator.load", None)  # a second call needs no model
    again = call(*args, "--json")
    assert json.loads(again.output[again.output.index("{") :]) == result
    # As a later version finds it: what it records beyond this one stands at its default.
    earlier = json.loads((out / "config.json").read_text())
    asked = earlier["config"]
    for group in (asked["stream"]["tasks"][0], asked["safety"][0]):
        del group["license"]
    del asked["pictures"]["max_pixels"], asked["evaluation"]["limit_between"]
    (out / "config.json").write_text(json.dumps(earlier))
    assert call(*args).exit_code == 0
    with pytest.raises(RunError, match=r"evaluation.batch_size: 2 -> 3"):
        call(*args[:-1], 3)


def test_a_file_of_safety_sets_alone_and_judges_of_ones_own_choice(pico_folder, data, tmp_path):
    (data / "sets.yaml").write_text(
        "safety: [{name: own, format: qa, max_new_tokens: 2, options: {unsafe: unsafe.jsonl}}]\n"
    )
    judges = ("--judge", "keyword_prefix", "--judge", "{name: keyword, extra: [no way]}")
    call(pico_folder, "--safety", data / "sets.yaml", "--out", tmp_path / "o", "--limit", 2, *judges)
    result = json.loads((tmp_path / "o/evaluation.json").read_text())
    row = result["safety"]["own"]
    assert row["judge"] == "keyword_prefix" and row["n"] == 2 and list(row["judges"]) == ["keyword"]
    assert result["scores"] == {} and result["ap"] is None and "benign" not in row
    assert result["masr"] == row["asr"]


def test_new_weights_under_the_old_path_are_refused(pico_folder, data, tmp_path):
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    shutil.copytree(pico_folder, model)
    adapter.mkdir()
    module = "model.language_model.layers.0.mlp.down_proj"
    shape = next(t.shape for k, t in load_file(model / "model.safetensors").items() if "layers.0.mlp.down_proj" in k)
    factors = {"lora_A": torch.ones(1, shape[1]), "lora_B": torch.ones(shape[0], 1)}
    save_file(
        {f"base_model.model.{module}.{k}.weight": f for k, f in factors.items()}, adapter / "adapter_model.safetensors"
    )
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [module]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    args = (model, "--adapter", adapter, "--safety", data / "stream.yaml", "--out", tmp_path / "o", "--limit", 1)
    call(*args)
    call(*args)

    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 2}))
    with pytest.raises(RunError, match=r"model_sha256.adapters\[0\]: '\w+' -> '\w+'\n.*choose another --out"):
        call(*args)
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    call(*args)

    weights = load_file(model / "model.safetensors")
    key = next(k for k in weights if k.endswith("down_proj.weight"))
    save_file({**weights, key: weights[key] + 1}, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"model_sha256.weights: '\w+' -> '\w+'"):
        call(*args)
    shutil.copy(pico_folder / "model.safetensors", model)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(RunError, match=r"model_sha256.settings: '\w+' -> '\w+'"):
        call(*args)


def test_new_questions_under_the_old_path_are_refused(pico_folder, data, tmp_path):
    stream = data / "stream.yaml"
    args = (pico_folder, "--tasks", stream, "--safety", stream, "--out", tmp_path / "o", "--limit", 2)
    call(*args)
    tests = json.loads((data / "test.json").read_text())
    tests[3]["text"] = "Never asked, behind the limit"
    (data / "test.json").write_text(json.dumps(tests))
    call(*args)

    tests[0]["text"] = "What is not shown?"
    (data / "test.json").write_text(json.dumps(tests))
    with pytest.raises(RunError, match=r"data_sha256.tasks.colour: '\w+' -> '\w+'\nGo back"):
        call(*args)
    tests[0] |= {"text": "<image>\nWhat colour? 0", "answer": "blue"}
    (data / "test.json").write_text(json.dumps(tests))
    with pytest.raises(RunError, match=r"data_sha256.tasks.colour"):
        call(*args)
    (data / "test.json").write_text(json.dumps([{**tests[0], "answer": "red"}, *tests[1:]]))
    call(*args)

    model_zoo.picture(data / "p.png", (0, 0, 255))  # the same path and as many pixels
    with pytest.raises(RunError, match=r"(?s)data_sha256.tasks.colour.*data_sha256.safety.own.benign"):
        call(*args)
    (data / "p.png").unlink()
    with pytest.raises(DataError, match=r"p\.png does not exist.*holdfast doctor"):
        call(*args)


def test_two_safety_sets_of_one_file_name_are_refused(pico_folder, data, tmp_path):
    sets = "safety: [{name: red team, format: qa, options: {unsafe: unsafe.jsonl}}, {name: red-team, format: qa}]\n"
    (data / "sets.yaml").write_text(sets)
    for file in (data / "sets.yaml", data / "whole.yaml"):
        file.write_text(sets if file.stem == "sets" else "name: s\ntasks: [{name: t, test: test.json}]\n" + sets)
        with pytest.raises(ConfigError, match=r"the safety sets 'red team' and 'red-team' would write to the same"):
            call(pico_folder, "--safety", file, "--out", tmp_path / "o")


@pytest.mark.parametrize(
    ("args", "error", "says"),
    [
        ((), ConfigError, "Nothing to ask"),
        (("--safety", "{data}/stream.yaml", "--task", "colour"), ConfigError, "--task chooses among the tasks"),
        (("--tasks", "{data}/stream.yaml", "--judge", "keywrd"), UnknownNameError, "Did you mean 'keyword'"),
        (("--tasks", "{data}/stream.yaml", "--judge", "[1]"), ConfigError, "expected a name, or a mapping"),
        (("--safety", "{data}/none.yaml"), ConfigError, "names no safety set"),
    ],
)
def test_wrong_arguments_are_named(pico_folder, data, tmp_path, args, error, says):
    (data / "none.yaml").write_text("name: x\n")
    with pytest.raises(error, match=says):
        call(pico_folder, *(a.format(data=data) for a in args), "--out", tmp_path / "o")


def test_a_judge_may_be_called_by_a_name_of_its_own(data, tmp_path, pico_folder):
    options = "url: 'http://127.0.0.1:1/v1', model: m, attempts: 1, cache: false"
    with pytest.raises(Exception, match="gave no verdict for 3 replies"):
        call(
            pico_folder, "--safety", data / "stream.yaml", "--out", tmp_path / "o", "--judge",
            f"{{judge: endpoint, name: mine, {options}}}",
        )  # fmt: skip
    config = json.loads((tmp_path / "o/config.json").read_text())
    assert config["config"]["evaluation"]["judges"][0]["options"]["name"] == "mine"


def test_the_way_of_opening_pictures_is_part_of_the_question(pico_folder, data, tmp_path):
    args = (pico_folder, "--tasks", data / "stream.yaml", "--out", tmp_path / "out")
    assert call(*args, "--images", "published", "--max-pixels", 400).exit_code == 0
    asked = json.loads((tmp_path / "out/config.json").read_text())["config"]
    assert asked["pictures"] == {"images": "published", "max_pixels": 400}
    with pytest.raises(RunError, match=r"pictures.images: 'published' -> 'upright'"):
        call(*args)


@pytest.mark.parametrize(
    ("option", "value", "known"), [("--images", "odd", "published"), ("--dtype", "int8", "float32")]
)
def test_a_choice_that_is_none_is_refused_with_the_list(pico_folder, data, option, value, known):
    shown = call(pico_folder, "--tasks", data / "stream.yaml", option, value)
    assert shown.exit_code == 2 and value in shown.output and known in shown.output


def test_two_processes_never_ask_for_one_folder_at_once(pico_folder, data, tmp_path, monkeypatch):
    out, stream = tmp_path / "out", data / "stream.yaml"
    args = (pico_folder, "--tasks", stream, "--out", out)
    with Lock(out / ".lock", busy="taken"), pytest.raises(RunError, match="in use by another holdfast process"):
        call(*args)
    assert not (out / "config.json").exists() and call(*args).exit_code == 0
    (out / "evaluation.json").unlink()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(StorageError, match="All answers, as long as they may get, needs about"):
        call(*args)


@pytest.fixture
def weights_alone(pico_folder, tmp_path) -> Path:
    """A tuned model as people save it: weights and configuration, no tokenizer, template or processor."""
    folder = tmp_path / "after"
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(pico_folder / name, folder / name)
    return folder


def test_a_folder_without_a_processor_is_asked_with_the_one_that_is_named(weights_alone, pico_folder, data, tmp_path):
    args = (weights_alone, "--tasks", data / "stream.yaml", "--out", tmp_path / "out")
    with pytest.raises(ModelError, match=r"processor cannot be loaded.*name that one with `--processor` \(`evaluate`"):
        call(*args)
    lender = shutil.copytree(pico_folder, tmp_path / "before")
    (tmp_path / "out").rename(tmp_path / "refused")
    assert call(*args, "--processor", lender).exit_code == 0
    assert call(pico_folder, *args[1:3], "--out", tmp_path / "whole").exit_code == 0
    answers = [
        [row["prediction"] for row in map(json.loads, (tmp_path / out / name).read_text().splitlines())]
        for out in ("out", "whole")
        for name in ["predictions/task-colour.jsonl"]
    ]
    assert answers[0] == answers[1] and len(answers[0]) == 4
    template = lender / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(RunError, match="lent"):
        call(*args, "--processor", lender)
    with pytest.raises(ConfigError, match="vLLM reads MODEL's own tokenizer"):
        call(*args, "--processor", lender, "--backend", "vllm")


@pytest.mark.parametrize("option", ["--processor", "--reference"])
def test_gate_asks_a_folder_without_a_processor_with_a_given_one(option, weights_alone, pico_folder, data):
    bounds = ["--safety", data / "unsafe.jsonl", "--max-asr", "100%", "--max-new-tokens", 2]
    args = ["gate", *map(str, (weights_alone, *bounds))]
    with pytest.raises(ModelError, match="--processor"):
        CliRunner().invoke(app, args, catch_exceptions=False)
    assert CliRunner().invoke(app, [*args, option, str(pico_folder)], catch_exceptions=False).exit_code == 0
