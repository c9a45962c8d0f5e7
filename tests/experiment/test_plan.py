"""`holdfast plan`: planning figures follow what they are made of, and what cannot be planned is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import pico
from holdfast import experiment
from holdfast.checkpoints.merged import open_checkpoint
from holdfast.cli import app
from holdfast.errors import ConfigError, DataError
from holdfast.experiment.plan import BYTES_PER_TRAINED, Devices, plan_run
from holdfast.models.speed import FORWARD_SHARE

ONE = Devices(count=1, flops=1e12)
TRAINING = {"rank": 4, "alpha": 8, "max_steps": 10, "batch_size": 4, "micro_batch_size": 2}


@pytest.fixture
def planned(tmp_path: Path, pico_folder: Path):  # type: ignore[no-untyped-def]
    def plan(devices: Devices = ONE, **training):  # type: ignore[no-untyped-def]
        folder = tmp_path / "files"
        folder.mkdir(exist_ok=True)
        methods = {"seqft": {}, "anchor": {}}
        file = pico.run_file(folder, pico_folder, methods=methods, defaults={"training": TRAINING | training})
        return plan_run(experiment.read_run(file), devices)

    return plan


def test_training_is_counted_from_parameters_steps_and_tokens(planned, pico_folder: Path) -> None:
    found = planned()
    with open_checkpoint(str(pico_folder)) as opened:
        parameters = sum(entry.numel for entry in opened.entries.values())
    tokens = sum(found.tokens.values())  # of one sample of each task; every task takes ten steps of four
    by_hand = 4 * parameters * 10 * 4 * tokens / (FORWARD_SHARE * 1e12)
    assert found.parameters == parameters
    assert found.methods["seqft"].seconds["training"] == pytest.approx(by_hand)
    twice = planned(max_steps=20).methods["seqft"].seconds["training"]
    recomputed = planned(gradient_checkpointing=True).methods["seqft"].seconds["training"]
    assert (twice, recomputed) == pytest.approx((2 * by_hand, 1.5 * by_hand))


def test_only_what_edits_has_an_edit_and_devices_share_all_but_that(planned) -> None:
    one, eight = planned(batch_size=8), planned(replace(ONE, count=8), batch_size=8)
    assert one.methods["seqft"].seconds["calibration and edit"] == 0
    assert one.methods["anchor"].seconds["calibration and edit"] > 0
    for name, method in one.methods.items():
        for phase, seconds in method.seconds.items():
            shared = 1 if phase == "calibration and edit" else 7.2
            assert eight.methods[name].seconds[phase] == pytest.approx(seconds / shared)
        assert eight.methods[name].micro_batch == 1  # of a batch of eight each device has one sample
        assert eight.methods[name].training_bytes <= method.training_bytes


def test_a_batch_that_cannot_be_dealt_out_is_said_by_the_plan_too(planned) -> None:
    found = planned(replace(ONE, count=3), batch_size=4)
    assert "A batch of 4 cannot be dealt out evenly over 3 devices." in found.notes
    assert not any("evenly" in note for note in planned(replace(ONE, count=2), batch_size=4).notes)


def test_memory_follows_the_micro_batch_and_says_which_one_fits(planned) -> None:
    small, large = planned(micro_batch_size=1).methods["seqft"], planned(micro_batch_size=4).methods["seqft"]
    assert small.fits is None and small.training_bytes < large.training_bytes
    between = Devices(count=1, flops=1e12, memory_bytes=(small.training_bytes + large.training_bytes) // 2)
    assert planned(between, micro_batch_size=4).methods["seqft"].fits in (1, 2)
    assert planned(replace(between, memory_bytes=1000)).methods["seqft"].fits == 0
    narrow = planned(replace(ONE, bf16=True), micro_batch_size=4, precision="auto").methods["seqft"]
    assert narrow.training_bytes < planned(micro_batch_size=4, precision="fp32").methods["seqft"].training_bytes
    wider = planned(rank=8, micro_batch_size=1).methods["seqft"]
    assert (wider.training_bytes - small.training_bytes) % (4 * BYTES_PER_TRAINED) == 0


def test_the_frozen_weights_take_what_they_are_loaded_as(tmp_path: Path, pico_folder: Path) -> None:
    """Whatever the precision of the arithmetic: fp32 weights that bf16 arithmetic reads are 4 bytes each."""
    folder = tmp_path / "files"
    folder.mkdir()
    config = experiment.read_run(pico.run_file(folder, pico_folder, defaults={"training": TRAINING}))
    devices = replace(ONE, bf16=True)
    of = {
        dtype: plan_run(replace(config, methods={"seqft": {"train_dtype": dtype}}), devices)
        for dtype in ("float32", "bfloat16")
    }
    wide, narrow = (of[dtype].methods["seqft"].training_bytes for dtype in ("float32", "bfloat16"))
    assert wide - narrow == 2 * of["float32"].parameters
    kept = {
        store: plan_run(replace(config, store_dtype=store), devices).methods["seqft"] for store in (None, "float32")
    }
    assert kept["float32"].disk_bytes > kept[None].disk_bytes >= 3 * 2 * of["float32"].parameters


def test_all_calibration_answers_are_counted_where_none_are_named(planned, tmp_path: Path, pico_folder: Path) -> None:
    folder = tmp_path / "more"
    folder.mkdir()
    config = experiment.read_run(pico.run_file(folder, pico_folder, methods={"anchor": {}}))

    def edit(**options) -> float:  # type: ignore[no-untyped-def]
        found = plan_run(replace(config, methods={"anchor": {"task_samples": 4, **options}}), ONE)
        return found.methods["anchor"].seconds["calibration and edit"]

    assert edit(safety_samples=None) == edit(safety_samples=1000) > edit(safety_samples=1)


def test_what_cannot_be_planned_is_said(tmp_path: Path, pico_folder: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    config = experiment.read_run(pico.run_file(folder, pico_folder))
    moved = replace(config, stream=replace(config.stream, root=str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match="holdfast doctor"):
        plan_run(moved, ONE)
    for count, flops in ((0, 1.0), (1, 0.0)):
        with pytest.raises(ConfigError, match="expected more than 0"):
            Devices(count=count, flops=flops)


def test_the_verb_prints_a_table_or_json(tmp_path: Path, pico_folder: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    file = pico.run_file(folder, pico_folder, defaults={"training": TRAINING})
    done = CliRunner().invoke(app, ["plan", str(file), "--gpus", "8", "--memory", "1kB", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["devices"] == {"count": 8, "flops": 312e12, "memory_bytes": 1000}
    assert found["methods"]["seqft"]["largest_micro_batch_size"] == 0
    shown = CliRunner().invoke(app, ["plan", str(file), "--gpus", "8", "--memory", "1kB"])
    assert "no micro batch fits" in shown.output and "evaluation" in shown.output
