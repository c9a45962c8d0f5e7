"""The anchored edit in a stream: what is calibrated on what, what is carried, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from holdfast.editing.report import EditReport

import cram_kit
from holdfast import methods
from holdfast.checkpoints.gram_store import GramStore
from holdfast.checkpoints.merged import open_checkpoint
from holdfast.config import decode
from holdfast.data.types import Sample, Stream
from holdfast.errors import CalibrationError, ConfigError, UnknownNameError
from holdfast.functional.anchor import anchor_weight
from holdfast.methods import seqft
from holdfast.methods._glue.anchor_step import PAST_FOLDER
from holdfast.methods.anchor import Anchor, AnchorMethodConfig
from holdfast.methods.cram_anchor import CramAnchor, CramAnchorConfig
from holdfast.methods.hpa import Hpa, HpaMethodConfig
from holdfast.rules.anchor import AnchorConfig
from holdfast.stream.protocol import Checkpoint, TaskContext
from holdfast.training.training_config import TrainingConfig

NO = "I'm sorry, I can't help with that."
TRAINING = TrainingConfig(rank=4, alpha=8, dropout=0.0, max_steps=3, batch_size=4, learning_rate=0.02, precision="fp32")
BENIGN = [Sample.single(f"benign-{i}", f"Allowed {i}, please.", "Here it is.") for i in range(3)]


@pytest.fixture
def stream(pico_stream: Stream) -> Stream:
    return replace(pico_stream, benign_calibration=BENIGN)


def method(**changes) -> Anchor:
    return Anchor(AnchorMethodConfig(**{"training": TRAINING, "task_samples": 6, **changes}), name="anchor")


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Ids that theta_0 refuses, to be filled by a test."""
    ids: set[str] = set()

    def screen(loaded, samples, is_refusal, **options):
        from holdfast.calibration.screening import split

        return split(samples, {at: NO for at, s in enumerate(samples) if s.id in ids})

    monkeypatch.setattr(seqft, "screen", screen)
    return ids


def context(stream: Stream, model: Path, folder: Path, step: int = 0, last: Checkpoint | None = None) -> TaskContext:
    return cram_kit.context(stream, model, folder, step, last)


def run(made: Anchor, ctx: TaskContext) -> tuple[Checkpoint, Checkpoint]:
    trained = made.train_task(ctx)
    return trained, made.end_task(ctx, trained)


def test_every_layer_is_the_closed_form_of_the_grams_of_its_step(stream, pico_folder, tmp_path, refusing):
    made = method(edit=AnchorConfig(safety_weight=0.8, past_weight=0.5, benign_share=None))
    refusing.add("colour-train-3")
    previous = None
    for step in range(2):
        ctx = context(stream, pico_folder, tmp_path, step, previous)
        trained, final = run(made, ctx)
        grams = {name: GramStore.open(ctx.scratch_dir / "grams" / name) for name in ("safety", "task")}
        past = GramStore.open(ctx.previous_carry_dir / PAST_FOLDER) if step else None
        report = EditReport.load(ctx.work_dir / "edit.json")
        with open_checkpoint(ctx.previous) as old, open_checkpoint(trained) as new, open_checkpoint(final) as out:
            assert len(report.layers) == len(grams["task"].modules) == 14
            for name in grams["task"].modules:
                key = f"{name}.weight"
                expected = anchor_weight(
                    old.read_float(key),
                    new.read_float(key),
                    grams["task"].gram(name),
                    grams["safety"].gram(name),
                    None if past is None else past.gram(name),
                    safety_weight=0.8,
                    past_weight=0.5,
                )
                torch.testing.assert_close(out.read_float(key), expected, rtol=1e-3, atol=1e-5)
        # Own safe answers, benign answers, and what theta_0 refused of the task.
        screened = json.loads((ctx.work_dir / "screen.json").read_text())
        refused = [row["id"] for row in screened["refused"]]
        assert set(refused) <= refusing and screened["asked"] == 6 and screened["kept"] == 6 - len(refused)
        assert grams["safety"].meta["samples"] == 2 + 3 + len(refused)
        assert grams["task"].meta["samples"] == 6 - len(refused)
        carried = GramStore.open(ctx.carry_dir / PAST_FOLDER)
        assert carried.meta["steps"] == step + 1 and carried.meta["tasks"] == list(ctx.task_names)
        previous = final


