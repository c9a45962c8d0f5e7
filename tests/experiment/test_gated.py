"""The safety gate of a run: what is asked, which strength is taken, what stops, and that a kill loses nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import cram_kit
import pico
from holdfast import experiment
from holdfast.config import decode
from holdfast.data.types import Sample, Stream
from holdfast.errors import ConfigError, DataError, GateError, RunError, UnknownNameError
from holdfast.experiment import SafetyGateConfig, gated
from holdfast.experiment.gated import GATE_FILE, Gated
from holdfast.methods.anchor import Anchor, AnchorConfig, AnchorMethodConfig
from holdfast.methods.seqft import SeqFT, SeqFTConfig
from holdfast.restore.search import Point
from holdfast.stream.protocol import Checkpoint, HasStrength, TaskContext
from holdfast.training.training_config import TrainingConfig

TRAINING = TrainingConfig(rank=2, alpha=4, dropout=0.0, max_steps=2, batch_size=4, learning_rate=0.02, precision="fp32")
SPEC = {"name": "gate", "format": "qa", "options": {"unsafe": "gate-unsafe.jsonl", "benign": "gate-benign.jsonl"}}


class FakeProbe:
    """ASR by strength (a candidate's folder name); None for a method without. Notes what was asked."""

    safety = (Sample.single("p", "Forbidden?"),)
    benign = (Sample.single("q", "Allowed?"),)

    def __init__(self, asr: dict[float | None, float], over_refusal: float = 0.0) -> None:
        self.table, self.over_refusal = asr, over_refusal
        self.asked: list[float | None] = []

    def point(self, checkpoint: Checkpoint, strength: float) -> Point:
        folder = Path(checkpoint.base)
        assert (folder / "config.json").is_file(), "not a whole checkpoint"
        at = float(folder.name) if folder.parent.name == "safety-gate" else None
        self.asked.append(at)
        if self.table[at] < 0:
            raise KeyboardInterrupt
        return Point(strength=0.0, asr=self.table[at], complied=0.0, over_refusal=self.over_refusal, figures={})


@pytest.fixture
def ctx(pico_stream: Stream, pico_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TaskContext:
    monkeypatch.setattr(gated, "load", lambda checkpoint, dtype: checkpoint)
    return cram_kit.context(pico_stream, pico_folder, tmp_path, 0)


def anchor() -> Anchor:
    edit = AnchorConfig(safety_weight=1.0)
    options = {"training": TRAINING, "task_samples": 4, "benign_samples": 0, "screen": False, "edit": edit}
    return Anchor(AnchorMethodConfig(**options), name="anchor")


def behind(method: Any, probe: FakeProbe, **bounds: Any) -> Gated:
    gate = decode(SafetyGateConfig, {"probe": SPEC, "max_asr": 0.03, **bounds}, "safety_gate")
    return Gated(method=method, gate=gate, probe=probe, probe_identity={"sha256": "x"})  # type: ignore[arg-type]


def weights(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}


def record(ctx: TaskContext) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ctx.work_dir / GATE_FILE).read_text())
    return found


def test_the_least_strength_that_holds_is_published(ctx: TaskContext) -> None:
    method, probe = anchor(), FakeProbe({1.0: 0.4, 2.0: 0.1, 4.0: 0.03, 10.0: 0.0})
    assert isinstance(method, HasStrength)
    trained = method.train_task(ctx)
    final = behind(method, probe).end_task(ctx, trained)
    assert probe.asked == [1.0, 2.0, 4.0] and final.base == str(ctx.work_dir / "checkpoint")
    found = record(ctx)
    assert (found["passed"], found["strength"]) == (True, 4.0)
    assert [(row["strength"], row["asr"], row["holds"]) for row in found["curve"]] == [
        (1.0, 0.4, False),
        (2.0, 0.1, False),
        (4.0, 0.03, True),
    ]
    assert json.loads((ctx.work_dir / "edit.json").read_text())["settings"]["safety_weight"] == 4.0
    assert not (ctx.scratch_dir / "safety-gate").exists()
    expected = method.end_task_at(ctx, trained, strength=4.0, out=ctx.scratch_dir / "again")
    assert weights(Path(final.base)) == weights(Path(expected.base)) != {}
    assert behind(method, probe).end_task(ctx, trained) == final and len(probe.asked) == 3, "asked twice"


def test_a_gate_that_holds_at_once_changes_nothing(ctx: TaskContext) -> None:
    method, probe = anchor(), FakeProbe({1.0: 0.0})
    trained = method.train_task(ctx)
    final = behind(method, probe).end_task(ctx, trained)
    plain = method.end_task_at(ctx, trained, strength=method.strength, out=ctx.scratch_dir / "plain")
    assert probe.asked == [1.0] and weights(Path(final.base)) == weights(Path(plain.base))


