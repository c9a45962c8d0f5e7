"""A run's model is handed on as it was read, and let go where it is not, or where its memory is wanted."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.checkpoints.value import Checkpoint
from holdfast.models import held
from holdfast.models import load as loading


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The bases that were read from disk, within a `holding` of the test's own."""
    found: list[str] = []
    original = loading.AutoModelForImageTextToText.from_pretrained

    def reading(base: str, **options: Any) -> Any:
        found.append(str(base))
        return original(base, **options)

    monkeypatch.setattr(loading.AutoModelForImageTextToText, "from_pretrained", reading)
    with held.holding():
        yield found


@pytest.fixture(scope="module")
def adapter(pico_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LoRA with factors that are not zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model: Any = loading.load(pico_folder, device="cpu").model
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    folder = tmp_path_factory.mktemp("held") / "lora"
    get_peft_model(model, config).save_pretrained(str(folder))
    return str(folder)


def tensors(loaded: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_one_checkpoint_is_read_once_and_its_adapter_is_merged_on_top(
    reads: list[str], pico_folder: Path, adapter: str
) -> None:
    plain = held.load(pico_folder, device="cpu")
    assert held.load(str(pico_folder), device="cpu").model is plain.model and len(reads) == 1
    before = tensors(plain)
    value = Checkpoint(base=str(pico_folder), adapters=(adapter,))
    whole = held.load(value, device="cpu")  # `plain` is still somebody's
    assert len(reads) == 2 and same(tensors(plain), before) and whole.model is not plain.model
    del plain, whole
    held.load(pico_folder, device="cpu")
    merged = held.load(value, device="cpu")
    assert len(reads) == 3 and merged.source == value and merged.name == str(value)
    assert same(tensors(merged), tensors(loading.load(value, device="cpu")))
    assert held.held(pico_folder, device="cpu") is None  # the merged one is nobody else's


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.get_input_embeddings().weight.add_(1.0),
        lambda model: model.requires_grad_(True),
        lambda model: model.train(),
        lambda model: model.register_forward_hook(lambda *_: None),
        lambda model: model.add_module("more", torch.nn.Linear(1, 1)),
        lambda model: model.set_attn_implementation("eager"),
        lambda model: setattr(model.generation_config, "eos_token_id", 1),
        lambda model: model.half(),
    ],
)
def test_a_model_that_was_changed_is_not_handed_on(reads: list[str], pico_folder: Path, change: Any) -> None:
    with torch.no_grad():
        change(held.load(pico_folder, device="cpu").model)
    assert held.load(pico_folder, device="cpu").model.dtype == torch.float32 and len(reads) == 2


def test_another_checkpoint_dtype_or_file_is_read(reads: list[str], tmp_path: Path, pico_folder: Path) -> None:
    import shutil

    folder = shutil.copytree(pico_folder, tmp_path / "model")
    held.load(folder, device="cpu")
    held.load(folder, device="cpu", dtype="float32")
    assert len(reads) == 1  # what no dtype comes to
    held.load(folder, device="cpu", dtype="bfloat16")
    held.load(folder, device="cpu")
    assert len(reads) == 3
    (folder / "model.safetensors").touch()
    held.load(folder, device="cpu")
    held.load(pico_folder, device="cpu")
    assert len(reads) == 5


def test_what_else_is_loaded_takes_its_place(reads: list[str], pico_folder: Path) -> None:
    kept = weakref.ref(held.load(pico_folder, device="cpu").model)
    assert kept() is not None
    loading.load(pico_folder, device="cpu")
    gc.collect()
    assert kept() is None


def test_the_cache_setting_of_the_checkpoint_comes_back(reads: list[str], pico_folder: Path) -> None:
    loaded = held.load(pico_folder, device="cpu")
    config: Any = loaded.model.config
    usual = [getattr(c, "use_cache", None) for c in (config, config.text_config)]
    config.use_cache, config.text_config.use_cache = True, False
    held.load(pico_folder, device="cpu")
    assert [getattr(c, "use_cache", None) for c in (config, config.text_config)] == usual and len(reads) == 1


def test_what_a_forward_pass_noted_is_forgotten(reads: list[str], pico_folder: Path) -> None:
    model: Any = held.load(pico_folder, device="cpu").model
    model.model.rope_deltas = torch.ones(1)
    assert held.load(pico_folder, device="cpu").model.model.rope_deltas is None and len(reads) == 1


def test_outside_of_a_run_nothing_is_kept(pico_folder: Path) -> None:
    model = weakref.ref(held.load(pico_folder, device="cpu").model)
    gc.collect()
    assert model() is None and held.held(pico_folder) is None
    assert loading.before_load == []
