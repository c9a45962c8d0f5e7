"""The no-op guard: a good export passes with figures, one that would serve something else is never published."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from holdfast.cli import app
from holdfast.editing import editor
from holdfast.editing.account import EditReport
from holdfast.editing.editor import edit_checkpoint
from holdfast.editing.verify import compare as verify
from holdfast.errors import ExportError
from holdfast.rules.hpa import HpaConfig, HpaRule


def edit(world, out, after, **options):
    return edit_checkpoint(world.before, after, rule=HpaRule(), curvature=world.curvature, out=out, **options)


def test_a_dense_export_reloads_to_exactly_the_edit_in_memory(world, tmp_path):
    report = edit(world, tmp_path / "out", world.after)
    found = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert found == report.verification
    count = len(world.curvature.modules)
    assert found["edited_tensors"] == found["edited_tensors_equal"] == found["weights_changed_by_edit"] == count
    assert found["max_logit_difference"] <= 1e-5 < 1e-2 < found["edit_moves_logits_by"]


def test_an_adapter_export_runs_in_peft_with_every_module_and_its_scale(world, tmp_path):
    report = edit(world, tmp_path / "out", world.adapter, export="adapter", coefficient="keep")
    count = len(world.curvature.modules)
    assert report.verification["active_modules"] == report.verification["scaled_modules"] == count
    assert report.verification["max_logit_difference"] <= 1e-4


@pytest.mark.parametrize(
    "coefficient, said",
    [
        ("drop", "left out of the adapter, and how much that changes was not measured"),
        ("measure", "left out of the adapter, at most "),
        ("keep", "in holdfast_input_scale.safetensors, which holdfast's loaders apply. PEFT alone ignores that file"),
    ],
)
def test_card_and_inspect_say_what_became_of_the_coefficient_and_what_was_calibrated(
    coefficient, said, world, tmp_path
):
    sets = {"safety": {"sequences": 8, "tokens": 91}, "task": {"sequences": 128, "tokens": 2048}}
    meta = {**world.curvature.meta, "sets": sets, "config": {"damping": 0.02, "activations": "each"}}
    out = tmp_path / "out [red] x"
    options = {"rule": HpaRule(), "export": "adapter", "coefficient": coefficient, "verify": False}
    edit_checkpoint(world.before, world.adapter, out=out, curvature=replace(world.curvature, meta=meta), **options)
    shown = CliRunner().invoke(app, ["inspect", str(out)])
    assert shown.exit_code == 0 and str(out) in shown.output
    for text in ((out / "README.md").read_text(), shown.output.replace("\n", "")):
        assert said in text and f"Coefficient ({coefficient})" in text
        assert "damping 0.02, activations each; safety 8 sequences, 91 tokens; task 128 sequences" in text


def test_a_dense_export_and_an_edit_without_projection_have_no_note_on_a_coefficient(world, tmp_path):
    edit(world, tmp_path / "dense", world.after, verify=False)
    rule = HpaRule(HpaConfig(projection="none"))
    options = {"curvature": world.curvature, "export": "adapter", "verify": False}
    edit_checkpoint(world.before, world.adapter, rule=rule, out=tmp_path / "adapter", **options)
    for name in ("dense", "adapter"):
        assert "Coefficient (" not in (tmp_path / name / "README.md").read_text()


@pytest.mark.parametrize("base", ["float16", "bfloat16"])
@pytest.mark.parametrize("factors", [torch.float32, torch.float64], ids=str)
def test_an_adapter_of_any_type_passes_on_a_machine_too_small_for_its_half_base(
    base, factors, world, tmp_path, monkeypatch
):
    monkeypatch.setattr(verify, "free_memory_bytes", lambda: 0)
    before = shutil.copytree(world.before, tmp_path / "before")
    old = {key: value.to(getattr(torch, base)) for key, value in load_file(before / "model.safetensors").items()}
    save_file(old, before / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((before / "config.json").read_text())
    (before / "config.json").write_text(json.dumps({**config, "dtype": base}))
    adapter = shutil.copytree(world.adapter, tmp_path / "adapter")
    wide = {key: value.to(factors) for key, value in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(wide, adapter / "adapter_model.safetensors")
    options = {"rule": HpaRule(), "curvature": world.curvature, "export": "adapter"}
    found = edit_checkpoint(before, adapter, out=tmp_path / "out", **options).verification
    assert found["tensors_redone"] == found["tensors_redone_equal"] > 0
    assert found["edited_tensors_read"] == found["active_modules"] == len(world.curvature.modules)


def test_a_module_that_was_never_trained_need_not_be_active(world, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "free_memory_bytes", lambda: 0)
    untrained = shutil.copytree(world.adapter, tmp_path / "untrained")
    factors = load_file(untrained / "adapter_model.safetensors")
    first = next(key for key in factors if ".lora_B." in key)
    save_file({**factors, first: factors[first] * 0}, untrained / "adapter_model.safetensors")
    found = edit(world, tmp_path / "out", untrained, export="adapter", coefficient="drop").verification
    assert found["active_modules"] == found["nonzero_modules"] == len(world.curvature.modules) - 1


def test_an_adapter_that_would_serve_the_base_is_an_error_and_not_published(world, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "free_memory_bytes", lambda: 0)  # the way of models larger than memory
    write = editor._write_small_files

    def rename_modules(staging, *arguments):
        write(staging, *arguments)
        path = staging.folder / "adapter_model.safetensors"
        renamed = {k.replace(".layers.", ".blocks."): v for k, v in load_file(path).items()}
        save_file({**load_file(path), **renamed}, path)
        save_file(renamed, path)

    monkeypatch.setattr(editor, "_write_small_files", rename_modules)
    monkeypatch.setattr(verify, "_same", lambda stored, redone: True)
    monkeypatch.setattr(verify._Written, "read", lambda self, target: torch.zeros(1))
    with pytest.raises(ExportError, match="has no active module: it would serve the base model"):
        edit(world, tmp_path / "out", world.adapter, export="adapter")
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_fit_has_every_edited_tensor_read_and_says_that_it_was_not_run(
    world, tmp_path, monkeypatch
):
    monkeypatch.setattr(verify, "free_memory_bytes", lambda: 0)
    found = edit(world, tmp_path / "out", world.after, shard_bytes=40_000).verification
    count = len(world.curvature.modules)
    assert found["edited_tensors"] == found["edited_tensors_read"] == count
    assert 0 < found["tensors_redone"] == found["tensors_redone_equal"] <= count
    assert found["matched_tensors"] > count
    assert found["max_logit_difference"] is None and "no logits were compared" in found["compared"]


def test_the_card_and_the_report_say_what_the_guard_found(world, tmp_path):
    out = tmp_path / "out"
    report = edit(world, out, world.adapter, export="adapter")
    assert EditReport.load(out / "edit.json").verification == report.verification
    card = (out / "README.md").read_text()
    off_by = report.verification["logits_without_coefficient_off_by"]
    assert off_by > 0 and f"moves the logits of the probe batch by {off_by:.1e}" in card
    assert f"- active modules: {len(report.layers)}" in card and "| 1.mlp.down_proj |" in card


def test_a_result_published_without_the_check_is_checked_when_asked_for(world, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "free_memory_bytes", lambda: 0)
    out = tmp_path / "out"
    edit(world, out, world.after, verify=False)
    assert "was not loaded back" in (out / "README.md").read_text()
    checked = edit(world, out, world.after)
    assert checked.verification == EditReport.load(out / "edit.json").verification is not None
    assert "edited tensors read: 14" in (out / "README.md").read_text()
    (out / "verification.json").unlink()
    monkeypatch.setattr(verify, "_same", lambda stored, redone: False)
    with pytest.raises(ExportError, match="was published without this check; do not use it"):
        edit(world, out, world.after)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda tensors, key: tensors[key].fill_(float("nan")), "holds NaN or inf"),
        (lambda tensors, key: tensors.pop(key), "is missing"),
        (lambda tensors, key: tensors.update({key: tensors[key][1:].clone()}), "the model has"),
    ],
    ids=["nan", "missing", "shape"],
)
def test_a_tensor_that_fits_no_model_is_found_in_the_clean_process(spoil, message, world, tmp_path):
    """Here in this one: the request and the folder are what count."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForImageTextToText

    from holdfast.editing.verify import child as probe

    folder = shutil.copytree(world.after, tmp_path / "export")
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors, next(key for key in tensors if key.endswith("layers.1.mlp.up_proj.weight")))
    save_file(tensors, folder / "model.safetensors")
    with init_empty_weights():
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    modules = dict.fromkeys(world.curvature.modules, "bfloat16")
    request = {"export": str(folder), "after": str(world.after), "modules": modules}
    assert any(message in fault for fault in probe._read_files(request, model)["faults"])
    good = probe._read_files({**request, "export": str(world.after)}, model)
    assert not good["faults"] and len(good["weight_hashes"]) == len(modules)


