"""CRAM in a stream, with the real training loop and loader: two tasks, a kill in the middle, the same bytes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cram_kit
from holdfast import methods
from holdfast.config import decode
from holdfast.data.types import Sample
from holdfast.errors import CalibrationError, ConfigError
from holdfast.evaluation import CheckpointEvaluator, EvaluationConfig
from holdfast.experiment import build_methods, decode_run
from holdfast.functional.cram import RankRule
from holdfast.methods.cram import Cram, CramMethodConfig, phase_config
from holdfast.models.generate import generate
from holdfast.models.load import load
from holdfast.stream.protocol import Checkpoint, TaskContext, silent
from holdfast.tiny.recipe import run_data
from holdfast.tiny.stream import StreamSize, write_stream
from holdfast.training.training_config import TrainingConfig
from holdfast.tuners.cram.cram_config import CramConfig
from holdfast.tuners.cram.phases import Phase, Steps
from holdfast.tuners.cram.stored_router import read_router

TRAINING = TrainingConfig(max_steps=4, batch_size=4, learning_rate=0.02, save_steps=1)


def method(**changes) -> Cram:
    config = cram_kit.config(
        **{"warmup_fraction": 0.5, "dropout": 0.1, "held_out": 0.25, "rank": RankRule(r_min=2, r_max=4), **changes}
    )
    return Cram(CramMethodConfig(training=TRAINING, cram=config))


def learn(cram: Cram, ctx: TaskContext) -> Checkpoint:
    cram.begin_task(ctx)
    return cram.end_task(ctx, cram.train_task(ctx))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def learned(pico_stream, pico_folder, tmp_path_factory) -> tuple[Path, list[Checkpoint]]:
    folder = tmp_path_factory.mktemp("stream")
    first = learn(method(), cram_kit.context(pico_stream, pico_folder, folder, 0))
    second = learn(method(), cram_kit.context(pico_stream, pico_folder, folder, 1, first))
    return folder, [first, second]


def test_each_task_adds_an_expert_and_moves_no_other(learned, pico_folder):  # (e)
    folder, (first, second) = learned
    assert first.base == second.base == str(pico_folder), "the base is never rewritten"
    before, after = bytes_of(Path(first.adapters[-1])), bytes_of(Path(second.adapters[-1]))
    old = [name for name in before if name.startswith("experts/")]
    assert old and all(after[name] == before[name] for name in old)
    assert {name.split("/")[1] for name in after if name.startswith("experts/")} == {"00-colour", "01-name"}
    record = json.loads((folder / "1" / "cram.json").read_text())
    assert record["expert"] == "name" and record["parameters"] > 0
    first_decision = json.loads((folder / "0" / "cram.json").read_text())["group_decision"]
    assert first_decision == {"joined": None, "rule": "first", "similarity": None, "margin": None}
    decision = record["group_decision"]
    assert decision["rule"] == "unlike" and decision["joined"] is None and -1 <= decision["similarity"] <= 0.8
    assert all(2 <= row["rank"] <= 4 for row in record["ranks"].values())


def test_the_checkpoint_is_loaded_and_asked_like_any_other(learned, pico_stream):
    loaded = load(learned[1][1])
    samples = [t.test[0] for t in pico_stream.tasks] + [pico_stream.safety[0].unsafe[0]]
    together = generate(loaded, samples, max_new_tokens=4)
    assert together == [generate(loaded, [s], max_new_tokens=4)[0] for s in samples]
    weights = loaded.tuner.last_routing.weights[:, 0]
    assert bool(loaded.tuner.last_routing.abstained[0]) and not weights.any(), "a request like no task goes to the base"
    routes = loaded.tuner.explain(samples[:2])
    assert [max(r["weights"], key=r["weights"].get) for r in routes] == ["colour", "name"]


@pytest.mark.parametrize("killed_at", [2, 4])
def test_a_killed_step_resumes_to_the_same_bytes(learned, pico_stream, pico_folder, tmp_path, killed_at):
    """Killed in optimizer step 2 of the warm-up, and of the stable phase (of two steps each); step 1 was saved."""

    class KilledError(RuntimeError):
        pass

    seen = []

    def progress(event: str, **values) -> None:
        seen.append(event)
        if seen.count("train") == killed_at:
            raise KilledError

    _, (first, second) = learned
    with pytest.raises(KilledError):
        learn(method(), cram_kit.context(pico_stream, pico_folder, tmp_path, 1, first, progress=progress))
    resumed: list[str] = []
    again = cram_kit.context(pico_stream, pico_folder, tmp_path, 1, first, progress=lambda e, **_: resumed.append(e))
    learn(method(), again)
    assert resumed.count("train") == 5 - killed_at, "only what was not saved is trained again"
    assert bytes_of(tmp_path / "1" / "cram") == bytes_of(Path(second.adapters[-1]))


def test_phases_share_the_tasks_steps_and_climb_once():
    config = TrainingConfig(learning_rate=1e-3, warmup_ratio=0.03)
    steps = Steps.of(200, 0.05)
    warm, stable = (phase_config(config, steps, p) for p in (Phase.WARMUP, Phase.STABLE))
    assert (warm.max_steps, stable.max_steps) == (10, 190)
    assert warm.schedule == "constant_with_warmup" and stable.schedule == "cosine"


@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.1, 0.9])
def test_the_warm_up_climbs_for_as_many_steps_as_the_whole_task_would(ratio):
    """As the training loop counts them."""
    config = TrainingConfig(warmup_ratio=ratio)
    for total in range(2, 2000):
        for steps in (Steps.of(total, 0.05), Steps(total=total, warmup=total // 2)):
            warm = phase_config(config, steps, Phase.WARMUP)
            expected = min(math.ceil(ratio * total), steps.warmup - 1)
            assert math.ceil(warm.warmup_ratio * warm.max_steps) == expected


def test_named_variants_differ_from_cram_as_they_say():
    configs = {name: methods.get(name).config.cram for name in methods.METHODS if name.startswith("cram")}
    plain = configs["cram"]
    assert plain == CramConfig()
    assert configs["cram_official"] == CramConfig.official()
    assert configs["cram_no_penalty"] == replace(plain, penalty=0.0)
    assert configs["cram_fixed_rank"] == replace(plain, rank=replace(plain.rank, fixed=True))
    assert configs["cram_no_reuse"] == replace(plain, reuse=False)
    assert configs["cram_no_abstention"] == replace(plain, abstain="off")


def test_the_demos_run_file_takes_cram_beside_seqft_and_hpa(tmp_path):
    """What `holdfast demo --methods seqft,hpa,cram` builds."""
    size = StreamSize(train=4, test=1, validation=1, safety=4, safety_validation=4, calibration=4)
    names = ["seqft", "hpa", "cram"]
    config = decode_run(run_data(write_stream(tmp_path / "data", size=size), names, seed=0), base=tmp_path)
    built = build_methods(config)
    assert list(built) == names
    training = {name: method.config.training for name, method in built.items()}
    assert training["cram"].learning_rate > training["seqft"].learning_rate == training["hpa"].learning_rate
    assert training["cram"].max_steps == training["seqft"].max_steps and built["cram"].config.cram.dropout == 0


def test_options_are_checked_where_they_stand():
    with pytest.raises(ConfigError, match=r"cram\.rank: r_min is 9 and r_max is 4"):
        decode(CramMethodConfig, {"cram": {"rank": {"r_min": 9, "r_max": 4}}})


def test_an_expert_alone_is_the_trained_checkpoint(learned, pico_stream):
    """What train_task hands over is a stock LoRA on theta_0; inside CRAM, one-hot, it answers the same."""
    folder, (first, _) = learned
    expert = folder / "0" / "scratch" / "expert"
    alone = load(Checkpoint(base=first.base, adapters=(str(expert),)))
    routed = load(first)
    from holdfast.models.encode import encode_request

    samples = list(pico_stream.tasks[0].test[:3])
    inputs = encode_request(alone, samples)
    with torch.no_grad():
        expected = alone.model(**inputs).logits[:, -1]
        with routed.serving(samples):
            found = routed.model(**inputs).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_evaluator_writes_down_which_expert_answered(learned, pico_stream, tmp_path):
    _, (_, second) = learned
    evaluate = CheckpointEvaluator(EvaluationConfig(limit=2))
    evaluate(second, stream=pico_stream, step=1, out_dir=tmp_path, progress=silent)
    for task in pico_stream.tasks:
        rows = [json.loads(line) for line in (tmp_path / f"routing-task-{task.name}.jsonl").read_text().splitlines()]
        assert [row["id"] for row in rows] == [sample.id for sample in task.test[:2]]
        for row in rows:
            assert set(row["weights"]) == {"colour", "name"}
            assert row["abstained"] or sum(row["weights"].values()) == pytest.approx(1.0, abs=1e-3)


# The guard


@pytest.fixture(scope="module")
def guarded(pico_stream, pico_folder, tmp_path_factory):
    """Two tasks learned with a guard; a pico model refuses nothing, so its own answers to some requests stand in."""
    folder = tmp_path_factory.mktemp("guarded")
    loaded = load(pico_folder)
    asked = [*pico_stream.tasks[0].train[:4], *pico_stream.tasks[1].train[:4]]
    answers = generate(loaded, asked, max_new_tokens=4)
    own = [Sample.single(f"own-{s.id}", s.prompt, a, images=s.images) for s, a in zip(asked, answers, strict=True) if a]
    stream = replace(pico_stream, safety_calibration=own)
    found: list[Checkpoint] = []
    for step in range(2):
        cram = method()
        cram.config = replace(cram.config, guard="openings", guard_false_alarm=0.9, guard_requests=8)
        found.append(learn(cram, cram_kit.context(stream, pico_folder, folder, step, found[-1] if found else None)))
    return folder, found


def test_a_guard_is_released_with_the_experts_and_has_seen_every_task(guarded):
    folder, checkpoints = guarded
    for step, checkpoint in enumerate(checkpoints):
        guard = read_router(Path(checkpoint.adapters[-1])).guard
        written = json.loads((folder / str(step) / "guard.json").read_text())
        assert guard is not None and guard.describe() == written
        assert list(guard.tasks) == ["colour", "name"][: step + 1]
        assert set(written["requests"].values()) == {8} and written["caught"] >= 0.5


def test_the_evaluator_writes_down_what_the_guard_sent_to_the_base(guarded, pico_stream, tmp_path):
    _, (_, second) = guarded
    evaluate = CheckpointEvaluator(EvaluationConfig(limit=4))
    evaluate(second, stream=pico_stream, step=1, out_dir=tmp_path, progress=silent)
    threshold = read_router(Path(second.adapters[-1])).guard.threshold
    for task in pico_stream.tasks:
        rows = [json.loads(line) for line in (tmp_path / f"routing-task-{task.name}.jsonl").read_text().splitlines()]
        for row in rows:
            assert row["guarded"] == (row["guard_score"] >= threshold - 1e-3)
            assert not row["guarded"] or not any(row["weights"].values())


def test_a_guard_without_calibration_answers_is_refused_before_the_first_step(pico_stream):
    cram = methods.get("cram_guard")
    with pytest.raises(CalibrationError, match="cram_guard has guard 'openings', which needs safety calibration"):
        cram.check_stream(replace(pico_stream, safety_calibration=()))
    methods.get("cram").check_stream(replace(pico_stream, safety_calibration=()))


@pytest.mark.parametrize("name", ["cram", "cram_hpa", "cram_fixed_rank"])
def test_every_cram_takes_a_guard(name):
    assert methods.get(name, guard="probe").config.guard == "probe"
    with pytest.raises(ConfigError, match="guard_false_alarm is 1"):
        methods.get(name, guard_false_alarm=1.0)
    with pytest.raises(ConfigError, match="guard_requests is 1"):
        methods.get(name, guard_requests=1)
