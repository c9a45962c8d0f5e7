"""Pairs as people have them: old names, other types, tensors on one side, files left out, added tokens, fp8, stacks."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import model_zoo
from adapter_kit import close, edit_all, logits, stock_logits, train
from holdfast.checkpoints.adapter import LoraAdapter
from holdfast.checkpoints.adapter_config import settle_adapter_config
from holdfast.checkpoints.merged import open_checkpoint
from holdfast.checkpoints.support import CHECKPOINT_KINDS, QUANTISATIONS
from holdfast.checkpoints.value import Checkpoint, as_checkpoint
from holdfast.editing.editor import edit_checkpoint
from holdfast.editing.pair import open_pair, tuned_checkpoint
from holdfast.errors import AdapterError, CheckpointError, ModelError
from holdfast.models.load import load
from holdfast.rules.interpolation import InterpolationOptions, InterpolationRule

PROJ = r".*language_model\.layers.*_proj"


def rewritten(source: Path, out: Path, change) -> Path:
    """A copy of a folder whose one weights file went through `change(tensors) -> tensors`."""
    shutil.copytree(source, out)
    file = next(name for name in ("model.safetensors", "adapter_model.safetensors") if (out / name).is_file())
    save_file(
        {key: value.contiguous() for key, value in change(load_file(out / file)).items()},
        out / file,
        metadata={"format": "pt"},
    )
    return out


def written_by_transformers(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a result, spelled as transformers 5 saved the inputs."""
    weights = load_file(folder / "model.safetensors")
    return {key.replace("vision_tower.vision_model.", "vision_tower."): value for key, value in weights.items()}