def test_a_tensor_that_is_not_the_edit_is_found_from_the_files(world, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "free_memory_bytes", lambda: 0)
    write = editor._write_small_files

    def spoil(staging, *arguments):
        write(staging, *arguments)
        path = staging.folder / "model.safetensors"
        tensors = load_file(path)
        for key in tensors:
            if key.endswith("layers.0.mlp.down_proj.weight"):
                tensors[key][3, 3] += 1
        save_file(tensors, path)

    monkeypatch.setattr(editor, "_write_small_files", spoil)
    with pytest.raises(ExportError, match=r"1 of \d+ edited tensors are not what the edit in memory gives"):
        edit(world, tmp_path / "out", world.after)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial" / "folder").is_dir()


@pytest.mark.parametrize(
    "found, message",
    [
        ({"active_modules": 3}, "3 of the adapter's 14 modules that are not zero are active"),
        ({"active_modules": 0, "nonzero_modules": 0}, "Every B of the exported adapter is zero"),
        ({"max_logit_difference": 0.3}, "logits differ from the edit in memory by 0.3 of the largest logit"),
        ({"max_logit_difference": float("nan")}, "logits differ from the edit in memory by nan"),
    ],
)
def test_every_unexpected_figure_is_an_error(found, message):
    class Report:
        export = "adapter"

    good = dict.fromkeys(("active_modules", "nonzero_modules", "edited_tensors", "edited_tensors_equal"), 14)
    good |= {"tolerance": 1e-3, "max_logit_difference": 1e-5}
    verify._judge(Report(), good)
    with pytest.raises(ExportError, match=message):
        verify._judge(Report(), {**good, **found})
