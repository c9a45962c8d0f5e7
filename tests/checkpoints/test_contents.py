"""One answer for every verb to: what is in this folder?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_kit import close, edit_all, logits, stock_logits, train
from holdfast.calibration.curvature import model_identity
from holdfast.checkpoints.contents import kind_of, require_safe_adapter
from holdfast.checkpoints.merged import open_checkpoint
from holdfast.checkpoints.value import Checkpoint
from holdfast.editing.pair import open_pair
from holdfast.errors import AdapterError, CheckpointError
from holdfast.evaluation.identity import checkpoint_digests
from holdfast.models.load import load
from holdfast.models.streaming import load_streamed

PROJ = r".*language_model\.layers.*_proj"


@pytest.fixture(scope="module")
def adapter(pico_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(pico_folder, tmp_path_factory.mktemp("adapter") / "adapter", target_modules=PROJ)


@pytest.fixture
def copied(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "copy"))


@pytest.mark.parametrize(
    "full",
    ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "model-00001-of-00002.safetensors"],
)
def test_a_folder_of_two_models_is_refused_by_every_verb(full: str, pico_folder: Path, copied: Path) -> None:
    shutil.copy(pico_folder / "config.json", copied)
    shutil.copy(pico_folder / "model.safetensors", copied / full)
    both = str(copied)
    verbs = {
        "load": lambda: load(both, device="cpu"),
        "load, streamed": lambda: load_streamed(both, device="cpu"),
        "open": lambda: open_checkpoint(both),
        "edit, after": lambda: open_pair(pico_folder, both),
        "edit, before": lambda: open_pair(both, pico_folder),
        "evaluate": lambda: checkpoint_digests(Checkpoint(base=both)),
        "calibrate": lambda: model_identity(both),
        "kind": lambda: kind_of(both),
    }
    for action in verbs.values():
        with pytest.raises(CheckpointError, match=rf"{full}.*adapter_model\.safetensors"):
            action()


def test_an_adapter_is_no_full_model(adapter: Path) -> None:
    for action in (load, open_checkpoint, lambda folder: checkpoint_digests(Checkpoint(base=folder))):
        with pytest.raises(CheckpointError, match="is an adapter"):
            action(str(adapter))


def test_a_single_file_wins_over_a_stale_index_as_in_transformers(pico_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pico_folder, tmp_path / "stale"))
    tensors = load_file(folder / "model.safetensors")
    old = {key: torch.zeros_like(value) for key, value in tensors.items()}
    save_file(old, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(old, "model-00001-of-00001.safetensors")}
    for weight_map in (index["weight_map"], dict.fromkeys(old, "gone.safetensors")):
        (folder / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": weight_map}))
        with open_checkpoint(folder) as opened:
            assert all(torch.equal(opened.read(key), value) for key, value in tensors.items())
        assert close(logits(load(folder, device="cpu")), stock_logits(folder))


PICKLES = [
    "non_lora_trainables.bin",
    "non_lora_state_dict.bin",
    "mm_projector.bin",
    "new_embeddings.bin",
    "embeddings.pt",
    "vit.pth",
]


@pytest.mark.parametrize("name", PICKLES)
def test_pickled_weights_beside_an_adapter_are_named_by_every_verb(name: str, pico_folder: Path, copied: Path) -> None:
    torch.save({"x": torch.ones(2)}, copied / name)
    value = Checkpoint(base=str(pico_folder), adapters=(str(copied),))
    for action in (
        lambda: load(value, device="cpu"),
        lambda: open_checkpoint(value),
        lambda: open_pair(pico_folder, copied),
        lambda: checkpoint_digests(value),
    ):
        with pytest.raises(AdapterError, match=rf"{name} holds trained weights"):
            action()


def test_a_pickled_adapter_is_never_loaded(pico_folder: Path, copied: Path) -> None:
    torch.save(load_file(copied / "adapter_model.safetensors"), copied / "adapter_model.bin")
    (copied / "adapter_model.safetensors").unlink()
    value = Checkpoint(base=str(pico_folder), adapters=(str(copied),))
    for action in (lambda: load(value, device="cpu"), lambda: checkpoint_digests(value)):
        with pytest.raises(AdapterError, match="pickled and never loaded"):
            action()


def test_a_trainers_state_is_no_part_of_the_model(copied: Path) -> None:
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "scaler.pt"):
        (copied / name).write_bytes(b"x")
    assert require_safe_adapter(copied) == ()


@pytest.mark.parametrize("name", ["vit.safetensors", "non_lora_trainables.safetensors"])
def test_safe_weights_beside_an_adapter_are_part_of_the_model(
    name: str, pico_folder: Path, copied: Path, tmp_path: Path
) -> None:
    key = "model.multi_modal_projector.linear_1.weight"
    tuned = load(pico_folder, device="cpu").model.get_parameter(key).detach() + 0.5
    save_file({f"base_model.model.{key}": tuned}, copied / name, metadata={"format": "pt"})
    torch.save({}, copied / "non_lora_trainables.bin") if name.startswith("non") else None
    value = Checkpoint(base=str(pico_folder), adapters=(str(copied),))
    assert torch.equal(load(value, device="cpu").model.get_parameter(key), tuned)
    report = edit_all(pico_folder, copied, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out", device="cpu").model.get_parameter(key), tuned)
    assert any("multi_modal_projector" in warning for warning in report.warnings)


def test_safe_weights_of_another_model_are_named(pico_folder: Path, copied: Path) -> None:
    save_file({"input_embeddings": torch.ones(3, 4)}, copied / "new_embeddings.safetensors")
    value = Checkpoint(base=str(pico_folder), adapters=(str(copied),))
    for action in (lambda: load(value, device="cpu"), lambda: open_checkpoint(value)):
        with pytest.raises(AdapterError, match=r"new_embeddings\.safetensors.*input_embeddings"):
            action()


SPELLINGS = {
    "adapter's name": lambda key: key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
    "FSDP": lambda key: key.replace(".layers.0.", ".layers.0._fsdp_wrapped_module."),
    "activation checkpointing": lambda key: key.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
    "torch.compile": lambda key: f"_orig_mod.{key}",
    "data parallelism": lambda key: f"module.{key}",
    "all": lambda key: (
        f"module._orig_mod.{key.replace('.mlp.', '._fsdp_wrapped_module._checkpoint_wrapped_module.mlp.')}"
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_adapter_saved_from_within_a_wrapper_is_the_same_adapter(
    spelling: str, pico_folder: Path, adapter: Path, copied: Path
) -> None:
    weights = copied / "adapter_model.safetensors"
    renamed = {SPELLINGS[spelling](key): value for key, value in load_file(weights).items()}
    save_file(renamed, weights, metadata={"format": "pt"})
    expected = load(Checkpoint(base=str(pico_folder), adapters=(str(adapter),)), device="cpu")
    found = load(Checkpoint(base=str(pico_folder), adapters=(str(copied),)), device="cpu")
    assert torch.equal(logits(found), logits(expected))
