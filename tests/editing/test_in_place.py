"""The edit of live models is the edit on disk; nothing is touched when something does not fit."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

import holdfast
from holdfast.checkpoints.curvature_file import Curvature
from holdfast.editing.editor import edit_checkpoint
from holdfast.errors import AdapterError, CalibrationError, CheckpointError, NumericalError
from holdfast.rules.hpa import HpaRule


def load(folder):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)


def test_live_models_get_the_weights_of_the_edit_on_disk(world, tmp_path):
    report = edit_checkpoint(
        world.before, world.after, rule=HpaRule(), curvature=world.curvature, out=tmp_path / "out", verify=False
    )
    world.curvature.save(tmp_path / "curvature.safetensors")
    result = holdfast.harmonize(load(world.before), load(world.after), tmp_path / "curvature.safetensors")
    expected = load(tmp_path / "out").state_dict()
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert [dict(row) for row in result.report.layers] == [dict(row) for row in report.layers]


def compiled_inside(model):
    layers = model.model.language_model.layers
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer)
    return model


@pytest.mark.parametrize(
    "wrap", [torch.compile, torch.nn.DataParallel, compiled_inside, lambda m: torch.compile(compiled_inside(m))]
)
@pytest.mark.parametrize("side", ["before", "after", "both"])
def test_a_compiled_or_parallel_model_is_the_model_inside(side, wrap, world):
    before, after = load(world.before), load(world.after)
    expected = holdfast.harmonize(load(world.before), load(world.after), world.curvature)
    plain = after
    before = wrap(before) if side != "after" else before
    after = wrap(after) if side != "before" else after
    result = holdfast.harmonize(before, after, world.curvature)
    assert len(result.report.layers) == len(world.curvature.modules)
    found = [value for _, value in plain.state_dict().items()]
    assert all(map(torch.equal, found, expected.model.state_dict().values()))


def test_a_peft_model_gets_the_masked_factors_of_the_exported_adapter(world, tmp_path):
    from peft import PeftModel

    edit_checkpoint(
        world.before,
        world.adapter,
        rule=HpaRule(),
        curvature=world.curvature,
        out=tmp_path / "out",
        export="adapter",
        verify=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = PeftModel.from_pretrained(load(world.before), world.adapter)
        expected = PeftModel.from_pretrained(load(world.before), tmp_path / "out")
    result = holdfast.harmonize({}, tuned, world.curvature)
    assert len(result.report.layers) == len(world.curvature.modules)
    for (name, value), (_, other) in zip(result.model.state_dict().items(), expected.state_dict().items(), strict=True):
        assert torch.equal(value, other), name


def test_a_calibration_that_does_not_fit_or_nan_touches_nothing(world):
    tuned = load(world.after)
    state = {name: value.clone() for name, value in tuned.state_dict().items()}
    before = load(world.before).state_dict()
    last = world.curvature.modules[-1]

    def resize(values):
        return {**values, last: torch.ones(3)}

    narrow = Curvature(
        safety=resize(world.curvature.safety), task=resize(world.curvature.task), meta=world.curvature.meta
    )
    with pytest.raises(CalibrationError, match="it has 3 input columns"):
        holdfast.harmonize(before, tuned, narrow)
    broken = {**before, f"{last}.weight": before[f"{last}.weight"] * float("nan")}
    with pytest.raises(NumericalError, match=r"holds NaN or inf \(before\)"):
        holdfast.harmonize(broken, tuned, world.curvature)
    for name, value in tuned.state_dict().items():
        assert torch.equal(value, state[name]), name


def peft_model(world, adapter=None):
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(load(world.before), adapter or world.adapter)


def test_a_merged_adapter_is_refused_and_untouched(world):
    tuned = peft_model(world)
    tuned.merge_adapter()
    state = {name: value.clone() for name, value in tuned.state_dict().items()}
    with pytest.raises(AdapterError, match=r"has its adapter merged .* Call `unmerge_adapter\(\)` first"):
        holdfast.harmonize({}, tuned, world.curvature)
    assert all(torch.equal(value, state[name]) for name, value in tuned.state_dict().items())


@pytest.mark.parametrize("kind", ["state dict", "model"])
def test_a_before_that_is_afters_memory_is_refused(kind, world):
    tuned = load(world.after)
    before = tuned if kind == "model" else tuned.state_dict()
    with pytest.raises(CheckpointError, match=r"is the memory of AFTER's: .* Keep copies before you tune"):
        holdfast.harmonize(before, tuned, world.curvature)


def test_no_change_at_all_is_warned_of(world):
    with pytest.warns(UserWarning, match="AFTER equals BEFORE in every calibrated layer"):
        result = holdfast.harmonize(load(world.before), load(world.before), world.curvature)
    assert result.report.warnings == ["AFTER equals BEFORE in every calibrated layer: there was nothing to edit"]


def test_a_before_in_another_type_is_rounded_to_afters(world):
    usual = holdfast.harmonize(load(world.before), load(world.after), world.curvature).model.state_dict()
    wide = {name: value.float() * (1 + 2e-4) for name, value in load(world.before).state_dict().items()}
    found = holdfast.harmonize(wide, load(world.after), world.curvature).model.state_dict()
    assert all(torch.equal(value, usual[name]) for name, value in found.items())


def test_unrelated_weights_are_refused_before_the_first_layer_is_edited(world):
    whole = {name: value.to(torch.int8) for name, value in load(world.before).state_dict().items()}
    with pytest.raises(CheckpointError, match=r"is torch.bfloat16 after and torch.int8 before"):
        holdfast.harmonize(whole, load(world.after), world.curvature)
    stranger = load(world.after)
    last = world.curvature.modules[-1]
    generator = torch.Generator().manual_seed(1)
    weight = stranger.get_submodule(last).weight.data
    weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
    state = {name: value.clone() for name, value in stranger.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"{last}.weight has nothing in common .*allow_other_base=True"):
        holdfast.harmonize(load(world.before), stranger, world.curvature)
    assert all(torch.equal(value, state[name]) for name, value in stranger.state_dict().items())
    holdfast.harmonize(load(world.before), stranger, world.curvature, allow_other_base=True)


def test_layers_that_an_adapter_leaves_alone_need_no_before(world, lora, tmp_path):
    adapter = lora(world.before, tmp_path / "attention", target_modules=r".*language_model.*self_attn.*_proj")
    tuned = peft_model(world, adapter)
    result = holdfast.harmonize({}, tuned, world.curvature)
    edited = [row["layer"] for row in result.report.layers]
    assert edited == [name for name in world.curvature.modules if "self_attn" in name]


def test_a_calibration_of_another_kind_of_model_is_refused(world):
    foreign = replace(world.curvature, meta={**world.curvature.meta, "model_type": "qwen2_5_vl"})
    with pytest.raises(CalibrationError, match=r"made with a 'qwen2_5_vl' model, and .* is a 'llava' model"):
        holdfast.harmonize({}, load(world.after), foreign)
