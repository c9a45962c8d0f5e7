"""An edit on disk is the rule, layer by layer, and nothing else; bad inputs are found before anything is published."""

from __future__ import annotations

import json
import random
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fork_server import ForkServer
from holdfast.checkpoints.adapter import LoraAdapter
from holdfast.checkpoints.curvature_file import Curvature
from holdfast.checkpoints.fingerprint import fingerprint
from holdfast.checkpoints.merged import open_checkpoint
from holdfast.editing import DenseEdit
from holdfast.editing.account import EditReport
from holdfast.editing.editor import edit_checkpoint
from holdfast.errors import (
    AdapterError,
    CalibrationError,
    CheckpointError,
    ConfigError,
    NumericalError,
    StorageError,
)
from holdfast.functional.hpa import edit_weight
from holdfast.rules.hpa import HpaConfig, HpaRule


class Halfway:
    """A rule without calibration and without a closed form."""

    name = "halfway"
    needs_curvature = False

    def settings(self):
        return {"factor": 0.5}

    def edit(self, layer, w_prev, w_new):
        return DenseEdit(weight=torch.lerp(w_prev.float(), w_new.float(), 0.5), row={"seed": layer.seed % 1000})


def edit(world, out, after=None, **options):
    options = {"rule": HpaRule(), "curvature": world.curvature, "verify": False, **options}
    return edit_checkpoint(world.before, after or world.after, out=out, **options)


def weights(folder):
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def folder_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def reference(world, key, w_prev, w_new, module):
    config = HpaConfig()
    block = world.curvature.blocks[module]
    keep = config.keep_percent(block, world.curvature.block_count)
    return edit_weight(
        w_prev,
        w_new,
        world.curvature.safety[module],
        world.curvature.task[module],
        keep_percent=keep,
        focus_percent=config.focus_percent(keep),
    )


def test_every_calibrated_layer_is_edited_and_the_rest_is_afters_bits(world, tmp_path):
    report = edit(world, tmp_path / "out")
    old, new, out = weights(world.before), weights(world.after), weights(tmp_path / "out")
    assert set(out) == set(new)
    assert [row["layer"] for row in report.layers] == list(world.curvature.modules)
    edited = set()
    with open_checkpoint(world.after) as opened:
        for module in world.curvature.modules:
            key = opened.names.require(f"{module}.weight")
            expected = reference(world, key, old[key], new[key], module)
            assert torch.equal(out[key], expected.weight)
            assert torch.equal(out[key][:, expected.kept], old[key][:, expected.kept])
            assert not torch.equal(out[key], new[key])
            edited.add(key)
    for key in set(new) - edited:
        assert torch.equal(out[key], new[key]), key
    assert report.warnings == ["multi_modal_projector: 1 tensor changed by the tuning and copied without protection"]


def test_the_folder_has_all_that_a_loader_and_a_reader_need(world, tmp_path):
    report = edit(world, tmp_path / "out", safety={"forbidden": {"before": 0.42, "after": 0.05}}, shard_bytes=40_000)
    out = tmp_path / "out"
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json", "holdfast.json", "edit.json"):
        assert (out / name).is_file(), name
    card = (out / "README.md").read_text()
    assert "| forbidden | 42.0% | 5.0% |" in card
    assert "keep_bounds" in card and "torch" in card and "multi_modal_projector" in card
    read = EditReport.load(out / "edit.json")
    assert read.layers == [dict(row) for row in report.layers]
    assert read.mean("kept_share") == pytest.approx(report.mean("kept_share"))
    assert json.loads((out / "holdfast.json").read_text())["plan_hash"] == report.plan_hash
    shards = list(out.glob("model-*.safetensors"))
    assert len(shards) > 1
    with open_checkpoint(out) as opened:
        assert set(opened.entries) == set(weights(world.after))


def test_no_change_at_all_gives_before_back_and_says_so(world, tmp_path):
    report = edit(world, tmp_path / "out", world.before)
    assert "AFTER equals BEFORE in every calibrated layer" in report.warnings[0]
    old, out = weights(world.before), weights(tmp_path / "out")
    assert all(torch.equal(out[key], old[key]) for key in old)


