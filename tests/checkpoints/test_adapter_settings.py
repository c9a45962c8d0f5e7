"""A tokenizer, template or processor in an adapter's folder is the one that the tuned model is used with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer

from adapter_kit import edit_all, train
from holdfast.checkpoints.cast import cast_checkpoint
from holdfast.checkpoints.value import Checkpoint
from holdfast.editing.pair import tuned_checkpoint
from holdfast.errors import ModelError
from holdfast.models.load import load
from holdfast.models.streaming import load_streamed

PROJ = r".*language_model\.layers.*_proj"


@pytest.fixture(scope="module")
def trained(pico_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(pico_folder, tmp_path_factory.mktemp("adapter") / "adapter", target_modules=PROJ)


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "adapter"))


def add_token(base: Path, out: Path, *tokens: str) -> int:
    """The base's tokenizer with more tokens, saved by transformers; the id of the first."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(out)
    (out / "chat_template.jinja").unlink(missing_ok=True)
    return int(tokenizer.convert_tokens_to_ids(tokens[0]))


def results(base: Path, adapter: Path, out: Path) -> dict[str, object]:
    """The processor by every road: loaded under the base, and stock transformers on what is written."""
    value = Checkpoint(base=str(base), adapters=(str(adapter),))
    edit_all(base, adapter, out / "edited")
    cast_checkpoint(value, out / "cast", torch.bfloat16)
    return {
        "load": load(value, device="cpu").processor,
        "calibrate, larger than memory": load_streamed(value, device="cpu").processor,
        "calibrate, restore": load(tuned_checkpoint(str(base), str(adapter)), device="cpu").processor,
        "edit": AutoProcessor.from_pretrained(out / "edited", backend="pil"),
        "cast": AutoProcessor.from_pretrained(out / "cast", backend="pil"),
    }


def test_added_tokens_stay_tokens(pico_folder: Path, adapter: Path, tmp_path: Path) -> None:
    number = add_token(pico_folder, adapter, "<tool>")
    base_template = AutoProcessor.from_pretrained(pico_folder, backend="pil").chat_template
    for road, processor in results(pico_folder, adapter, tmp_path).items():
        assert processor.tokenizer("<tool>", add_special_tokens=False)["input_ids"] == [number], road
        assert processor.chat_template == base_template, road


@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_a_template_wins_wherever_it_is_written(place: str, pico_folder: Path, adapter: Path, tmp_path: Path) -> None:
    template = "OWN {{ messages }}"
    if place.endswith("jinja"):
        (adapter / place).write_text(template)
    elif place == "chat_template.json":
        (adapter / place).write_text(json.dumps({"chat_template": template}))
    else:
        config = json.loads((pico_folder / place).read_text())
        (adapter / place).write_text(json.dumps({**config, "chat_template": template}))
    for road, processor in results(pico_folder, adapter, tmp_path).items():
        assert processor.chat_template == template, road


def test_a_processor_wins(pico_folder: Path, adapter: Path, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(pico_folder, backend="pil")
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    processor.save_pretrained(adapter)
    for road, found in results(pico_folder, adapter, tmp_path).items():
        assert list(found.image_processor.image_mean) == [0.1, 0.2, 0.3], road
    report = edit_all(pico_folder, adapter, tmp_path / "edited")
    assert any("processor" in warning and "adapter's folder" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    "file, change",
    [
        ("processor_config.json", {"patch_size": 7}),
        ("preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3], "image_processor_type": "LlavaImageProcessor"}),
        ("special_tokens_map.json", {"eos_token": "<unk>"}),
    ],
)
def test_a_settings_file_alone_is_said_and_written(file, change, pico_folder: Path, adapter: Path, tmp_path: Path):
    base = json.loads((pico_folder / file).read_text()) if (pico_folder / file).is_file() else {}
    (adapter / file).write_text(json.dumps({**base, **change}))
    report = edit_all(pico_folder, adapter, tmp_path / "out")
    assert any("the adapter's folder has its own" in warning for warning in report.warnings)
    written = json.loads((tmp_path / "out" / file).read_text())
    assert all(written[key] == value for key, value in change.items())


def test_the_settings_of_the_last_of_several_adapters_win(pico_folder: Path, adapter: Path, tmp_path: Path) -> None:
    top = Path(shutil.copytree(adapter, tmp_path / "top"))
    for folder, template in ((adapter, "ONE {{ messages }}"), (top, "TWO {{ messages }}")):
        (folder / "chat_template.jinja").write_text(template)
    value = Checkpoint(base=str(pico_folder), adapters=(str(adapter), str(top)))
    assert load(value, device="cpu").processor.chat_template == "TWO {{ messages }}"


def test_tokens_without_embeddings_are_refused(pico_folder: Path, adapter: Path) -> None:
    add_token(pico_folder, adapter, *(f"<t{i}>" for i in range(100)))
    with pytest.raises(ModelError, match=r"knows \d+ tokens and the model has 320 embeddings"):
        load(Checkpoint(base=str(pico_folder), adapters=(str(adapter),)), device="cpu")