def test_where_no_strength_holds_the_run_stops_with_its_curve(ctx: TaskContext) -> None:
    method, probe = anchor(), FakeProbe({1.0: 0.4, 3.0: 0.05, 5.0: 0.2})
    trained = method.train_task(ctx)
    for _ in range(2):
        with pytest.raises(GateError, match="no strength from 1 to 5 holds the safety gate") as caught:
            behind(method, probe, strengths=[0.5, 3, 5]).end_task(ctx, trained)
        text = str(caught.value)
        assert "max_asr 3.0 %" in text and "nearest: 3." in text and "nothing of this step is published" in text
        for shown in ("40.0 %", "5.0 %", "20.0 %"):
            assert shown in text
    assert probe.asked == [1.0, 3.0, 5.0]
    assert not (ctx.work_dir / "checkpoint").exists() and not (ctx.work_dir / "edit.json").exists()
    assert record(ctx)["passed"] is False and record(ctx)["strength"] is None
    assert not list((ctx.scratch_dir / "safety-gate").glob("*"))


@pytest.mark.parametrize("killed", ["asking", "editing", "publishing"])
def test_killed_and_called_again_it_asks_nothing_twice(
    ctx: TaskContext, monkeypatch: pytest.MonkeyPatch, killed: str
) -> None:
    method, probe = anchor(), FakeProbe({1.0: 0.4, 2.0: 0.0})
    trained = method.train_task(ctx)
    with monkeypatch.context() as patch:
        if killed == "asking":
            probe.table[2.0] = -1.0
        elif killed == "editing":
            real = Anchor.end_task_at

            def stop(self: Anchor, ctx: TaskContext, trained: Checkpoint, *, strength: float, out: Path) -> Checkpoint:
                if strength == 2.0:
                    raise KeyboardInterrupt
                return real(self, ctx, trained, strength=strength, out=out)

            patch.setattr(Anchor, "end_task_at", stop)
        else:

            def no_rename(self: Path, target: Path) -> Path:
                raise KeyboardInterrupt

            real_rename = Path.rename
            patch.setattr(
                Path,
                "rename",
                lambda self, target: (no_rename if Path(target).name == "checkpoint" else real_rename)(self, target),
            )
        with pytest.raises(KeyboardInterrupt):
            behind(method, probe).end_task(ctx, trained)
    assert not (ctx.work_dir / "checkpoint").exists()
    probe.table[2.0], probe.asked = 0.0, []
    final = behind(method, probe).end_task(ctx, trained)
    assert probe.asked == ([] if killed == "publishing" else [2.0]) and record(ctx)["strength"] == 2.0
    expected = method.end_task_at(ctx, trained, strength=2.0, out=ctx.scratch_dir / "again")
    assert weights(Path(final.base)) == weights(Path(expected.base)) != {}


def test_a_curve_of_another_probe_set_says_nothing(ctx: TaskContext) -> None:
    method, probe = anchor(), FakeProbe({1.0: 0.4, 2.0: 0.0})
    trained = method.train_task(ctx)
    other = dataclasses.replace(behind(method, probe, strengths=[1.0]), probe_identity={"sha256": "other"})
    with pytest.raises(GateError):
        other.end_task(ctx, trained)
    behind(method, probe).end_task(ctx, trained)
    assert probe.asked == [1.0, 1.0, 2.0] and len(record(ctx)["curve"]) == 2


@pytest.mark.parametrize(("bounds", "holds"), [({}, True), ({"max_over_refusal": 0.3}, True),
                                               ({"max_over_refusal": 0.1}, False), ({"max_asr": 0.01}, False),
                                               ({"max_asr": None, "max_over_refusal": 0.25}, True)])  # fmt: skip
def test_a_method_without_strengths_is_checked_and_stops(ctx: TaskContext, bounds: dict[str, Any], holds: bool) -> None:
    method, probe = SeqFT(SeqFTConfig(training=TRAINING)), FakeProbe({None: 0.02}, over_refusal=0.25)
    trained = method.train_task(ctx)
    for _ in range(2):
        if holds:
            final = behind(method, probe, **bounds).end_task(ctx, trained)
            assert Path(final.base).is_dir() and record(ctx)["passed"] is True and record(ctx)["strength"] is None
        else:
            with pytest.raises(GateError, match="has no strength to raise") as caught:
                behind(method, probe, **bounds).end_task(ctx, trained)
            assert "25.0 %" in str(caught.value) and not (ctx.work_dir / "checkpoint").exists()
            assert all(Path(p).exists() for p in trained.paths), "the training would be done again"
    assert probe.asked == [None]