def test_an_adapter_exported_dense_equals_the_merged_update_edited(world, tmp_path):
    edit(world, tmp_path / "out", world.adapter)
    old, out = weights(world.before), weights(tmp_path / "out")
    adapter = LoraAdapter(world.adapter)
    with open_checkpoint(world.before) as opened:
        for module in world.curvature.modules:
            key = opened.names.require(f"{module}.weight")
            a, b = adapter.read_factors(module)
            merged = old[key].double() + adapter.modules[module].scaling * b.double() @ a.double()
            expected = reference(world, key, old[key].double(), merged, module)
            assert torch.equal(out[key][:, expected.kept], old[key][:, expected.kept])
            torch.testing.assert_close(out[key], expected.weight.to(torch.bfloat16), rtol=1e-2, atol=1e-4)
    adapter.close()
    assert set(out) == set(old)


def test_the_exported_adapter_is_a_masked_a_of_the_same_rank(world, tmp_path):
    report = edit(world, tmp_path / "out", world.adapter, export="adapter")
    given, made = LoraAdapter(world.adapter), LoraAdapter(tmp_path / "out")
    for row in report.layers:
        a, b = given.read_factors(row["layer"])
        new_a, new_b = made.read_factors(row["layer"])
        assert torch.equal(new_b, b)
        masked = (new_a == 0).all(0)
        assert int(masked.sum()) == row["kept"]
        assert torch.equal(new_a[:, ~masked], a[:, ~masked])
        assert row["coefficient_error"] > 0
    assert not made.input_scale
    given.close()
    made.close()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config == json.loads((world.adapter / "adapter_config.json").read_text())


def test_adapter_and_scale_together_are_the_dense_result(world, tmp_path):
    edit(world, tmp_path / "dense", world.adapter)
    edit(world, tmp_path / "adapter", world.adapter, export="adapter", coefficient="keep")
    dense = weights(tmp_path / "dense")

    class Value:
        base = str(world.before)
        adapters = (str(tmp_path / "adapter"),)

    with open_checkpoint(Value()) as merged:
        assert len(merged.adapters[0].input_scale) == len(world.curvature.modules)
        for key, expected in dense.items():
            torch.testing.assert_close(merged.read(key), expected, rtol=8e-3, atol=1e-6)


def test_a_dropped_coefficient_is_never_measured_and_changes_no_factor(world, tmp_path):
    dropped = edit(world, tmp_path / "drop", world.adapter, export="adapter", coefficient="drop")
    measured = edit(world, tmp_path / "measure", world.adapter, export="adapter")
    assert all(row["coefficient"] is None and "coefficient_error" not in row for row in dropped.layers)
    assert all(row["coefficient"] is not None for row in measured.layers)
    name = "adapter_model.safetensors"
    assert (tmp_path / "drop" / name).read_bytes() == (tmp_path / "measure" / name).read_bytes()


def test_a_rule_without_calibration_takes_its_layers_from_the_caller(world, tmp_path):
    blocks = (dict(world.curvature.blocks), world.curvature.block_count)
    report = edit(world, tmp_path / "out", rule=Halfway(), curvature=None, blocks=blocks)
    old, new, out = weights(world.before), weights(world.after), weights(tmp_path / "out")
    key = next(key for key in new if key.endswith("layers.1.mlp.down_proj.weight"))
    expected = torch.lerp(old[key].float(), new[key].float(), 0.5).to(torch.bfloat16)
    assert torch.equal(out[key], expected)
    assert len({row["seed"] for row in report.layers}) > 1
    again = edit(world, tmp_path / "again", rule=Halfway(), curvature=None, blocks=blocks, seed=1)
    assert [row["seed"] for row in again.layers] != [row["seed"] for row in report.layers]


def test_without_either_the_layers_come_from_the_models_structure(world, tmp_path):
    report = edit(world, tmp_path / "out", world.adapter, rule=Halfway(), curvature=None)
    assert [row["layer"] for row in report.layers] == list(world.curvature.modules)