def configured(folder: Path, **changes) -> Path:
    path = folder / ("adapter_config.json" if (folder / "adapter_config.json").is_file() else "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def tuned(tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Every decoder linear changed a little, everything else as it was; in another type where one is given."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for key, value in tensors.items():
        value = value.to(dtype or value.dtype)
        if "language_model" in key and "_proj" in key:
            value = (value.float() + torch.randn(value.shape, generator=generator) * 0.05).to(value.dtype)
        found[key] = value
    return found


def halfway(before, after, out, **options):
    return edit_checkpoint(before, after, rule=InterpolationRule(InterpolationOptions(factor=0.5)), out=out, **options)


# Old names.


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Qwen2-VL and an adapter on its decoder, its vision tower, its head."""
    root = tmp_path_factory.mktemp("qwen")
    base = model_zoo.save("qwen2_vl", root / "base")
    options = {"rank_pattern": {"layers.0.mlp.up_proj": 2}, "alpha_pattern": {"o_proj": 4}}
    target = r".*language_model\.layers.*_proj|.*visual.*fc1|lm_head"
    return base, train(base, root / "adapter", target_modules=target, **options)


OLD = {
    "model.layers": lambda key: key.replace("model.language_model.", "model.").replace("model.visual.", "visual."),
    "FSDP": lambda key: key.replace(".layers.0.", ".layers.0._fsdp_wrapped_module."),
    "compiled, default": lambda key: "_orig_mod." + re.sub(r"(lora_[AB])", r"\1.default", key),
}


@pytest.mark.parametrize("names", OLD)
@pytest.mark.parametrize("verify", [True, False])
def test_an_exported_adapter_has_the_present_names(names: str, verify: bool, qwen, tmp_path: Path) -> None:
    base, adapter = qwen
    spell = OLD[names]
    old = rewritten(adapter, tmp_path / "old", lambda t: {spell(key): value for key, value in t.items()})
    if names == "model.layers":
        targets = sorted(
            {
                spell(key).split(".lora_")[0].removeprefix("base_model.model.")
                for key in load_file(adapter / "adapter_model.safetensors")
                if ".lora_" in key
            }
        )
        patterns = {"model.layers.0.mlp.up_proj": 2}
        configured(old, target_modules=targets, rank_pattern=patterns, exclude_modules=r"model\.language_model.*")
    rule = InterpolationRule(InterpolationOptions(factor=1.0))
    out = tmp_path / "out"
    report = edit_checkpoint(base, old, rule=rule, out=out, export="adapter", coefficient="drop", verify=verify)
    assert close(stock_logits(base, out), stock_logits(base, adapter))
    assert set(load_file(out / "adapter_model.safetensors")) == set(load_file(adapter / "adapter_model.safetensors"))
    assert any("present names" in warning for warning in report.warnings)
    if verify:
        assert report.verification["active_modules"] == report.verification["nonzero_modules"] > 16


def test_an_adapter_with_present_names_is_written_as_it_was(qwen, tmp_path: Path) -> None:
    base, adapter = qwen
    report = halfway(base, adapter, tmp_path / "out", export="adapter", coefficient="drop")
    settled = Path(shutil.copytree(adapter, tmp_path / "settled"))
    settle_adapter_config(settled, base=str(base), base_config=json.loads((base / "config.json").read_text()))
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == (settled / "adapter_config.json").read_bytes()
    assert not any("present names" in warning for warning in report.warnings)


# Types.


@pytest.mark.parametrize(
    "old, new",
    [
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_another_type_is_no_change_and_the_result_has_afters(old, new, pico_folder: Path, tmp_path: Path) -> None:
    before = rewritten(pico_folder, tmp_path / "before", lambda t: {k: v.to(old) for k, v in t.items()})
    after = rewritten(before, tmp_path / "after", lambda t: tuned(t, new))
    report = halfway(before, after, tmp_path / "out")
    old_weights, new_weights = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    written = written_by_transformers(tmp_path / "out")
    assert {value.dtype for value in written.values()} == {new}
    for key, value in written.items():
        start = old_weights[key].to(new).float()
        expected = torch.lerp(start, new_weights[key].float(), 0.5).to(new)
        torch.testing.assert_close(value, expected, rtol=2e-2, atol=1e-3)
        if torch.equal(new_weights[key], old_weights[key].to(new)):
            assert torch.equal(value, new_weights[key])
    sentence = next(warning for warning in report.warnings if "rounded to AFTER's type" in warning)
    assert not any("changed by the tuning" in warning for warning in report.warnings), sentence


def test_one_norm_in_another_type_and_a_change_in_it_is_said(pico_folder: Path, tmp_path: Path) -> None:
    norm = "norm.weight"

    def change(tensors):
        found = tuned(tensors)
        key = next(key for key in found if key.endswith(norm) and "language_model" in key and "layers" not in key)
        return {**found, key: (found[key] + 1).to(torch.bfloat16)}

    after = rewritten(pico_folder, tmp_path / "after", change)
    report = halfway(pico_folder, after, tmp_path / "out")
    assert any("1 tensor(s) are F32 before and BF16 after" in warning for warning in report.warnings)
    assert any("norm: 1 tensor changed by the tuning" in warning for warning in report.warnings)
    assert load(tmp_path / "out", device="cpu") is not None


# One side only.


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("name", ["mtp.layers.0.mlp.weight", "talker.head.weight", "model.layers.0.extra.weight"])
def test_a_tensor_that_transformers_never_builds_is_copied_and_said(side, name, pico_folder, tmp_path: Path) -> None:
    more = torch.full((3, 2), 7.0)
    before = rewritten(pico_folder, tmp_path / "before", lambda t: {**t, **({name: more} if side == "before" else {})})
    after = rewritten(
        pico_folder, tmp_path / "after", lambda t: {**tuned(t), **({name: more} if side == "after" else {})}
    )
    report = halfway(before, after, tmp_path / "out", verify=name.startswith("mtp"))
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], more)
    assert any(name in warning and f"in {side.upper()} only" in warning for warning in report.warnings)


@pytest.mark.parametrize("end", ["layers.1.mlp.up_proj.weight", "layers.0.input_layernorm.weight"])
def test_a_tensor_of_the_model_on_one_side_only_is_refused(end: str, pico_folder: Path, tmp_path: Path) -> None:
    def without(tensors):
        return {key: value for key, value in tensors.items() if not key.endswith(end)}

    less = rewritten(pico_folder, tmp_path / "less", without)
    with pytest.raises(CheckpointError, match=rf"AFTER .* has not .*1 such|has \S*{re.escape(end)} and AFTER"):
        open_pair(pico_folder, less)
    with pytest.raises(CheckpointError, match=rf"has \S*{re.escape(end)} and BEFORE"):
        open_pair(less, pico_folder)


# Files left out.


def test_without_processor_and_tokenizer_befores_are_used_and_it_is_said(pico_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    after = rewritten(pico_folder, tmp_path / "after", tuned)
    for path in after.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    report = halfway(pico_folder, after, tmp_path / "out")
    (sentence,) = (warning for warning in report.warnings if "BEFORE's is used" in warning)
    assert all(what in sentence for what in ("tokenizer", "processor", "chat template"))
    found = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    assert found.chat_template == AutoProcessor.from_pretrained(pico_folder, backend="pil").chat_template
    # Calibration and the search of `restore` load AFTER as this value.
    assert load(tuned_checkpoint(pico_folder, after), device="cpu").processor.chat_template == found.chat_template
    with pytest.raises(ModelError, match="processor"):
        load(after, device="cpu")


def test_afters_own_tokenizer_stays_where_only_the_processor_is_missing(pico_folder: Path, tmp_path: Path) -> None:
    after = rewritten(pico_folder, tmp_path / "after", tuned)
    (after / "processor_config.json").unlink()
    (after / "chat_template.jinja").write_text("OWN {{ messages }}")
    report = halfway(pico_folder, after, tmp_path / "out", verify=False)
    assert any(warning.startswith("processor: AFTER has none") for warning in report.warnings)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "OWN {{ messages }}"


# Added tokens.


def resized(base: Path, out: Path, rows: int, **lora) -> Path:
    """The base with `rows` tokens, tuned; with `lora`, an adapter as PEFT saves it then."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
        model.resize_token_embeddings(rows, mean_resizing=False)
        wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=PROJ)) if lora else model
        generator = torch.Generator().manual_seed(5)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "embed_tokens" in name or (not lora and "language_model" in name and "_proj" in name):
                parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
        wrapped.save_pretrained(out, **({"save_embedding_layers": True} if lora else {}))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<t{i}>" for i in range(rows - len(tokenizer))])
    tokenizer.save_pretrained(out)
    return out