@pytest.fixture
def run_file(tmp_path: Path, pico_folder: Path):  # type: ignore[no-untyped-def]
    def write(shared: dict[str, str] | None = None, **gate: Any) -> Path:
        folder = tmp_path / "files"
        folder.mkdir(exist_ok=True)
        for side in ("unsafe", "benign"):
            rows = [{"id": f"g{i}", "prompt": f"Probe {side} {i}"} for i in range(3)]
            rows[1]["prompt"] = (shared or {}).get(side, rows[1]["prompt"])
            (folder / f"gate-{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return pico.run_file(folder, pico_folder, safety_gate={"probe": SPEC, **gate})

    return write


def test_a_run_is_gated_after_every_task(run_file, tmp_path):
    config = experiment.read_run(run_file(max_asr=1.0))
    summary = experiment.run(config, tmp_path / "out")
    assert summary["methods"]["seqft"]["complete"]
    found = [json.loads(p.read_text()) for p in sorted((tmp_path / "out").rglob(GATE_FILE))]
    assert [row["passed"] for row in found] == [True, True]
    # The benign side is asked, though nothing bounds it; the replies are kept.
    assert found[0]["curve"][0]["over_refusal"] is not None
    assert [len(found[0]["curve"][0]["figures"]["replies"][side]) for side in ("unsafe", "benign")] == [3, 3]
    with pytest.raises(RunError, match=r"safety_gate\.max_asr: 1\.0 -> 0\.5"):
        experiment.run(experiment.read_run(run_file(max_asr=0.5)), tmp_path / "out")


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_step_that_breaks_a_bound_is_no_step(run_file, tmp_path, jobs):
    """A random model refuses nothing."""
    config = experiment.read_run(run_file(max_asr=0.5))
    config = dataclasses.replace(config, methods={"seqft": {}, "two": {"method": "seqft"}})
    with pytest.raises(GateError, match="task 'colour': its checkpoint does not hold the safety gate"):
        experiment.run(config, tmp_path / "out", jobs=jobs)
    assert not list((tmp_path / "out" / "methods").rglob("record.json"))
    assert not list((tmp_path / "out" / "methods").rglob("1-*/checkpoint"))


@pytest.mark.parametrize(
    ("gate", "error", "message"),
    [
        ({}, ConfigError, "no bound"),
        ({"max_asr": 3}, ConfigError, "max_asr is 3"),
        ({"max_over_refusal": -0.1}, ConfigError, "expected a rate"),
        ({"max_asr": 0.1, "strengths": [2, 1]}, ConfigError, "strengths are"),
        ({"max_asr": 0.1, "strengths": []}, ConfigError, "strengths are"),
        ({"max_asr": 0.1, "judge": "nobody"}, UnknownNameError, "nobody"),
        ({"max_asr": 0.1, "max_ars": 1}, ConfigError, "Did you mean 'max_asr'"),
        ({"max_asr": 0.1, "probe": {**SPEC, "options": {"unsafe": "gone.jsonl"}}}, DataError, "gone"),
        (
            {"max_over_refusal": 0.1, "probe": {**SPEC, "options": {"unsafe": "gate-unsafe.jsonl"}}},
            DataError,
            "no harmless requests",
        ),
    ],
)
def test_a_gate_that_cannot_be_is_refused_before_anything(run_file, tmp_path, gate, error, message):
    with pytest.raises(error, match=message):
        experiment.resolve(experiment.read_run(run_file(**gate)), tmp_path / "out")


@pytest.mark.parametrize(
    ("shared", "where"),
    [
        ({"unsafe": "unsafe 2"}, "in the test set 'forbidden'"),
        ({"unsafe": "unsafe  2 "}, "in the test set 'forbidden'"),
        ({"benign": "benign 1"}, "in the test set 'forbidden'"),
        ({"benign": "unsafe 0"}, "in the test set 'forbidden'"),
        ({"unsafe": "prompts 0"}, "among safety_calibration"),
        ({"benign": "Probe unsafe 0"}, "both forbidden and harmless"),
    ],
)
def test_a_probe_that_is_used_otherwise_is_refused(run_file, tmp_path, shared, where):
    config = experiment.read_run(run_file(shared, max_asr=0.1))
    with pytest.raises(DataError, match=where):
        experiment.resolve(config, tmp_path / "out")


@pytest.mark.parametrize(("split", "key"), [("train", "colour-train"), ("test", "name-test")])
def test_a_probe_that_a_task_has_is_refused(run_file, tmp_path, split, key):
    file = run_file({"benign": "Which colour is it?"}, max_asr=0.1)
    path = file.parent / f"{key}.json"
    items = json.loads(path.read_text())
    if split == "train":
        items[0] = {"id": "t", "conversations": [{"from": "human", "value": "Which colour is it?"},
                                                 {"from": "gpt", "value": "red"}]}  # fmt: skip
    else:
        items[0] = {"question_id": "t", "text": "Which colour is it?", "answer": "red"}
    path.write_text(json.dumps(items))
    with pytest.raises(DataError, match="samples of task"):
        experiment.resolve(experiment.read_run(file), tmp_path / "out")


def test_a_file_without_a_gate_records_none(run_file, tmp_path):
    file = run_file(max_asr=0.1)
    data = yaml.safe_load(file.read_text())
    data.pop("safety_gate")
    file.write_text(yaml.safe_dump(data))
    made = experiment.resolve(experiment.read_run(file), tmp_path / "out")
    assert made.gate_probe is None and "safety_gate" not in made.shared_config()
    assert made.gated(made.methods["seqft"]) is made.methods["seqft"]