def test_no_sample_is_carried_only_second_moments(stream, pico_folder, tmp_path, refusing):
    ctx = context(stream, pico_folder, tmp_path)
    run(method(), ctx)
    carried = [p for p in ctx.carry_dir.rglob("*") if p.is_file()]
    assert {p.suffix for p in carried} == {".safetensors", ".json"}
    texts = [t.text for s in stream.tasks[0].train for t in s.turns]
    assert not any(text in p.read_text() for p in carried if p.suffix == ".json" for text in texts if len(text) > 6)


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_without_a_past_weight_nothing_is_carried(stream, pico_folder, tmp_path, refusing, weight):
    ctx = context(stream, pico_folder, tmp_path)
    run(method(edit=AnchorConfig(past_weight=weight)), ctx)
    assert (ctx.carry_dir / PAST_FOLDER).is_dir() is bool(weight)


@pytest.mark.parametrize("change", [{"name": "another"}, {"seed": 7}, {"gone": True}])
def test_the_past_of_another_stream_is_refused(stream, pico_folder, tmp_path, refusing, change):
    first = context(stream, pico_folder, tmp_path)
    _, final = run(method(), first)
    ctx = context(stream, pico_folder, tmp_path, 1, final)
    if "gone" in change:
        (first.carry_dir / PAST_FOLDER / "index.json").unlink()
    elif "name" in change:
        ctx = replace(ctx, stream=replace(stream, name="another"))
    else:
        ctx = replace(ctx, seed=7)
    trained = method().train_task(ctx)
    with pytest.raises(CalibrationError, match=r"something else|unfinished"):
        method().end_task(ctx, trained)


def test_a_benign_answer_takes_no_refusal_of_the_same_id_away(stream, pico_folder, tmp_path, refusing):
    """Files without ids number their rows: the first of the task and the first benign request are both "0"."""
    ctx = context(stream, pico_folder, tmp_path)
    refusing.update(sample.id for sample in stream.tasks[0].train)
    drawn = seqft.draw(stream.tasks[0].train, 6, seqft.step_seed(ctx))
    refusing.discard(drawn[0].id)
    same = [replace(b, id=s.id) for b, s in zip(stream.benign_calibration, drawn[1:], strict=False)]
    ctx = replace(ctx, stream=replace(stream, benign_calibration=same))
    run(method(), ctx)
    grams = {n: GramStore.open(ctx.scratch_dir / "grams" / n).meta["samples"] for n in ("safety", "benign", "task")}
    assert grams == {"safety": 2 + 5, "benign": 3, "task": 1}


@pytest.mark.parametrize("number", [0, 2, None])
def test_as_many_benign_answers_as_are_asked_for(stream, pico_folder, tmp_path, refusing, number):
    ctx = context(stream, pico_folder, tmp_path)
    run(method(benign_samples=number), ctx)
    assert GramStore.open(ctx.scratch_dir / "grams" / "safety").meta["samples"] == 2
    benign = ctx.scratch_dir / "grams" / "benign"
    assert (GramStore.open(benign).meta["samples"] if benign.exists() else 0) == (3 if number is None else number)


def test_a_benign_share_is_weighed_apart(stream, pico_folder, tmp_path, refusing):
    ctx = context(stream, pico_folder, tmp_path)
    run(method(edit=AnchorConfig(benign_share=0.25)), ctx)
    stores = [GramStore.open(ctx.scratch_dir / "grams" / name).meta["samples"] for name in ("safety", "benign")]
    assert stores == [2, 3]


def test_a_stream_that_lacks_what_is_asked_for_is_refused_at_once(stream, pico_stream):
    with pytest.raises(CalibrationError, match="safety_calibration"):
        method().check_stream(replace(stream, safety_calibration=[]))
    with pytest.raises(CalibrationError, match="benign_calibration"):
        method(benign_samples=5).check_stream(pico_stream)
    with pytest.raises(ConfigError, match="benign_samples"):
        method(benign_samples=-1)