def test_the_same_edit_gives_the_same_bytes_and_a_finished_one_is_left_alone(world, tmp_path):
    edit(world, tmp_path / "a" / "out")
    edit(world, tmp_path / "b" / "out")
    assert folder_bytes(tmp_path / "a" / "out") == folder_bytes(tmp_path / "b" / "out")
    stamp = (tmp_path / "a" / "out" / "edit.json").stat().st_mtime_ns
    report = edit(world, tmp_path / "a" / "out")
    assert (tmp_path / "a" / "out" / "edit.json").stat().st_mtime_ns == stamp
    assert len(report.layers) == len(world.curvature.modules)
    with pytest.raises(StorageError, match="exists and is not this edit's result"):
        edit(world, tmp_path / "a" / "out", rule=HpaRule(HpaConfig(keep_bounds=(5, 20))))


def changed_alpha(world, target, alpha=64):
    adapter = shutil.copytree(world.adapter, target)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": alpha}))
    return adapter


def test_factors_that_are_scaled_in_another_way_are_another_edit(world, tmp_path):
    adapter = changed_alpha(world, tmp_path / "adapter", alpha=16)
    edit(world, tmp_path / "out", adapter)
    shutil.rmtree(adapter)
    changed_alpha(world, tmp_path / "adapter")
    with pytest.raises(StorageError, match=r"not this edit's result \(differs in fingerprints\)"):
        edit(world, tmp_path / "out", adapter)


class StopError(Exception):
    pass


def stop_half_way(event, *, done, total, **_):
    if done > total // 2:
        raise StopError


def test_a_killed_edit_is_not_finished_with_another_scaling(world, tmp_path):
    adapter = changed_alpha(world, tmp_path / "adapter", alpha=16)
    options = {"shard_bytes": 9_000}
    with pytest.raises(StopError):
        edit(world, tmp_path / "out", adapter, progress=stop_half_way, **options)
    shutil.rmtree(adapter)
    changed_alpha(world, tmp_path / "adapter")
    with pytest.raises(StorageError, match=r"unfinished result of other inputs or options \(differs in fingerprints\)"):
        edit(world, tmp_path / "out", adapter, **options)


def write_between_the_samples(world, folder, value):
    """Change a number that no fingerprint looks at."""
    tensors = weights(folder)
    tensors[decoder_key(world)].view(-1)[200] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "killed"])
def test_an_input_file_written_since_is_noticed_where_its_fingerprint_is_the_same(
    finished, world, tmp_path, monkeypatch
):
    monkeypatch.setattr("holdfast.checkpoints.fingerprint._SAMPLE_BYTES", 16)
    after = shutil.copytree(world.after, tmp_path / "after")
    write_between_the_samples(world, after, 0.0)
    options = {"shard_bytes": 9_000}
    if finished:
        edit(world, tmp_path / "out", after, **options)
    else:
        with pytest.raises(StopError):
            edit(world, tmp_path / "out", after, progress=stop_half_way, **options)
    made, record = (tmp_path / "out", "out") if finished else (tmp_path / ".out.partial", ".out.partial/folder")
    write_between_the_samples(world, after, 1.0)
    expected = rf"{made} was made from files .*AFTER model\.safetensors \(1 of 2\) was .* remove {made} or choose"
    with pytest.raises(StorageError, match=expected):
        edit(world, tmp_path / "out", after, **options)
    assert f"remove {tmp_path / record / 'inputs.json'} to keep" in str(
        refused(world, tmp_path / "out", after, options)
    )
    (tmp_path / record / "inputs.json").unlink()
    edit(world, tmp_path / "out", after, **options)


def refused(world, out, after, options):
    with pytest.raises(StorageError) as caught:
        edit(world, out, after, **options)
    return caught.value


def test_another_tokenizer_or_template_is_another_edit(world, tmp_path):
    after = shutil.copytree(world.after, tmp_path / "after")
    edit(world, tmp_path / "out", after)
    (after / "chat_template.jinja").write_text("other")
    with pytest.raises(StorageError, match=r"differs in side_files"):
        edit(world, tmp_path / "out", after)


