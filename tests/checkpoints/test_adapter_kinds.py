"""Adapters that are no plain LoRA on linear layers: every road gives what PEFT merges, or says what to do."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapter_kit import close, edit_all, stock_logits
from holdfast.checkpoints.adapter import LoraAdapter
from holdfast.checkpoints.merged import open_checkpoint
from holdfast.checkpoints.support import ADAPTER_KINDS
from holdfast.checkpoints.value import Checkpoint
from holdfast.editing.editor import edit_checkpoint
from holdfast.errors import AdapterError
from holdfast.models.load import load
from holdfast.rules.interpolation import InterpolationOptions, InterpolationRule

PROJ = r".*language_model\.layers.*_proj"
CONV = r"patch_embedding"

KINDS = {
    "DoRA": {"target_modules": PROJ, "use_dora": True},
    "DoRA with rsLoRA and ranks": {
        "target_modules": PROJ,
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
    },
    "embedding": {"target_modules": rf"({PROJ})|.*embed_tokens"},
    "embedding, DoRA": {"target_modules": rf"({PROJ})|.*embed_tokens", "use_dora": True},
    "head": {"target_modules": rf"({PROJ})|lm_head"},
    "embedding and head": {"target_modules": rf"({PROJ})|.*embed_tokens|lm_head"},
    "convolution": {"target_modules": rf"({PROJ})|.*{CONV}"},
    "convolution, DoRA": {"target_modules": rf".*{CONV}", "use_dora": True},
    "trainable tokens": {"target_modules": PROJ, "trainable_token_indices": [20, 25]},
    "trainable tokens by module": {"target_modules": PROJ, "trainable_token_indices": {"embed_tokens": [21]}},
}


def train(base: Path, out: Path, *, start: Path | None = None, **options) -> dict[str, torch.Tensor]:
    """A random adapter, saved by PEFT as it is and never converted; the weights that PEFT merges it to.

    start: where the factors that training begins with are saved, as PEFT's guide to PiSSA does.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
        wrapped = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **options}))
        if start is not None:
            wrapped.peft_config["default"].init_lora_weights = True
            wrapped.save_pretrained(start)
            wrapped.peft_config["default"].init_lora_weights = options["init_lora_weights"]
        generator = torch.Generator().manual_seed(5)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "trainable_tokens" in name:
                parameter.data = parameter.data + torch.randn(parameter.shape, generator=generator) * 0.1
        wrapped.save_pretrained(out)
        return {key: value.detach().clone() for key, value in wrapped.merge_and_unload().state_dict().items()}


