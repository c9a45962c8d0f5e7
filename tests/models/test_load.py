"""What loads, in which dtype, and what is refused in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from holdfast.data.types import Sample
from holdfast.errors import AdapterError, ConfigError, ModelError
from holdfast.models import precision
from holdfast.models.encode import encode_request
from holdfast.models.families import editable_linears
from holdfast.models.load import load
from holdfast.models.loaded import LoadedModel
from holdfast.stream.protocol import Checkpoint


@pytest.fixture
def copied(llava_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llava_folder, tmp_path / "copy"))


def adapter(folder: Path, out: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    wrapped = get_peft_model(
        load(folder, device="cpu", trainable=True).model,
        LoraConfig(r=2, lora_alpha=4, target_modules=r".*language_model.*_proj", init_lora_weights=False),
    )
    wrapped.save_pretrained(out)
    return out


def test_parameters_are_frozen_unless_trainable(llava_folder: Path) -> None:
    assert not any(p.requires_grad for p in load(llava_folder, device="cpu").model.parameters())
    assert all(p.requires_grad for p in load(llava_folder, device="cpu", trainable=True).model.parameters())


def test_fp16_weights_become_fp32_on_a_cpu(copied: Path) -> None:
    weights = copied / "model.safetensors"
    save_file({k: v.half() for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    assert load(copied, device="cpu").dtype == torch.float32
    assert load(copied, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    assert load(copied, device="cpu", dtype=torch.float32).dtype == torch.float32


def test_adapters_are_merged_and_names_stay(
    llava_folder: Path, loaded: LoadedModel, samples: list[Sample], tmp_path: Path
) -> None:
    one, two = adapter(llava_folder, tmp_path / "one"), adapter(llava_folder, tmp_path / "two", seed=1)
    both = load(Checkpoint(base=str(llava_folder), adapters=(str(one), str(two))), device="cpu")
    assert list(editable_linears(both.model)) == list(editable_linears(loaded.model))
    name = "model.language_model.layers.0.mlp.up_proj"
    expected = loaded.model.get_submodule(name).weight.double()
    for folder in (one, two):
        factors = load_file(folder / "adapter_model.safetensors")
        a, b = (factors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
        expected = expected + 2.0 * b @ a
    torch.testing.assert_close(both.model.get_submodule(name).weight.double(), expected, rtol=1e-5, atol=1e-5)
    inputs = encode_request(loaded, samples[:2])
    assert (both.model(**inputs).logits - loaded.model(**inputs).logits).abs().max() > 1e-3


def test_a_missing_folder_and_an_unknown_hub_id_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither a model folder nor a hub id"):
        load("nobody/no-such-model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load(tmp_path / "empty")


def test_a_language_model_without_vision_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match="'llama' model without a vision tower"):
        load(tmp_path)


def test_code_from_a_checkpoint_is_never_run(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config.update(model_type="custom", auto_map={"AutoConfig": "custom.Config"})
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "custom.py").write_text("raise SystemExit('this code ran')")
    with pytest.raises(ModelError, match="without running code from the checkpoint"):
        load(copied)


def test_a_processor_without_chat_template_is_refused(copied: Path) -> None:
    (copied / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        load(copied)


def test_a_folder_without_processor_is_refused(copied: Path) -> None:
    for file in [*copied.glob("*process*"), *copied.glob("token*")]:
        file.unlink()
    with pytest.raises(ModelError, match=r"processor (cannot be loaded|.* no image processor)|no image processor"):
        load(copied)


def test_missing_and_truncated_weights_are_refused(copied: Path) -> None:
    weights = copied / "model.safetensors"
    kept = load_file(weights)
    kept.pop("language_model.model.layers.1.mlp.up_proj.weight", None)
    kept.pop("model.language_model.layers.1.mlp.up_proj.weight", None)
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lacks 1 tensor\(s\), model\.language_model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        load(copied)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="the weights cannot be loaded"):
        load(copied)
    weights.unlink()
    with pytest.raises(ModelError, match="the weights cannot be loaded"):
        load(copied)


def test_weights_of_another_shape_are_refused(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 64
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"is \(.*\) on disk and \(.*\) by config\.json|cannot be loaded"):
        load(copied)


def test_adapters_that_do_not_fit_are_refused(llava_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        load(Checkpoint(base=str(llava_folder), adapters=(str(tmp_path),)))
    folder = adapter(llava_folder, tmp_path / "lora")
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({k.replace("up_proj", "upward"): v for k, v in tensors.items()}, weights)
    with pytest.raises(AdapterError, match=r"no tensor for .*upward"):
        load(Checkpoint(base=str(llava_folder), adapters=(str(folder),)))
    save_file({k: v[..., :16].contiguous() if "lora_A" in k else v for k, v in tensors.items()}, weights)
    with pytest.raises(AdapterError, match="trained on another model"):
        load(Checkpoint(base=str(llava_folder), adapters=(str(folder),)))


def test_an_adapter_with_missing_tensors_is_refused(llava_folder: Path, tmp_path: Path) -> None:
    folder = adapter(llava_folder, tmp_path / "lora")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.popitem()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"missing|lacks|lora_[AB]"):
        load(Checkpoint(base=str(llava_folder), adapters=(str(folder),)))


def test_a_device_that_is_not_there_is_named(llava_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"device is 'xpu:7'; expected one of this machine: cpu"):
        load(llava_folder, device="xpu:7")


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_bf16_checkpoint_is_widened_where_the_cpu_would_emulate_it(monkeypatch, llava_folder, tmp_path, has_bf16):
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from holdfast.models.load import load
    from holdfast.models.streaming import load_streamed

    model = AutoModelForImageTextToText.from_pretrained(llava_folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(llava_folder, backend="pil").save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bf16}, raising=False)
    usual = torch.bfloat16 if has_bf16 else torch.float32
    assert load(tmp_path, device="cpu").dtype is load_streamed(tmp_path, device="cpu").dtype is usual
    assert load(tmp_path, device="cpu", dtype="bfloat16").dtype is torch.bfloat16


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_where_fp32_does_not_fit_blocks_are_widened_while_they_run(
    stored: str, monkeypatch, llava_folder: Path, samples, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from holdfast.calibration.curvature import CalibrationConfig, collect_curvature, open_model
    from holdfast.models.generate import generate

    dtype = getattr(torch, stored)
    AutoModelForImageTextToText.from_pretrained(llava_folder, dtype=dtype).save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(llava_folder, backend="pil").save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False}, raising=False)
    whole = load(tmp_path, device="cpu")
    assert {p.dtype for p in whole.model.parameters()} == {torch.float32}
    elements = sum(p.numel() for p in whole.model.parameters())
    monkeypatch.setattr(precision, "usable_bytes", lambda device: 3 * elements)
    narrow = load(tmp_path, device="cpu")
    assert narrow.dtype is torch.float32  # what inputs are cast to
    answers = [generate(model, samples, max_new_tokens=3, batch_size=4) for model in (whole, narrow)]
    assert answers[0] == answers[1]
    ids = torch.arange(20, 30)[None]
    assert torch.equal(whole.model(input_ids=ids).logits, narrow.model(input_ids=ids).logits)
    layers = narrow.model.model.language_model.layers
    assert {p.dtype for p in layers.parameters()} == {dtype}
    assert {p.dtype for p in narrow.model.parameters()} == {dtype, torch.float32}
    # An error within a block leaves its weights as they are stored.
    with pytest.raises(AttributeError):
        layers[0]("no tensor")
    assert {p.dtype for p in layers[0].parameters()} == {dtype}
    config = CalibrationConfig(damping=0.1)
    wide, thin = (collect_curvature(m, m, samples, samples, config=config) for m in (whole, narrow))
    assert all(torch.equal(wide.safety[name], thin.safety[name]) for name in wide.safety)
    monkeypatch.setattr("holdfast.calibration.curvature.usable_bytes", lambda device: 3 * elements)
    assert open_model(tmp_path, device="cpu").blocks_on_disk is None
    assert {p.dtype for p in load(tmp_path, device="cpu", dtype="float32").model.parameters()} == {torch.float32}


def test_one_process_uses_one_device_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    precision._say_one_device.cache_clear()
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))
    for count, said in ((1, 0), (4, 1), (4, 1)):
        monkeypatch.setattr("torch.accelerator.device_count", lambda n=count: n)
        assert precision.default_device() == torch.device("cuda")
        assert caplog.text.count("devices are in sight; this process uses one of them") == said
    precision._say_one_device.cache_clear()
    monkeypatch.setenv("WORLD_SIZE", "4")
    precision.default_device()
    assert caplog.text.count("in sight") == 1