def test_a_task_that_theta_0_refuses_altogether_is_refused(stream, pico_folder, tmp_path, refusing):
    refusing |= {s.id for s in stream.tasks[0].train}
    ctx = context(stream, pico_folder, tmp_path)
    trained = method().train_task(ctx)
    with pytest.raises(CalibrationError, match="refuses all 6 calibration samples"):
        method().end_task(ctx, trained)
    with pytest.raises(CalibrationError, match="refuses all 8 training samples"):
        method(training=replace(TRAINING, screen="drop")).train_task(context(stream, pico_folder, tmp_path / "b"))


@pytest.mark.parametrize("mode", ["off", "report", "drop"])
def test_training_samples_are_screened_as_asked(stream, pico_folder, tmp_path, refusing, mode):
    refusing |= {"colour-train-1", "colour-train-5"}
    ctx = context(stream, pico_folder, tmp_path)
    made = method(training=replace(TRAINING, screen=mode))
    learned = [s.id for s in made.learned(ctx)]
    assert len(learned) == (6 if mode == "drop" else 8) and (mode == "drop") is not ("colour-train-1" in learned)
    record = ctx.work_dir / "screen_training.json"
    assert record.is_file() is (mode != "off")
    if mode != "off":
        assert [row["id"] for row in json.loads(record.read_text())["refused"]] == sorted(refusing)


@pytest.mark.parametrize(("word", "mode"), [(False, "off"), ("off", "off"), ("report", "report"), ("drop", "drop")])
def test_a_run_file_may_say_off(word, mode):
    """YAML reads `off` as false."""
    assert decode(TrainingConfig, {"screen": word}).screen == mode


@pytest.mark.parametrize("word", [True, "yes", "dorp", None, 1])
def test_other_words_are_refused(word):
    with pytest.raises(ConfigError, match="screen"):
        decode(TrainingConfig, {"screen": word})


def test_a_judge_that_is_none_is_named():
    with pytest.raises(UnknownNameError, match="keyword_strict"):
        decode(AnchorMethodConfig, {"screening": {"judge": "keyword_strikt"}})


@pytest.mark.parametrize("screen", [False, True])
def test_hpa_calibrates_on_what_is_left(stream, pico_folder, tmp_path, refusing, screen):
    refusing |= {s.id for s in stream.tasks[0].train[:4]}
    made = Hpa(HpaMethodConfig(training=TRAINING, task_samples=8, benign_samples=None, screen=screen), name="hpa")
    ctx = context(stream, pico_folder, tmp_path)
    trained = made.train_task(ctx)
    sets = made.curvature(ctx, trained).meta["sets"]
    assert [sets[name]["sequences"] for name in ("safety", "task")] == ([9, 4] if screen else [5, 8])
    assert (ctx.work_dir / "screen.json").is_file() is screen


def test_an_expert_of_cram_stays_an_adapter_of_its_rank(stream, pico_folder, tmp_path, refusing):
    from holdfast.functional.cram import RankRule
    from holdfast.tuners.cram.folder import load_expert

    cram = cram_kit.config(warmup_fraction=0.5, held_out=0.25, rank=RankRule(r_min=2, r_max=4), max_groups=1)
    made = CramAnchor(CramAnchorConfig(training=replace(TRAINING, max_steps=4), cram=cram, task_samples=6))
    ctx = context(stream, pico_folder, tmp_path)
    trained = made.train_task(ctx)
    before = load_expert(Path(trained.adapters[-1]))
    edited = load_expert(made.final_expert(ctx, trained))
    assert set(edited) == set(before)
    for name, (a, b) in before.items():
        assert edited[name][0].shape == a.shape and torch.equal(edited[name][1], b)
    assert any(not torch.equal(edited[name][0], a) for name, (a, _) in before.items())
    assert not (ctx.carry_dir / PAST_FOLDER).exists()


@pytest.mark.parametrize("name", ["anchor", "anchor_no_past", "anchor_no_screen", "cram_anchor"])
def test_naming_one_option_of_the_edit_keeps_the_others(name):
    made, changed = methods.get(name).config.edit, methods.get(name, edit={"damping": 0.1}).config.edit
    assert changed == replace(made, damping=0.1) and made.benign_share == 0.6
    assert methods.get(name).config == methods.class_of(name).Config() or name not in ("anchor", "cram_anchor")
