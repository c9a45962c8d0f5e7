"""Adapters and checkpoints that somebody spoiled, by accident or not: refused in a sentence, at once."""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import hostile_kit as kit
from holdfast.checkpoints import patterns, tensor_file
from holdfast.checkpoints.adapter import LoraAdapter
from holdfast.checkpoints.sizes import require_plausible_sizes
from holdfast.checkpoints.tensor_file import TensorFile
from holdfast.errors import AdapterError, CheckpointError, ModelError, nearest

NAMES = [f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(3)]


def adapter(folder: Path, raw: str | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tensors = {}
    for name in NAMES:
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(2, 8)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(6, 2)
    save_file(tensors, folder / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(raw or json.dumps({**plain, **config}))
    return folder


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "MATCH_SECONDS", 0.1)


BOMBS = (kit.BOMB, r"(\w+\.?)+!", r"(.*)*(.*)*!", r"(?:(?:[a-z_]+|\d+)+\.?)+!", "(" + ".*" * 30 + "!)")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_pattern_that_never_ends_is_stopped_in_every_field(tmp_path: Path, hurried: None, bomb: str) -> None:
    fields: dict[str, Any] = {"target_modules": bomb, "exclude_modules": bomb, "layers_pattern": [f"({bomb})"]}
    fields |= {"rank_pattern": {bomb: 2}, "alpha_pattern": {bomb: 2}}
    for field, value in fields.items():
        with pytest.raises(AdapterError, match=r"adapter_config\.json: .*does not end within 0.1 s"):
            LoraAdapter(adapter(tmp_path / "a", **{field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("modules_to_save", [kit.BOMB]),
        ("feedforward_modules", kit.BOMB),  # IA3
        ("n_frequency_pattern", {kit.BOMB: 2}),  # FourierFT
        ("block_size_pattern", {kit.BOMB: 2}),  # C3A
        ("some_later_modules", [kit.BOMB]),
    ],
)
def test_the_patterns_of_other_kinds_are_stopped_before_peft_sees_them(hurried: None, field: str, value: Any) -> None:
    names = ["model.language_model.layers.0.self_attn.q_proj", "model.language_model.layers.1.mlp.up_proj"]
    with pytest.raises(AdapterError, match=r"here: .*does not end within 0.1 s"):
        patterns.try_patterns({"peft_type": "IA3", field: value}, names, where="here")
    patterns.try_patterns(
        {"modules_to_save": ["lm_head", "model.embed-tokens"], "target_modules": ["("]}, names, where=""
    )


@pytest.mark.timeout(60)
def test_a_thread_that_no_signal_reaches_is_not_held_up_either(tmp_path: Path, hurried: None) -> None:
    ended: list[str] = []

    def work() -> None:
        for number, bomb in enumerate(BOMBS):
            with contextlib.suppress(AdapterError):
                LoraAdapter(adapter(tmp_path / str(number), rank_pattern={bomb: 2})).close()
            ended.append(bomb)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(40)
    assert len(ended) == len(BOMBS)


def test_ordinary_patterns_mean_what_peft_means(tmp_path: Path) -> None:
    own = {"rank_pattern": {r"layers\.[12]\.self_attn\.q_proj": 2, "q_proj": 2}, "alpha_pattern": {r"1\..*": 16}}
    opened = LoraAdapter(adapter(tmp_path / "a", target_modules=r"^(model.*(?=\.).*\.(q_proj|k_proj))$", **own))
    assert [opened.modules[name].scaling for name in NAMES] == [2.0, 8.0, 2.0]


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": 1e300},
        {"lora_alpha": -1},
        {"lora_alpha": True},
        {"lora_alpha": "4"},
        {"lora_alpha": [4]},
        {"lora_alpha": float("nan")},
        {"r": -2},
        {"r": 0},
        {"r": 2.0},
        {"r": None},
        {"r": 10**9},
        {"rank_pattern": {"q_proj": -1}},
        {"rank_pattern": {"(": 2}},
        {"rank_pattern": {"(" * 3000 + "a" + ")*" * 3000: 2}},
        {"rank_pattern": {"a{99999999999999999999}": 2}},
        {"rank_pattern": {"x" * 200_000: 2}},
        {"alpha_pattern": [1]},
        {"alpha_pattern": "q_proj"},
        {"target_modules": 5},
        {"target_modules": "("},
        {"exclude_modules": {"a": 1}},
        {"layers_pattern": 3},
        {"modules_to_save": 5},
        {"modules_to_save": [5]},
        {"modules_to_save": "embed_tokens"},
        {"peft_type": ["LORA"]},
    ],
    ids=lambda config: repr(config)[:40],
)
def test_a_value_that_means_nothing_is_refused_by_name(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(AdapterError, match=next(iter(config)) if "peft_type" not in config else "LORA"):
        LoraAdapter(adapter(tmp_path / "a", **config))


@pytest.mark.parametrize(
    "raw",
    [
        kit.DEEP,
        "[]",
        "",
        '{"peft_type": "LORA", "r": 2, "r": 4, "lora_alpha": 4}',
        f'{{"peft_type": "LORA", "r": 2, "lora_alpha": {kit.DIGITS}}}',
        f'{{"peft_type": "LORA", "r": 2, "lora_alpha": {"9" * 400}}}',
        f'{{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": {kit.SURROGATE}}}',
        '{"peft_type": "LORA", "r": 1e400, "lora_alpha": 4}',
    ],
    ids=range(8),
)
def test_a_configuration_that_cannot_be_read_is_refused(tmp_path: Path, raw: str) -> None:
    folder = adapter(tmp_path / "a")
    (folder / "adapter_config.json").write_text(raw)
    with pytest.raises(AdapterError, match="adapter_config"):
        LoraAdapter(folder)


HEADERS = {
    name.removeprefix("base/model.safetensors: "): spoil
    for name, (_, spoil) in kit.spoiled().items()
    if name.startswith("base/model.safetensors: ")
}


def read_first(path: Path) -> None:
    """An element type that nobody knows stops only who reads it; so does nothing in the way of a strange name."""
    opened = TensorFile(path)
    if kit.ESC in opened.entries:
        raise CheckpointError(f"{path} is in order")
    opened.read(next(iter(opened.entries.values())))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", sorted(set(HEADERS) - {"empty"}))
def test_every_damaged_header_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "MAX_TENSORS", 1000)
    (tmp_path / "base").mkdir()
    HEADERS[name](tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as found:
        read_first(tmp_path / "base" / "model.safetensors")
    assert len(str(found.value)) < 1000


def test_tensors_without_values_may_share_a_place(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(0), "b": torch.ones(3), "c": torch.zeros(0, 4)}, tmp_path / "x.safetensors")
    assert set(TensorFile(tmp_path / "x.safetensors").entries) == {"a", "b", "c"}