def check(value: Checkpoint, expected: dict[str, torch.Tensor]) -> int:
    """Hold `load` and the streaming reader to PEFT's weights; how many differ from the base."""
    found = load(value, device="cpu", dtype=torch.float32).model.state_dict()
    assert set(found) == set(expected)
    changed = 0
    with open_checkpoint(value) as opened, open_checkpoint(value.base) as base:
        for key, weight in expected.items():
            torch.testing.assert_close(found[key], weight, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
            stored = opened.names.find(key)
            if stored is not None:
                torch.testing.assert_close(opened.read(stored), weight, rtol=1e-4, atol=1e-5)
                changed += not torch.equal(opened.read(stored), base.read(base.names.require(key)))
    return changed


@pytest.mark.parametrize("kind", KINDS)
def test_every_road_gives_the_weights_of_peft(kind: str, pico_folder: Path, tmp_path: Path) -> None:
    expected = train(pico_folder, tmp_path / "adapter", **KINDS[kind])
    value = Checkpoint(base=str(pico_folder), adapters=(str(tmp_path / "adapter"),))
    assert check(value, expected) >= 1


@pytest.mark.parametrize("kind", ["DoRA", "embedding, DoRA", "trainable tokens"])
def test_a_dense_edit_that_keeps_everything_is_the_tuned_model(kind: str, pico_folder: Path, tmp_path: Path) -> None:
    train(pico_folder, tmp_path / "adapter", **KINDS[kind])
    report = edit_all(pico_folder, tmp_path / "adapter", tmp_path / "out")
    assert close(stock_logits(tmp_path / "out"), stock_logits(pico_folder, tmp_path / "adapter"))
    assert len(report.layers) == 14
    assert report.verification["after_differs_from_peft_by"] < 1e-4


def edit_as_adapter(before: Path, adapter: Path, out: Path):
    rule = InterpolationRule(InterpolationOptions(factor=1.0))
    return edit_checkpoint(before, adapter, rule=rule, out=out, export="adapter", coefficient="drop")


def test_an_adapter_export_needs_factors_to_edit_and_carries_the_rest(pico_folder: Path, tmp_path: Path) -> None:
    train(pico_folder, tmp_path / "dora", **KINDS["DoRA"])
    with pytest.raises(AdapterError, match=r"DoRA or like it.*export dense"):
        edit_as_adapter(pico_folder, tmp_path / "dora", tmp_path / "out")
    train(pico_folder, tmp_path / "both", **KINDS["embedding and head"])
    report = edit_as_adapter(pico_folder, tmp_path / "both", tmp_path / "out")
    assert close(stock_logits(pico_folder, tmp_path / "out"), stock_logits(pico_folder, tmp_path / "both"))
    assert report.verification["active_modules"] == report.verification["nonzero_modules"] == 16


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("place", ["inside", "beside"])
def test_a_start_that_was_taken_out_of_the_base_is_taken_off_again(
    init: str, place: str, pico_folder: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "run" / "adapter"
    start = (adapter if place == "inside" else adapter.parent) / f"{init}_init"
    expected = train(pico_folder, adapter, start=start, target_modules=PROJ, init_lora_weights=init)
    value = Checkpoint(base=str(pico_folder), adapters=(str(adapter),))
    assert check(value, expected) == 14
    if init == "pissa" and place == "inside":
        edit_all(pico_folder, adapter, tmp_path / "out")
        found = load(tmp_path / "out", device="cpu", dtype=torch.float32).model.state_dict()
        assert all(torch.allclose(found[key], weight, atol=1e-5) for key, weight in expected.items())
        with pytest.raises(AdapterError, match=r"with its initial adapter only.*export dense"):
            edit_as_adapter(pico_folder, adapter, tmp_path / "no")


def test_without_its_start_or_with_anothers_it_is_refused(pico_folder: Path, tmp_path: Path) -> None:
    adapter, start = tmp_path / "run" / "adapter", tmp_path / "run" / "pissa_init"
    train(pico_folder, adapter, start=start, target_modules=PROJ, init_lora_weights="pissa")
    value = Checkpoint(base=str(pico_folder), adapters=(str(adapter),))
    shutil.copytree(start, tmp_path / "run" / "old_init")
    with pytest.raises(AdapterError, match="any of old_init, pissa_init"):
        open_checkpoint(value)
    shutil.rmtree(tmp_path / "run" / "old_init")
    train(pico_folder, start, target_modules=r".*q_proj")
    with pytest.raises(AdapterError, match=r"is not what .* began with"):
        open_checkpoint(value)
    shutil.rmtree(start)
    with pytest.raises(AdapterError, match=r"changes the base weights in memory.*initial adapter.*pissa_init"):
        open_checkpoint(value)


@pytest.mark.parametrize("init", ["loftq", "pissa", "corda", "lora_ga", "OLoRA"])
def test_a_changed_base_is_refused_by_the_name_of_its_initialisation(init: str, pico_folder, tmp_path) -> None:
    train(pico_folder, tmp_path / "a" / "adapter", target_modules=PROJ)
    path = tmp_path / "a" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": init}))
    with pytest.raises(AdapterError, match=f"initialised with '{init}'"):
        LoraAdapter(path.parent)


def test_nan_in_any_part_is_found(pico_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    train(pico_folder, tmp_path / "adapter", **KINDS["DoRA"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "magnitude" in key)
    tensors[key][0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(AdapterError, match="NaN or inf"):
        load(Checkpoint(base=str(pico_folder), adapters=(str(tmp_path / "adapter"),)), device="cpu")


def test_the_table_says_a_verdict_and_a_sentence_of_each_kind() -> None:
    assert len({kind.key for kind in ADAPTER_KINDS}) == len(ADAPTER_KINDS)
    for kind in ADAPTER_KINDS:
        assert kind.verdict in ("read", "merged densely", "refused")
        assert kind.name
        assert kind.sentence.endswith((".", ")"))