def test_a_linked_out_is_written_where_the_link_points(world, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    edit(world, tmp_path / "link")
    assert (tmp_path / "disk" / "out" / "edit.json").is_file() and (tmp_path / "link").is_symlink()
    edit(world, tmp_path / "link")


@pytest.mark.parametrize("part", ["lm_head.weight", "multi_modal_projector.linear_2.weight"])
def test_nan_in_a_tensor_that_is_only_copied_is_found(part, world, tmp_path):
    def spoil(tensors):
        key = next(key for key in tensors if key.endswith(part))
        tensors[key].view(-1)[7:8].fill_(float("nan"))

    after = changed_copy(world.after, tmp_path / "after", spoil)
    with pytest.raises(NumericalError, match=rf"{part} holds NaN or inf in .*after.*would be copied"):
        edit(world, tmp_path / "out", after)
    assert not (tmp_path / "out").exists()


def test_progress_counts_layers(world, tmp_path):
    seen = []
    edit(
        world, tmp_path / "out", progress=lambda event, **values: seen.append((event, values["done"], values["total"]))
    )
    count = len(world.curvature.modules)
    assert seen == [("edit_layer", i + 1, count) for i in range(count)]


def changed_copy(folder, target, change):
    shutil.copytree(folder, target)
    tensors = weights(target)
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def decoder_key(world):
    return next(key for key in weights(world.before) if key.endswith("layers.0.mlp.up_proj.weight"))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            lambda t, k: t.update({k: t[k][:, :-1].contiguous()}),
            CheckpointError,
            "must descend from one base model",
        ),
        (lambda t, k: t.update({k: t[k].to(torch.int8)}), CheckpointError, "is I8 after and BF16 before"),
        (lambda t, k: t.pop(k), CheckpointError, "AFTER .* has not"),
        (lambda t, k: t[k].view(-1)[5:6].fill_(float("nan")), NumericalError, "up_proj: NaN, inf"),
        (lambda t, k: t[k].view(-1)[5:6].fill_(float("inf")), NumericalError, "up_proj: NaN, inf"),
    ],
    ids=["shape", "dtype", "missing", "nan", "inf"],
)
def test_a_pair_that_does_not_belong_together_is_refused(change, error, message, world, tmp_path):
    key = decoder_key(world)
    after = changed_copy(world.after, tmp_path / "after", lambda tensors: change(tensors, key))
    with pytest.raises(error, match=message):
        edit(world, tmp_path / "out", after)
    assert not (tmp_path / "out").exists()


def unrelated(world, target):
    """AFTER with the shapes of BEFORE and weights of its own."""

    def draw(tensors):
        generator = torch.Generator().manual_seed(11)
        for key, value in tensors.items():
            if "_proj" in key:
                noise = torch.randn(value.shape, generator=generator) * value.float().std()
                tensors[key] = noise.to(value.dtype)

    return changed_copy(world.after, target, draw)


def test_weights_of_another_base_of_equal_shapes_are_refused_unless_allowed(world, tmp_path):
    other = unrelated(world, tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"has nothing in common before and after \(cosine -?0\.0"):
        edit(world, tmp_path / "out", other)
    report = edit(world, tmp_path / "allowed", other, allow_other_base=True)
    assert report.mean("relative_change") == pytest.approx(2**0.5, rel=0.1)


def test_an_adapter_that_names_another_base_is_warned_of(world, tmp_path):
    assert not edit(world, tmp_path / "own", world.adapter).warnings
    moved = shutil.copytree(world.adapter, tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "llava-hf/other"}))
    report = edit(world, tmp_path / "out", moved)
    assert report.warnings == [
        f"the adapter was trained on llava-hf/other by its own record; BEFORE is {world.before}",
    ]


def test_nan_in_a_base_that_the_rule_does_not_read_is_found(world, tmp_path):
    key = decoder_key(world)
    before = changed_copy(world.before, tmp_path / "b", lambda t: t[key].view(-1)[5:6].fill_(float("nan")))
    with pytest.raises(NumericalError, match=r"up_proj: NaN or inf in w_prev; BEFORE is damaged"):
        edit_checkpoint(
            before,
            world.adapter,
            rule=HpaRule(HpaConfig(projection="none")),
            curvature=world.curvature,
            out=tmp_path / "out",
            verify=False,
        )


