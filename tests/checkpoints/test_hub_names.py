"""What is written carries the names of released checkpoints; every loader of today reads them."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import model_zoo
from holdfast.checkpoints.cast import cast_checkpoint
from holdfast.checkpoints.hub_names import hub_name, hub_names, memory_name
from holdfast.errors import CheckpointError

_LLAVA = {"language_model.model.layers", "language_model.lm_head", "multi_modal_projector"}
# Beginnings of the tensor names in model.safetensors.index.json of the released checkpoints, digits and below cut off:
# llava-hf/llava-1.5-7b-hf, llava-v1.6-mistral-7b-hf, llava-onevision-qwen2-0.5b-ov-hf, Qwen/Qwen2-VL-2B-Instruct,
# Qwen2.5-VL-3B-Instruct, Qwen3-VL-4B-Instruct, OpenGVLab/InternVL3-1B-hf, HuggingFaceM4/Idefics3-8B-Llama3,
# google/gemma-3-4b-it, paligemma-3b-pt-224,
# mistralai/Mistral-Small-3.1-24B-Instruct-2503, zai-org/GLM-4.1V-9B-Thinking.
RELEASED = {
    "llava": {*_LLAVA, "vision_tower.vision_model"},
    "llava_next": {*_LLAVA, "vision_tower.vision_model", "image_newline"},
    "llava_onevision": {*_LLAVA, "vision_tower.vision_model", "image_newline"},
    "qwen2_vl": {"model.layers", "lm_head", "visual.blocks", "visual.merger", "visual.patch_embed"},
    "qwen2_5_vl": {"model.layers", "lm_head", "visual.blocks", "visual.merger", "visual.patch_embed"},
    "qwen3_vl": {"model.language_model.layers", "lm_head", "model.visual.blocks", "model.visual.merger"},
    "internvl": {*_LLAVA, "vision_tower.encoder.layer", "vision_tower.embeddings"},
    "idefics3": {"model.text_model.layers", "lm_head", "model.vision_model.encoder", "model.connector"},
    "gemma3": {*_LLAVA, "vision_tower.vision_model"},
    "paligemma": {*_LLAVA, "vision_tower.vision_model"},
    "mistral3": {*_LLAVA, "vision_tower.transformer", "vision_tower.patch_conv"},
    "glm4v": {"model.language_model.layers", "lm_head", "model.visual.blocks", "model.visual.merger"},
}


@pytest.mark.parametrize("family", sorted(model_zoo.BUILDERS))
def test_names_in_memory_and_names_of_transformers_5_become_released_ones(family, tmp_path):
    model, _ = model_zoo.BUILDERS[family]()
    config = json.loads(model.config.to_json_string())
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        saved = list(file.keys())
    for keys in (saved, list(model.state_dict())):
        names = set(hub_names(keys, config).values())
        for start in RELEASED[family]:
            assert any(name.startswith(start + ".") or name == start for name in names), (start, sorted(names)[:3])
        if "vision_tower.vision_model" in RELEASED[family]:
            assert not [n for n in names if n.startswith("vision_tower.") and not n.startswith("vision_tower.vision_m")]
        assert not [n for n in names if n.startswith("model.vision_tower") or n.startswith("model.multi_modal")]
        # There and back: what transformers has in memory.
        assert {memory_name(name, config) for name in names} >= set(model.state_dict()) - {"lm_head.weight"}
        # Released names stay: a second pass changes nothing.
        assert {name: name for name in names} == hub_names(sorted(names), config)


@pytest.mark.parametrize(
    ("kind", "name", "found"),
    [
        ("qwen2_vl", "model.visual.blocks.0.mlp.fc1", "model.visual.blocks.0.mlp.fc1"),
        ("qwen2_vl", "visual.blocks.0.mlp.fc1", "model.visual.blocks.0.mlp.fc1"),
        ("qwen2_5_vl", "model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"),
        ("llava", "language_model.lm_head", "lm_head"),
        ("llava", "vision_tower.vision_model.post_layernorm", "model.vision_tower.post_layernorm"),
        ("idefics3", "model.text_model.norm", "model.text_model.norm"),
    ],
)
def test_a_module_in_either_spelling_is_found_in_memory(kind, name, found):
    assert memory_name(name, {"model_type": kind}) == found


def test_a_cast_writes_released_names_that_load_as_before(pico_folder, tmp_path):
    from holdfast.models.load import load

    out = cast_checkpoint(pico_folder, tmp_path / "cast", torch.float32)
    written = load_file(out / "model.safetensors")
    assert any(k.startswith("vision_tower.vision_model.encoder.layers.0.") for k in written)
    before, after = load(pico_folder, device="cpu").model.state_dict(), load(out, device="cpu").model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_the_shipped_models_carry_released_names():
    from holdfast.tiny import model_path

    for kind in ("base", "aligned"):
        folder = model_path(kind)
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            keys = list(file.keys())
        assert hub_names(keys, json.loads((folder / "config.json").read_text())) == {k: k for k in keys}
        assert len([k for k in keys if re.match(r"vision_tower\.vision_model\.encoder\.layers\.\d", k)]) > 10


def test_one_tensor_in_two_spellings_is_refused():
    config = {"model_type": "llava", "vision_config": {"model_type": "clip_vision_model"}}
    twice = ["vision_tower.encoder.x", "vision_tower.vision_model.encoder.x"]
    with pytest.raises(CheckpointError, match="one tensor in two spellings"):
        hub_names(twice, config)
    assert hub_name("model.layers.0.x", {"model_type": "unheard-of"}) == "model.layers.0.x"