def stock_resized(base: Path, adapter: Path, rows: int) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    from adapter_kit import IDS

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
        model.resize_token_embeddings(rows, mean_resizing=False)
        return PeftModel.from_pretrained(model, adapter).eval()(input_ids=IDS).logits


@pytest.mark.parametrize("rows", [331, 300])
def test_added_or_cut_tokens_of_a_dense_model_are_copied_and_said(rows: int, pico_folder: Path, tmp_path: Path) -> None:
    after = resized(pico_folder, tmp_path / "after", rows)
    report = edit_all(pico_folder, after, tmp_path / "out")
    assert close(stock_logits(tmp_path / "out"), stock_logits(after))
    assert sum(f"320 rows before and {rows} after" in warning for warning in report.warnings) == 2


def test_added_tokens_of_an_adapter_resize_the_base_on_every_road(pico_folder: Path, tmp_path: Path) -> None:
    adapter = resized(pico_folder, tmp_path / "adapter", 331, lora=True)
    expected = stock_resized(pico_folder, adapter, 331)
    value = Checkpoint(base=str(pico_folder), adapters=(str(adapter),))
    loaded = load(value, device="cpu")
    assert close(logits(loaded), expected)
    assert len(loaded.tokenizer) == 331
    report = edit_all(pico_folder, adapter, tmp_path / "out")
    assert report.verification["after_differs_from_peft_by"] < 1e-4
    assert close(stock_logits(tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]["vocab_size"] == 331
    halfway(pico_folder, adapter, tmp_path / "as_adapter", export="adapter", coefficient="drop")
    assert LoraAdapter(tmp_path / "as_adapter").vocabulary == 331


def test_one_resized_end_is_refused(pico_folder: Path, tmp_path: Path) -> None:
    adapter = resized(pico_folder, tmp_path / "adapter", 331, lora=True)
    one = rewritten(adapter, tmp_path / "one", lambda t: {k: v for k, v in t.items() if "lm_head" not in k})
    value = Checkpoint(base=str(pico_folder), adapters=(str(one),))
    for action in (lambda: open_checkpoint(value), lambda: load(value, device="cpu")):
        with pytest.raises(AdapterError, match="resizes one end of the vocabulary only"):
            action()


# Wrappers in a full model's names.


@pytest.mark.parametrize("names", ["_orig_mod.", "module.", "_fsdp_wrapped_module."])
def test_a_model_saved_from_within_a_wrapper_is_the_same_model(names: str, pico_folder: Path, tmp_path: Path) -> None:
    def wrapped(tensors):
        if names.startswith("_fsdp"):
            return {key.replace(".layers.", f".layers.{names}"): value for key, value in tuned(tensors).items()}
        return {f"{names}{key}": value for key, value in tuned(tensors).items()}

    plain = rewritten(pico_folder, tmp_path / "plain", tuned)
    after = rewritten(pico_folder, tmp_path / "after", wrapped)
    assert close(logits(load(after, device="cpu")), stock_logits(plain))
    edit_all(pico_folder, after, tmp_path / "out")
    assert close(stock_logits(tmp_path / "out"), stock_logits(plain))
    key = next(key for key in load_file(plain / "model.safetensors") if ".layers.0." in key and "language" in key)
    twice = rewritten(after, tmp_path / "twice", lambda t: {**t, key: torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"twice, once as"):
        open_checkpoint(twice)


# Stacks.


def test_several_adapters_are_one_after(pico_folder: Path, tmp_path: Path) -> None:
    one = train(pico_folder, tmp_path / "one", target_modules=PROJ)
    two = train(pico_folder, tmp_path / "two", target_modules=r".*language_model.*(q|v)_proj", use_rslora=True)
    value = Checkpoint(base=str(pico_folder), adapters=(str(one), str(two)))
    expected = logits(load(value, device="cpu"))
    for number, after in enumerate((f"{one}+{two}", f"{pico_folder}+{one} + {two}", value)):
        edit_all(pico_folder, after, tmp_path / str(number))
        assert close(stock_logits(tmp_path / str(number)), expected)
    # The first of two under BEFORE: the second alone is AFTER's, and can be an adapter again.
    edit_checkpoint(
        f"{pico_folder}+{one}",
        str(two),
        rule=InterpolationRule(InterpolationOptions(factor=1.0)),
        out=tmp_path / "top",
        export="adapter",
        coefficient="drop",
    )
    with pytest.raises(AdapterError, match="2 adapters on top of each other"):
        halfway(pico_folder, f"{one}+{two}", tmp_path / "no", export="adapter")


def test_a_plus_in_a_name_of_a_folder_that_is_there_is_part_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "a+b"
    assert as_checkpoint(str(folder)).adapters == ("b",)
    folder.mkdir()
    assert as_checkpoint(str(folder)) == Checkpoint(base=str(folder))
    assert as_checkpoint(str(Checkpoint(base="x", adapters=("y", "z")))) == Checkpoint(base="x", adapters=("y", "z"))


# Quantised.


def fp8(tensors: dict[str, torch.Tensor], scale: str, blocks: int) -> tuple[dict, dict]:
    """Decoder linears in fp8 with their scales, and what they are in bf16 by plain arithmetic."""
    stored, plain = {}, {}
    for key, value in tensors.items():
        if "language_model" not in key or "_proj" not in key:
            stored[key] = plain[key] = value.to(torch.bfloat16)
            continue
        rows, columns = value.shape
        if scale == "weight_scale_inv":
            padded = torch.nn.functional.pad(value, (0, -columns % blocks, 0, -rows % blocks))
            cut = padded.reshape(-(-rows // blocks), blocks, -(-columns // blocks), blocks)
            factor = cut.abs().amax((1, 3)).clamp_min(1e-6) / 448
            wide = factor.repeat_interleave(blocks, 0)[:rows].repeat_interleave(blocks, 1)[:, :columns]
        else:
            factor = value.abs().amax(1, keepdim=True) / 448 if blocks == 1 else value.abs().max() / 448
            wide = factor
        quantised = (value / wide).to(torch.float8_e4m3fn)
        stored[key] = quantised
        stored[key.replace("weight", scale)] = factor.contiguous()
        plain[key] = (quantised.float() * wide).to(torch.bfloat16)
    return stored, plain


@pytest.mark.parametrize(
    "scale, blocks, method",
    [("weight_scale_inv", 32, "fp8"), ("weight_scale", 1, "compressed-tensors"), ("weight_scale", 0, "fp8")],
)
def test_fp8_reads_as_the_product_of_values_and_scales(scale, blocks, method, pico_folder, tmp_path: Path) -> None:
    record = {"quant_method": method, "weight_block_size": [32, 32]}
    known = {}

    def change(tensors):
        stored, plain = fp8(tuned(tensors), scale, blocks)
        known.update(plain)
        return stored

    after = configured(rewritten(pico_folder, tmp_path / "after", change), quantization_config=record)
    report = edit_all(pico_folder, after, tmp_path / "out")
    written = written_by_transformers(tmp_path / "out")
    assert set(written) == set(known)
    assert all(torch.equal(written[key], value) for key, value in known.items())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert report.verification["max_logit_difference"] < 1e-3
    assert close(logits(load(after, device="cpu")), logits(load(tmp_path / "out", device="cpu")))


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "hqq"])
def test_other_quantisations_are_refused_by_name(method: str, pico_folder: Path, tmp_path: Path) -> None:
    def change(tensors):
        key = next(key for key in tensors if key.endswith("up_proj.weight"))
        return {**tensors, key.replace("weight", "qweight"): torch.ones(3, 2, dtype=torch.int32)}

    after = configured(rewritten(pico_folder, tmp_path / "after", change), quantization_config={"quant_method": method})
    with pytest.raises(CheckpointError, match=rf"is quantised \({method}\).*dequantize"):
        open_pair(pico_folder, after)


def test_fp8_without_its_scale_is_refused(pico_folder: Path, tmp_path: Path) -> None:
    def change(tensors):
        stored, _ = fp8(tensors, "weight_scale_inv", 32)
        return {key: value for key, value in stored.items() if "scale" not in key}

    after = configured(rewritten(pico_folder, tmp_path / "after", change), quantization_config={"quant_method": "fp8"})
    with pytest.raises(CheckpointError, match="without a scale"):
        open_pair(pico_folder, after)


def test_the_tables_say_a_verdict_and_a_sentence_of_each_kind() -> None:
    for kind in (*CHECKPOINT_KINDS, *QUANTISATIONS):
        assert kind.verdict in ("read", "merged densely", "refused")
        assert kind.name
        assert kind.sentence.endswith(".")