def test_the_report_carries_the_calibrations_record(world, tmp_path):
    first, second = world.curvature.modules[:2]
    record = {"sequences": 3, "tokens_over_width": {first: 1.5}, "fallbacks": {first: ["damping 0.02"]}}
    known = with_meta(
        world.curvature,
        config={"damping": 0.01, "activations": "old"},
        inputs=[[first, second]],
        sets={"safety": record, "task": {"tokens_over_width": {first: 9.0}}},
    )
    report = edit(world, tmp_path / "out", curvature=known)
    assert report.inputs["calibration"]["config"]["damping"] == 0.01
    for row in report.layers[:2]:
        assert row["tokens_over_width"] == {"safety": 1.5, "task": 9.0}
        assert row["fallbacks"] == {"safety": ["damping 0.02"]}
    assert "fallbacks" not in report.layers[2]
    assert any(TASK_ON_BEFORE in warning for warning in report.warnings)


def test_a_layer_that_no_tensor_holds_is_named(world, tmp_path):
    regrouped = with_meta(world.curvature, weight_keys={world.curvature.modules[0]: []})
    with pytest.raises(CheckpointError, match=r"No tensor of .* is the weight of .* regroups weights"):
        edit(world, tmp_path / "out", curvature=regrouped)


def test_another_architecture_is_refused(world, tmp_path):
    after = changed_copy(world.after, tmp_path / "after", lambda tensors: None)
    (after / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    with pytest.raises(CheckpointError, match=r"is a 'llava' model and AFTER .* a 'qwen2_vl' model"):
        edit(world, tmp_path / "out", after)


def with_meta(curvature, **meta):
    return replace(curvature, meta={**curvature.meta, **meta})


def rename(curvature, old, new):
    def renamed(values):
        return {name.replace(old, new): value for name, value in values.items()}

    meta = {**curvature.meta, "blocks": renamed(curvature.meta["blocks"])}
    return Curvature(safety=renamed(curvature.safety), task=renamed(curvature.task), meta=meta)


def test_a_calibration_of_another_model_is_refused(world, tmp_path):
    foreign = with_meta(
        world.curvature, model={"before": {"name": "elsewhere", "fingerprint": "f" * 64, "adapters": []}}
    )
    with pytest.raises(CalibrationError, match=r"made with elsewhere \(weights ffffffffffff\.\.\.\)"):
        edit(world, tmp_path / "out", curvature=foreign)
    edit(world, tmp_path / "out", curvature=foreign, allow_other_calibration=True)
    with pytest.raises(CalibrationError, match="has no such weight"):
        edit(world, tmp_path / "none", curvature=rename(world.curvature, "up_proj", "gate_up_proj"))
    one = next(iter(world.curvature.modules))
    narrow = replace(
        world.curvature,
        safety={**world.curvature.safety, one: torch.ones(3)},
        task={**world.curvature.task, one: torch.ones(3)},
    )
    with pytest.raises(CalibrationError, match="it has 3 input columns for"):
        edit(world, tmp_path / "none", curvature=narrow)
    fused = with_meta(world.curvature, weight_keys={one: ["a.weight", "b.weight"]})
    with pytest.raises(CheckpointError, match="is stored as 2 tensors"):
        edit(world, tmp_path / "none", curvature=fused)


def made_of(world, before, after, activations="each"):
    """The calibration, as if made of two of: before, after, other."""

    def identity(name):
        with open_checkpoint(getattr(world, name) if name != "other" else world.before) as opened:
            content = "f" * 64 if name == "other" else fingerprint(opened.base)
            return {"name": name, "fingerprint": content, "adapters": []}

    model = {"before": identity(before), "after": identity(after)}
    return with_meta(world.curvature, model=model, config={"activations": activations})


TASK_ON_BEFORE = "measured the task set's inputs on BEFORE"
SAFETY_ON_AFTER = "measured the safety set's inputs on AFTER"


@pytest.mark.parametrize(
    "before, after, activations, warning",
    [
        ("before", "after", "each", None),
        ("before", "before", "each", TASK_ON_BEFORE),
        ("before", "before", "old", TASK_ON_BEFORE),
        ("before", "after", "old", TASK_ON_BEFORE),
        ("before", "after", "new", SAFETY_ON_AFTER),
    ],
)
def test_a_calibration_of_these_models_is_accepted_and_the_report_says_whose_it_is(
    before, after, activations, warning, world, tmp_path
):
    report = edit(world, tmp_path / "out", curvature=made_of(world, before, after, activations))
    found = [sentence for sentence in report.warnings if "the calibration measured" in sentence]
    assert len(found) == (warning is not None) and all(warning in sentence for sentence in found)


@pytest.mark.parametrize(
    "before, after, activations, message",
    [
        ("after", "before", "each", "measured the safety set on AFTER, the task set on BEFORE; expected"),
        ("after", "after", "each", "measured the safety set on AFTER, the task set on AFTER; expected"),
        ("after", "after", "old", "measured the safety set on AFTER, the task set on AFTER; expected"),
        ("before", "before", "new", "measured the safety set on BEFORE, the task set on BEFORE; expected"),
        ("before", "other", "each", "of another model: it was made with other"),
    ],
)
def test_a_calibration_with_the_roles_mixed_up_is_refused_and_never_described_falsely(
    before, after, activations, message, world, tmp_path
):
    mixed_up = made_of(world, before, after, activations)
    with pytest.raises(CalibrationError, match=message):
        edit(world, tmp_path / "out", curvature=mixed_up)
    report = edit(world, tmp_path / "out", curvature=mixed_up, allow_other_calibration=True)
    said = " ".join(report.warnings)
    assert ("task set's inputs on BEFORE" in said) == ("task set on BEFORE" in message)
    assert ("safety set's inputs on AFTER" in said) == ("safety set on AFTER" in message)
    assert ("task set's inputs on other weights" in said) == (after == "other")


def test_a_calibration_of_the_adapter_with_another_scaling_is_refused(world, tmp_path):
    with open_checkpoint(world.before) as opened:
        base = fingerprint(opened.base)
    adapter = LoraAdapter(world.adapter)
    side = {"name": "b", "fingerprint": base, "adapters": []}
    for scaling, number in ((fingerprint(adapter), 0), ("e" * 64, 1)):
        tuned = {**side, "adapters": [{"name": "a", "fingerprint": scaling}]}
        known = with_meta(world.curvature, model={"before": side, "after": tuned}, config={"activations": "each"})
        if number == 0:
            edit(world, tmp_path / "out", world.adapter, curvature=known)
            continue
        with pytest.raises(CalibrationError, match=r"other settings .* made by an earlier version .*Calibrate again"):
            edit(world, tmp_path / "none", world.adapter, curvature=known)
    adapter.close()


def test_options_that_make_no_sense_say_so(world, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="export is 'gguf'; expected one of dense, adapter"):
        edit(world, out, export="gguf")
    with pytest.raises(ConfigError, match="coefficient is 'maybe'"):
        edit(world, out, coefficient="maybe")
    with pytest.raises(CalibrationError, match="The rule 'hpa' weighs safety against the task"):
        edit(world, out, curvature=None)
    with pytest.raises(AdapterError, match="needs AFTER to be a LoRA adapter on BEFORE"):
        edit(world, out, export="adapter")
    with pytest.raises(AdapterError, match="'halfway' has no closed form"):
        edit(world, out, world.adapter, export="adapter", rule=Halfway())
    with pytest.raises(CheckpointError, match=r"BEFORE .* is an adapter"):
        edit_checkpoint(world.adapter, world.after, rule=HpaRule(), curvature=world.curvature, out=out)
    assert not list(tmp_path.iterdir())


def test_an_adapter_elsewhere_or_edited_before_is_refused(world, tmp_path):
    elsewhere = shutil.copytree(world.adapter, tmp_path / "elsewhere")
    tensors = load_file(elsewhere / "adapter_model.safetensors")
    part = {key: value for key, value in tensors.items() if ".layers.0.mlp.up_proj." in key}
    save_file(part, elsewhere / "adapter_model.safetensors")
    only = rename(world.curvature, "nothing", "nothing")
    rest = {name for name in only.modules if "layers.0.mlp.up_proj" not in name}
    without = Curvature(
        safety={n: only.safety[n] for n in rest}, task={n: only.task[n] for n in rest}, meta=dict(only.meta)
    )
    with pytest.raises(AdapterError, match=r"changes none of the .* calibrated layers"):
        edit(world, tmp_path / "out", elsewhere, curvature=without)
    edit(world, tmp_path / "kept", world.adapter, export="adapter", coefficient="keep")
    with pytest.raises(AdapterError, match="is the result of an edit already"):
        edit(world, tmp_path / "out", tmp_path / "kept")


def test_an_adapter_beyond_the_calibrated_layers_is_carried_over_and_warned_of(world, tmp_path):
    names = [name for name in world.curvature.modules if "down_proj" not in name]
    fewer = Curvature(
        safety={n: world.curvature.safety[n] for n in names},
        task={n: world.curvature.task[n] for n in names},
        meta=dict(world.curvature.meta),
    )
    dense = edit(world, tmp_path / "dense", world.adapter, curvature=fewer)
    adapter = edit(world, tmp_path / "adapter", world.adapter, curvature=fewer, export="adapter")
    for report in (dense, adapter):
        assert any("mlp.down_proj" in warning and "without protection" in warning for warning in report.warnings)

    class Value:
        base = str(world.before)
        adapters = (str(world.adapter),)

    out = weights(tmp_path / "dense")
    with open_checkpoint(Value()) as merged:
        for key in out:
            if "down_proj" in key:
                assert torch.equal(out[key], merged.read(key))


def test_a_damaged_report_is_refused(world, tmp_path):
    with pytest.raises(CheckpointError, match=r"is no result of `holdfast edit`"):
        EditReport.load(tmp_path / "edit.json")
    (tmp_path / "edit.json").write_text('{"format_version": 99}')
    with pytest.raises(CheckpointError, match="has report format 99"):
        EditReport.load(tmp_path / "edit.json")
    (tmp_path / "edit.json").write_text('{"format_version": 1, "rule": "hpa"}')
    with pytest.raises(CheckpointError, match="no edit report that can be read"):
        EditReport.load(tmp_path / "edit.json")


# A process of its own that starts without pytest and without transformers.
SLOW_EDIT = """
import sys, time
from pathlib import Path
from holdfast.checkpoints.curvature_file import Curvature
from holdfast.editing.editor import edit_checkpoint
from holdfast.rules.hpa import HpaRule

plain = HpaRule.edit

def slow(self, layer, w_prev, w_new):
    time.sleep(0.05)
    return plain(self, layer, w_prev, w_new)

HpaRule.edit = slow  # in place: a rule of another class would be another plan

def main(before, after, curvature, out):
    assert "transformers" not in sys.modules
    loaded = Curvature.load(curvature)
    edit_checkpoint(before, after, rule=HpaRule(), curvature=loaded, out=Path(out), shard_bytes=9_000, verify=False)
"""


def test_killed_at_random_moments_an_edit_ends_with_the_same_bytes(world, tmp_path):
    world.curvature.save(tmp_path / "c.safetensors")
    edit(world, tmp_path / "whole", shard_bytes=9_000)
    chance, killed = random.Random(1), 0
    with ForkServer(SLOW_EDIT) as server:
        for number in range(6):
            out = tmp_path / f"out-{number}"
            arguments = (world.before, world.after, tmp_path / "c.safetensors", out)
            status, error = server.run(*arguments, kill_after_s=chance.uniform(0.05, 0.9))
            assert status in (-signal.SIGKILL, 0), error
            killed += status == -signal.SIGKILL
            edit(world, out, shard_bytes=9_000)
            assert folder_bytes(out) == folder_bytes(tmp_path / "whole")
            assert not (tmp_path / f".out-{number}.partial").exists()
    assert killed > 2
