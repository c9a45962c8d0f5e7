"""`adapter_config.json`: one file in every process, for every loader, and what vLLM would leave out is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import save_file

import adapter_kit
from holdfast.checkpoints.adapter import LoraAdapter
from holdfast.checkpoints.adapter_config import (
    hub_id,
    is_decoder_module,
    known_base,
    max_lora_rank,
    serving_notes,
    settle_adapter_config,
    squared_update,
    what_vllm_drops,
)


@pytest.mark.parametrize(
    "source, found",
    [
        ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf"),
        (
            "/root/.cache/huggingface/hub/models--Qwen--Qwen2.5-VL-7B-Instruct/snapshots/abc",
            "Qwen/Qwen2.5-VL-7B-Instruct",
        ),
        ("/data/models/llava", None),
        ("./models/llava", None),
        ("~/llava", None),
        ("models\\llava", None),
        ("llava", None),
        ("a/b/c", None),
        ("", None),
        (None, None),
    ],
)
def test_a_hub_id_is_told_from_a_place(source, found):
    assert hub_id(source) == found


def test_a_hub_id_wins_over_a_place(tmp_path):
    assert known_base(str(tmp_path), "a/model") == "a/model"
    assert known_base("a/model", str(tmp_path)) == "a/model"
    assert known_base(str(tmp_path), None) == str(tmp_path) and known_base(None) is None


def test_lists_are_sorted_and_a_pattern_becomes_the_modules(pico_folder, tmp_path):
    adapter = adapter_kit.train(pico_folder, tmp_path / "a", target_modules=r".*language_model.*\.(q|v)_proj")
    before = adapter_kit.stock_logits(pico_folder, adapter)
    config = settle_adapter_config(adapter, base=str(pico_folder), base_config={})
    assert config == json.loads((adapter / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(LoraAdapter(adapter).modules) and len(config["target_modules"]) == 4
    assert torch.equal(adapter_kit.stock_logits(pico_folder, adapter), before)
    assert settle_adapter_config(adapter) == config


MAKE = """
import sys, torch
from pathlib import Path
from holdfast.tuners.cram.folder import save_expert

def make(out, base):
    names = [f"model.language_model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkvo"]
    shapes = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32)}
    g = torch.Generator().manual_seed(0)
    pair = lambda rows, width: (torch.randn(2, width, generator=g), torch.randn(rows, 2, generator=g))
    config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    save_expert(Path(out), {n: pair(*shapes[n[-6]]) for n in names}, base=base, base_config=config)
"""


def test_experts_are_one_file_in_every_process_and_load_by_their_folder_alone(pico_folder, tmp_path):
    here: dict = {}
    exec(compile(MAKE, "make", "exec"), here)  # noqa: S102 (the same lines as in the other process)
    here["make"](tmp_path / "one", str(pico_folder))
    # Sets come in another order there.
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)}
    code = f"{MAKE}\nmake(sys.argv[1], sys.argv[2])"
    command = [sys.executable, "-c", code, str(tmp_path / "two"), str(pico_folder)]
    subprocess.run(command, check=True, env=environment)
    one, two = ((tmp_path / name / "adapter_config.json").read_bytes() for name in ("one", "two"))
    assert one == two
    from peft import AutoPeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoPeftModel.from_pretrained(tmp_path / "one")
    assert type(model.base_model.model).__name__ == "LlavaForConditionalGeneration"
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 8


def test_what_vllm_leaves_out_is_said_with_its_share(pico_folder, tmp_path):
    adapter_folder = adapter_kit.train(pico_folder, tmp_path / "a", target_modules=["q_proj", "linear_1"])
    adapter = LoraAdapter(adapter_folder)
    (sentence,) = what_vllm_drops(adapter)
    outside = [name for name in adapter.modules if not is_decoder_module(name)]
    assert "model.multi_modal_projector.linear_1" in outside and any("vision_tower" in name for name in outside)
    sizes = {}
    for name in adapter.modules:
        a, b = adapter.read_factors(name)
        sizes[name] = float(((adapter.modules[name].scaling * b @ a) ** 2).sum())
        assert squared_update(adapter, name) == pytest.approx(sizes[name], rel=1e-5)
    share = sum(sizes[name] for name in outside) / sum(sizes.values())
    assert f"{len(outside)} of {len(adapter.modules)} modules" in sentence and f"{share:.1%}" in sentence
    notes = serving_notes(adapter_folder)
    assert "within vLLM's default --max-lora-rank 16" in notes[0] and "--export dense" in notes[-1]
    name = next(n for n in adapter.modules if is_decoder_module(n))
    scale = {name: torch.full((adapter.modules[name].shape[1],), 0.75)}
    save_file(scale, adapter_folder / "holdfast_input_scale.safetensors")
    assert any(
        "do not read; they scale input columns of the base by up to 0.25 away" in n
        for n in serving_notes(adapter_folder)
    )


@pytest.mark.parametrize("rank, room", [(1, 1), (4, 8), (16, 16), (17, 32), (128, 128), (512, 512), (513, None)])
def test_the_room_that_a_rank_needs(rank, room):
    assert max_lora_rank(rank) == room


@pytest.mark.parametrize(
    "name, inside",
    [
        ("model.language_model.layers.0.self_attn.q_proj", True),
        ("language_model.model.layers.3.mlp.up_proj", True),
        ("model.layers.11.mlp.gate_proj", True),
        ("model.text_model.layers.0.self_attn.q_proj", True),
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj", False),
        ("model.vision_tower.vision_model.encoder.layers.0.mlp.fc1", False),
        ("model.visual.blocks.0.attn.qkv", False),
        ("model.multi_modal_projector.linear_1", False),
        ("model.connector.modality_projection.proj", False),
        ("model.vision_model.encoder.layers.0.self_attn.q_proj", False),
    ],
)
def test_the_text_decoder_is_told_from_the_tower(name, inside):
    assert is_decoder_module(name) is inside
