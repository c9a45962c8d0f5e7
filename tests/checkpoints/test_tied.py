"""Tied embeddings: an adapter that changes one end leaves the other alone, as stock transformers and PEFT load it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_kit import close, edit_all, logits, stock_logits, train
from holdfast.checkpoints.cast import cast_checkpoint
from holdfast.checkpoints.merged import open_checkpoint
from holdfast.checkpoints.value import Checkpoint
from holdfast.editing.editor import edit_checkpoint
from holdfast.models.load import load
from holdfast.models.streaming import load_streamed
from holdfast.rules.interpolation import InterpolationOptions, InterpolationRule

PROJ = r".*language_model\.layers.*_proj"

# name -> what PEFT was told to train
CASES = {
    "embedding": {"target_modules": PROJ, "modules_to_save": ["embed_tokens"]},
    "head": {"target_modules": PROJ, "modules_to_save": ["lm_head"]},
    "both": {"target_modules": PROJ, "modules_to_save": ["embed_tokens", "lm_head"]},
    "kept tied": {"target_modules": PROJ, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "LoRA on the head": {"target_modules": rf"({PROJ})|lm_head"},
    "LoRA on the embedding": {"target_modules": rf"({PROJ})|.*embed_tokens"},
    "LoRA on both": {"target_modules": rf"({PROJ})|.*embed_tokens|lm_head"},
    "LoRA on the embedding, kept tied": {
        "target_modules": rf"({PROJ})|.*embed_tokens",
        "ensure_weight_tying": True,
    },
    "LoRA on the head, kept tied": {"target_modules": rf"({PROJ})|lm_head", "ensure_weight_tying": True},
    "both, kept tied": {
        "target_modules": PROJ,
        "modules_to_save": ["embed_tokens", "lm_head"],
        "ensure_weight_tying": True,
    },
    "LoRA on the embedding, head whole": {
        "target_modules": rf"({PROJ})|.*embed_tokens",
        "modules_to_save": ["lm_head"],
    },
    "trainable tokens": {"target_modules": PROJ, "trainable_token_indices": [20, 21]},
    "neither": {"target_modules": PROJ},
}


@pytest.fixture(scope="module")
def tied_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2-VL with one matrix at both ends, saved as transformers saves it: without a head."""
    from transformers import AutoModelForImageTextToText

    import model_zoo

    root = tmp_path_factory.mktemp("tied")
    folder = model_zoo.save("qwen2_vl", root / "plain")
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "model.safetensors"
    kept = {k: v for k, v in load_file(weights).items() if not k.endswith("lm_head.weight")}
    save_file(kept, weights, metadata={"format": "pt"})
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    return folder


@pytest.fixture(scope="module")
def tied_base_with_both_ends(tied_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, its matrix stored twice."""
    folder = Path(shutil.copytree(tied_base, tmp_path_factory.mktemp("tied") / "twice"))
    tensors = load_file(folder / "model.safetensors")
    (embedding,) = (v for k, v in tensors.items() if k.endswith("embed_tokens.weight"))
    save_file({**tensors, "lm_head.weight": embedding.clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("base", ["tied_base", "tied_base_with_both_ends"])
@pytest.mark.parametrize("case", CASES)
def test_every_road_gives_the_logits_of_peft(case: str, base: str, tmp_path: Path, request) -> None:
    base = request.getfixturevalue(base)
    adapter = train(base, tmp_path / "adapter", **CASES[case])
    expected = stock_logits(base, adapter)
    assert not close(stock_logits(base), expected)
    value = Checkpoint(base=str(base), adapters=(str(adapter),))
    assert close(logits(load(value, device="cpu")), expected)
    cast = cast_checkpoint(value, tmp_path / "cast", torch.float32)
    assert close(stock_logits(cast), expected)
    streamed = load_streamed(value, device="cpu")
    assert streamed.blocks_on_disk is not None
    streamed.blocks_on_disk.materialize(range(2))
    assert close(logits(streamed), expected)


@pytest.mark.parametrize("case", CASES)
def test_a_dense_edit_that_keeps_everything_is_the_tuned_model(case: str, tied_base: Path, tmp_path: Path) -> None:
    adapter = train(tied_base, tmp_path / "adapter", **CASES[case])
    report = edit_all(tied_base, adapter, tmp_path / "out")
    assert close(stock_logits(tmp_path / "out"), stock_logits(tied_base, adapter))
    assert report.verification["after_differs_from_peft_by"] < 1e-4


def test_an_untied_result_says_so_at_every_level(tied_base: Path, tmp_path: Path) -> None:
    adapter = train(tied_base, tmp_path / "adapter", **CASES["head"])
    with open_checkpoint(Checkpoint(base=str(tied_base), adapters=(str(adapter),))) as merged:
        config = merged.config()
        assert merged.untied
        assert {"lm_head.weight"} == set(merged.entries) - set(merged.base.entries)
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False


def test_a_second_adapter_goes_on_top_of_an_untied_head(tied_base: Path, tmp_path: Path) -> None:
    one = train(tied_base, tmp_path / "one", **CASES["head"])
    middle = cast_checkpoint(Checkpoint(base=str(tied_base), adapters=(str(one),)), tmp_path / "middle", torch.float32)
    two = train(middle, tmp_path / "two", **CASES["embedding"])
    both = Checkpoint(base=str(tied_base), adapters=(str(one), str(two)))
    assert close(logits(load(both, device="cpu")), stock_logits(middle, two))


def test_the_guard_does_not_take_its_reference_from_our_loader(tied_base: Path, tmp_path: Path, monkeypatch) -> None:
    from holdfast.checkpoints import adapter as module
    from holdfast.errors import ExportError

    adapter = train(tied_base, tmp_path / "adapter", **CASES["embedding"])
    # The fault of old: both ends are replaced, by every road of ours alike.
    monkeypatch.setattr(module.LoraAdapter, "changes_one_end", lambda self, name: False)
    with pytest.raises(ExportError, match="not what PEFT loads"):
        edit_all(tied_base, adapter, tmp_path / "out")


@pytest.mark.parametrize("case", ["embedding", "LoRA on both", "LoRA on the head, kept tied", "kept tied"])
def test_an_adapter_export_serves_as_the_adapter_does(case: str, tied_base: Path, tmp_path: Path) -> None:
    adapter = train(tied_base, tmp_path / "adapter", **CASES[case])
    rule = InterpolationRule(InterpolationOptions(factor=1.0))
    edit_checkpoint(tied_base, adapter, rule=rule, out=tmp_path / "out", export="adapter", coefficient="drop")
    assert close(stock_logits(tied_base, tmp_path / "out"), stock_logits(tied_base, adapter))


def test_a_full_model_that_was_untied_by_the_tuning_stays_so(tied_base: Path, tmp_path: Path) -> None:
    adapter = train(tied_base, tmp_path / "adapter", **CASES["both"])
    value = Checkpoint(base=str(tied_base), adapters=(str(adapter),))
    untied = cast_checkpoint(value, tmp_path / "untied", torch.float32)
    report = edit_all(tied_base, untied, tmp_path / "out")
    assert close(stock_logits(tmp_path / "out"), stock_logits(tied_base, adapter))
    assert any("lm_head.weight: in AFTER only" in warning for warning in report.warnings)
