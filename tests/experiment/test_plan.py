"""`holdfast plan`: planning figures follow what they are made of, and what cannot be planned is said."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import model_zoo
import pico
from holdfast import experiment
from holdfast.checkpoints.merged import open_checkpoint
from holdfast.cli import app
from holdfast.data.examine import Diagnosis
from holdfast.data.types import Stream
from holdfast.errors import CalibrationError, ConfigError, DataError
from holdfast.experiment import RunConfig, build_methods
from holdfast.experiment.plan import BYTES_PER_TRAINED, EDIT, EVALUATION, TRAINING, Devices, plan_run, tuned_linears
from holdfast.experiment.together import refuse_together
from holdfast.methods import METHODS
from holdfast.models.families import editable_linears
from holdfast.models.speed import FORWARD_SHARE
from holdfast.share import Share

ONE = Devices(count=1, flops=1e12)
OPTIONS = {"rank": 4, "alpha": 8, "max_steps": 10, "batch_size": 4, "micro_batch_size": 2}


# Without these a method cannot be built.
NEEDED: dict[str, dict[str, Any]] = {
    "safe_lora": {"unaligned": "nowhere"},
    "resta": {"unaligned": "nowhere"},
    "moelora": {"experts": 2},
}
LEARNS_NOTHING = {"frozen"}
# Whose steps walk over calibration samples. Every other method makes none, whatever options it has.
CALIBRATES = {
    *("hpa", "hpa_benign", "hpa_eps", "hpa_phi", "hpa_no_projection", "cram_hpa"),
    *("anchor", "anchor_no_past", "anchor_no_benign", "anchor_no_screen", "cram_anchor"),
    *("interpolation_matched", "largest_change_matched", "random_columns_matched"),
    *("safe_delta", "model_tailor", "guardspace"),
}


@pytest.fixture
def config(tmp_path: Path, pico_folder: Path) -> RunConfig:
    """A run of plain tuning."""
    folder = tmp_path / "configured"
    folder.mkdir()
    return experiment.read_run(pico.run_file(folder, pico_folder, defaults={"training": OPTIONS}))


def of_methods(config: RunConfig, *names: str, **options: Any) -> RunConfig:
    """`config` with these methods, each with those of the options that it has."""
    chosen = {name: NEEDED.get(name, {}) for name in names}
    return replace(config, methods=chosen, defaults={**config.defaults, **options})


@pytest.fixture
def planned(tmp_path: Path, pico_folder: Path):  # type: ignore[no-untyped-def]
    def plan(devices: Devices = ONE, **training):  # type: ignore[no-untyped-def]
        folder = tmp_path / "files"
        folder.mkdir(exist_ok=True)
        methods = {"seqft": {}, "anchor": {}}
        file = pico.run_file(folder, pico_folder, methods=methods, defaults={"training": OPTIONS | training})
        return plan_run(experiment.read_run(file), devices)

    return plan


def test_training_is_counted_from_parameters_steps_and_tokens(planned, pico_folder: Path) -> None:
    found = planned()
    with open_checkpoint(str(pico_folder)) as opened:
        parameters = sum(entry.numel for entry in opened.entries.values())
    tokens = sum(found.tokens.values())  # of one sample of each task; every task takes ten steps of four
    by_hand = 4 * parameters * 10 * 4 * tokens / (FORWARD_SHARE * 1e12)
    assert found.parameters == parameters
    assert found.methods["seqft"].seconds[TRAINING] == pytest.approx(by_hand)
    twice = planned(max_steps=20).methods["seqft"].seconds[TRAINING]
    recomputed = planned(gradient_checkpointing=True).methods["seqft"].seconds[TRAINING]
    assert (twice, recomputed) == pytest.approx((2 * by_hand, 1.5 * by_hand))


def test_only_what_edits_has_an_edit_and_devices_share_all_but_that(planned) -> None:
    one, eight = planned(batch_size=8), planned(replace(ONE, count=8), batch_size=8)
    assert one.methods["seqft"].seconds[EDIT] == 0 < one.methods["anchor"].seconds[EDIT]
    for name, method in one.methods.items():
        for phase, seconds in method.seconds.items():
            shared = 1 if phase == EDIT else 7.2
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
    config = experiment.read_run(pico.run_file(folder, pico_folder, defaults={"training": OPTIONS}))
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
        return found.methods["anchor"].seconds[EDIT]

    assert edit(safety_samples=None) == edit(safety_samples=1000) > edit(safety_samples=1)


def test_what_cannot_be_planned_is_said(tmp_path: Path, pico_folder: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    config = experiment.read_run(pico.run_file(folder, pico_folder))
    moved = replace(config, stream=replace(config.stream, root=str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match="holdfast doctor"):
        plan_run(moved, ONE)
    nothing: tuple[dict[str, Any], ...] = (
        {"count": 0},
        *({"flops": flops} for flops in (0.0, -1.0, math.nan, math.inf, -math.inf)),
        *({"memory_bytes": size} for size in (0, -1)),
    )
    for changed in nothing:
        with pytest.raises(ConfigError, match=r"expected (one device or more, and a finite number above 0|1 or more)"):
            replace(ONE, **changed)


@pytest.mark.parametrize("told", ["it is empty", "It is empty.", "3 ids: a, b, c, ..."])
def test_what_is_wrong_with_the_data_ends_in_one_full_stop(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    found = Diagnosis(stream="s", root=".")
    found.add("error", "colour", told)
    monkeypatch.setattr("holdfast.experiment.plan.examine", lambda spec, open_images: found)
    with pytest.raises(DataError) as caught:
        plan_run(config, ONE)
    said = str(caught.value).replace("...", "\u2026")
    assert said.startswith(f"colour: {told[:5]}") and ".." not in said
    assert said.count(". A plan needs") + said.count("\u2026 A plan needs") == 1


@pytest.mark.parametrize("name", sorted(METHODS))
def test_of_each_method_what_a_run_of_it_does_is_planned(config: RunConfig, name: str) -> None:
    """Training of what learns, a calibration of what makes one, and several devices for what several may learn."""
    chosen = of_methods(config, name, training=OPTIONS | {"micro_batch_size": 4}, task_samples=4)
    method = build_methods(chosen)[name]
    several = Devices(count=2, flops=1e12)
    one, two = (plan_run(chosen, devices) for devices in (ONE, several))
    alone, shared = one.methods[name], two.methods[name]
    assert (alone.seconds[TRAINING] == 0) == (name in LEARNS_NOTHING)
    assert (alone.training_bytes == 0) == (alone.disk_bytes == 0) == (name in LEARNS_NOTHING)
    assert (alone.seconds[EDIT] == 0) == (name not in CALIBRATES)
    # Of safety answers: what its own check says when there are none.
    try:
        method.check_stream(Stream(name="s", tasks=[]))  # type: ignore[attr-defined]
        safety = False
    except CalibrationError:
        safety = True
    fewer = plan_run(of_methods(chosen, name, safety_samples=1, benign_samples=0), ONE).methods[name]
    assert (fewer.seconds[EDIT] < alone.seconds[EDIT]) == (safety and name in CALIBRATES)
    # Of devices: what a run of two processes says to it.
    try:
        refuse_together(chosen, {name: method}, Share(world=2))
        refused = False
    except ConfigError:
        refused = True
    named = [note for note in two.notes if note.startswith(f"{name}: learned in one process alone")]
    assert shared.devices == (1 if refused else 2) and len(named) == refused
    for phase in (TRAINING, EVALUATION):
        assert shared.seconds[phase] == pytest.approx(alone.seconds[phase] / (1 if refused else 1.8))
    assert shared.seconds[EDIT] == alone.seconds[EDIT]
    assert shared.micro_batch == (4 if refused else 2)


def test_methods_that_share_devices_and_one_that_cannot_stand_in_one_plan(config: RunConfig) -> None:
    several = replace(ONE, count=2)
    mixed = plan_run(of_methods(config, "seqft", "osf", "many"), several)
    apart = {name: plan_run(of_methods(config, name), several) for name in ("seqft", "osf", "many")}
    assert {name: one.methods[name] for name, one in apart.items()} == mixed.methods
    assert sum("osf, many" in note for note in mixed.notes) == 1 and any("whole copies" in n for n in mixed.notes)
    # theta_0 is asked once, by all devices as soon as one method of the run has a use for them.
    assert mixed.before == apart["seqft"].before and mixed.before[EVALUATION] < apart["osf"].before[EVALUATION]
    assert not any("whole copies" in note for note in apart["osf"].notes)
    served = replace(config, evaluation=replace(config.evaluation, backend="vllm"))
    assert plan_run(served, several).methods["seqft"].devices == 1


@pytest.mark.parametrize(("name", "named"), [("seqft", True), ("hpa", True), ("cram", False), ("osf", False)])
def test_where_nothing_fits_the_way_to_share_the_base_out_is_named(config: RunConfig, name: str, named: bool) -> None:
    """Of methods that have it, and where something fits, of none."""
    for count in (1, 2):
        tight, roomy = (Devices(count=count, flops=1e12, memory_bytes=size) for size in (1000, 2**40))
        found, fitting = (plan_run(of_methods(config, name), devices) for devices in (tight, roomy))
        assert found.methods[name].fits == 0
        assert any(note.startswith(f"{name}: no micro batch") and "--fsdp" in note for note in found.notes) == named
        assert not any("--fsdp" in note for note in fitting.notes)


def test_what_theta_0_is_asked_before_any_task_is_counted_once_in_full(config: RunConfig) -> None:
    few = replace(config, evaluation=replace(config.evaluation, limit_between=1))
    one, both = plan_run(of_methods(few, "frozen"), ONE), plan_run(of_methods(few, "frozen", "seqft"), ONE)
    first, last, unlimited = (
        plan_run(of_methods(changed, "frozen"), ONE)
        for changed in (
            replace(few, tasks=(few.stream.tasks[0].name,)),
            replace(few, tasks=(few.stream.tasks[1].name,)),
            of_methods(config, "frozen"),
        )
    )
    # A stream of one task asks everything after it, as theta_0 is asked before it.
    for single in (first, last):
        assert 0 < single.before[EVALUATION] == pytest.approx(single.methods["frozen"].seconds[EVALUATION])
    assert max(first.before[EVALUATION], last.before[EVALUATION]) < one.before[EVALUATION]
    assert one.before == both.before == unlimited.before  # what is only looked at along the way is none of it
    assert one.methods["frozen"].seconds[EVALUATION] < unlimited.methods["frozen"].seconds[EVALUATION]
    methods = sum(sum(method.seconds.values()) for method in both.methods.values())
    assert both.seconds == pytest.approx(sum(both.before.values()) + methods)
    assert both.to_json()["seconds"] == both.seconds


def test_theta_0s_answers_to_calibrate_on_are_counted_as_they_are_asked(config: RunConfig) -> None:
    """Two forbidden prompts of one category; `unsafe.jsonl` has four, `benign.jsonl` two."""
    spec = config.stream.safety[0]

    def answers(devices: Devices = ONE, **changes: Any) -> float:
        return plan_run(replace(config, **changes), devices).before[EDIT]

    safety, benign = config.safety_calibration, config.benign_calibration
    plain = answers()
    assert plain > 0
    assert answers(safety_calibration=replace(safety, max_new_tokens=400)) > plain
    assert answers(safety_calibration=replace(safety, per_category=1)) < plain
    assert answers(safety_calibration=replace(safety, per_category=9)) == plain  # there are no more
    assert answers(safety_calibration=replace(safety, prompts=spec, per_category=9)) > plain
    helped = answers(benign_calibration=replace(benign, prompts=spec))
    assert helped > answers(benign_calibration=replace(benign, prompts=spec, limit=1)) > plain
    assert answers(replace(ONE, count=2)) == plain  # the first process asks alone
    assert answers(stream=replace(config.stream, safety_calibration=None)) == 0
    written = Path(config.stream.root) / "prompts.jsonl"
    lines = [{**json.loads(line), "answer": "No."} for line in written.read_text().splitlines()]
    written.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert answers() == 0  # they have answers


@pytest.mark.parametrize("family", sorted(model_zoo.BUILDERS))
def test_what_is_planned_to_be_tuned_is_what_is_tuned(config: RunConfig, family: str, tmp_path: Path) -> None:
    """In every family: nothing of a tower, whatever it is called, and fused layers as they are."""
    model, processor = model_zoo.BUILDERS[family]()
    model.save_pretrained(tmp_path / family)
    processor.save_pretrained(tmp_path / family)
    tuned = {name: tuple(linear.weight.shape) for name, linear in editable_linears(model).items()}
    assert tuned_linears(tmp_path / family) == tuned
    of = {
        rank: plan_run(
            replace(config, model=str(tmp_path / family), defaults={"training": OPTIONS | {"rank": rank}}), ONE
        )
        for rank in (4, 5)
    }
    more = of[5].methods["seqft"].training_bytes - of[4].methods["seqft"].training_bytes
    assert more == BYTES_PER_TRAINED * sum(map(sum, tuned.values()))


def test_the_verb_prints_a_table_or_json(tmp_path: Path, pico_folder: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    options = OPTIONS | {"rank": 2048}  # more than 1 MiB to train
    file = pico.run_file(folder, pico_folder, defaults={"training": options})
    done = CliRunner().invoke(app, ["plan", str(file), "--gpus", "8", "--memory", "1MiB", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["devices"] == {"count": 8, "flops": 312e12, "memory_bytes": 2**20}
    assert found["methods"]["seqft"]["largest_micro_batch_size"] == 0
    assert found["before_any_task"]["seconds"][EVALUATION] > 0
    shown = CliRunner().invoke(app, ["plan", str(file), "--gpus", "8", "--memory", "1MiB"], env={"COLUMNS": "160"})
    for words in ("no micro batch fits", "evaluation", "before any task", "--fsdp"):
        assert words in shown.output


@pytest.mark.parametrize(
    ("options", "told"),
    [
        *((["--tflops", speed], f"--tflops is {speed}") for speed in ("nan", "inf", "0", "1e+300")),
        (["--tflops=-1"], "--tflops is -1"),
        (["--memory", "80"], "--memory 80 is 80 bytes; expected a size such as 80GiB."),
        (["--memory", "0.5B"], "is below one byte"),
    ],
)
def test_a_speed_or_a_memory_that_is_none_is_refused(config: RunConfig, options: list[str], told: str) -> None:
    file = Path(config.stream.root) / "run.yaml"
    done = CliRunner().invoke(app, ["plan", str(file), "--gpus", "2", "--json", *options])
    assert isinstance(done.exception, ConfigError) and told in str(done.exception)
    assert not done.stdout