@pytest.mark.parametrize(
    "part, changes, said",
    [
        ("text_config", {"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, and the weights beside it are 6"),
        ("vision_config", {"num_hidden_layers": 7}, "vision_config.num_hidden_layers is 7"),
        ("vision_config", {"depth": 10**7}, "depth is 10000000"),
        ("vision_config", {"image_size": 10**7, "patch_size": 14}, "image_size 10000000 in patches of 14"),
        ("text_config", {"vocab_size": 2**62}, "vocab_size"),
        ("text_config", {"max_position_embeddings": -(10**15)}, "max_position_embeddings"),
    ],
)
def test_a_configuration_that_cannot_be_of_these_weights_is_refused_before_it_is_built(
    tmp_path: Path, part: str, changes: dict[str, int], said: str
) -> None:
    folder = adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "model.safetensors")
    text = {"num_hidden_layers": 3, "vocab_size": 50, "max_window_layers": 80}
    fine = {"text_config": text, "vision_config": {"image_size": 336}}
    require_plausible_sizes(fine, folder)
    with pytest.raises(ModelError, match=said):
        require_plausible_sizes({**fine, part: {**fine[part], **changes}}, folder)


def test_the_nearest_of_very_many_names_is_found_at_once() -> None:
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(300_000)]
    assert nearest("model.layers.7.self_attn.q_proj.weigth", names) is not None
    assert nearest("nothing like it", names) is None
