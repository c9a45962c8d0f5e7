"""Records on disk: where they lie, how they are read back, how a configuration is compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import RunError
from holdfast.files import write_json
from holdfast.stream.protocol import Checkpoint
from holdfast.stream.record import DIVERGED, Record, RunDirectory, claim, read_json, versions


def record(t: int, run: RunDirectory) -> Record:
    inside = run.step_dir("m", t - 1, f"task {t}") / "checkpoint"
    return Record(
        method="m",
        t=t,
        task=f"task {t}",
        tasks=tuple(f"task {i + 1}" for i in range(t)),
        seed=7,
        checkpoint=Checkpoint(base="hub/model", adapters=(str(inside.absolute()), "/elsewhere/adapter")),
        scores={"task 1": {"value": 0.5}},
        safety={"set": {"asr": None}},
        seconds={"train": 1.25},
        versions={"torch": "2"},
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def test_everything_lies_where_the_schema_says(run: RunDirectory) -> None:
    root = run.root
    assert run.config_path == root / "config.json" and run.summary_path == root / "summary.json"
    assert run.theta_0_dir == root / "theta_0" and run.method_dir("hpa") == root / "methods" / "hpa"
    assert run.step_dir("hpa", 0, "read aloud") == root / "methods" / "hpa" / "1-read-aloud"


def test_a_record_is_read_back_as_it_was_and_moves_with_its_directory(run: RunDirectory, tmp_path: Path) -> None:
    folder = run.step_dir("m", 0, "task 1")
    run.write_record(folder, record(1, run))
    assert run.read_record(folder) == record(1, run)
    stored = read_json(folder / "record.json")["checkpoint"]
    assert stored == {"base": "hub/model", "adapters": ["run:methods/m/1-task-1/checkpoint", "/elsewhere/adapter"]}
    run.root.rename(tmp_path / "moved")
    moved = RunDirectory(tmp_path / "moved")
    assert moved.read_record(moved.step_dir("m", 0, "task 1")) == record(1, moved)


def test_records_are_the_leading_finished_steps(run: RunDirectory) -> None:
    names = ["task 1", "task 2", "task 3"]
    assert run.records("m", names) == [] and run.methods() == []
    for t in (1, 3):
        run.write_record(run.step_dir("m", t - 1, f"task {t}"), record(t, run))
    assert [r.t for r in run.records("m", names)] == [1]
    run.write_record(run.step_dir("m", 1, "task 2"), record(2, run))
    assert [r.t for r in run.records("m", names)] == [1, 2, 3]
    assert [r.t for r in run.records("m", names[:2])] == [1, 2]
    assert run.methods() == ["m"]


@pytest.mark.parametrize("missing", ["method", "t", "seed", "checkpoint", "scores", "safety", "seconds", "versions"])
def test_a_record_without_a_key_is_named(run: RunDirectory, missing: str) -> None:
    folder = run.step_dir("m", 0, "task 1")
    run.write_record(folder, record(1, run))
    data = read_json(folder / "record.json")
    del data[missing]
    write_json(folder / "record.json", data)
    with pytest.raises(RunError, match=f"key '{missing}' is missing"):
        run.read_record(folder)


@pytest.mark.parametrize(("changes", "shown"), [(1, 1), (20, 20), (21, 20), (30, 20)])
def test_at_most_twenty_differences_are_shown_and_the_rest_counted(run: RunDirectory, changes: int, shown: int) -> None:
    claim(run, {f"key {i}": 0 for i in range(30)}, {})
    with pytest.raises(RunError) as caught:
        claim(run, {f"key {i}": int(i < changes) for i in range(30)}, {})
    text = str(caught.value)
    assert text.count("0 -> 1") == shown
    assert ("more" in text) == (changes > shown) and (f"... and {changes - 20} more" in text) == (changes > 20)


def test_what_grows_may_get_more_at_its_end_and_nowhere_else(run: RunDirectory) -> None:
    grows = ("tasks", "digests")

    def of(*names: str, lr: float = 0.1) -> dict[str, object]:
        return {"tasks": list(names), "digests": {name: f"of {name}" for name in names}, "lr": lr}

    claim(run, of("a", "b"), {"m": {"k": 1}}, grows=grows)
    claim(run, of("a", "b", "c"), {"m": {"k": 1}}, grows=grows)
    assert read_json(run.config_path)["config"] == of("a", "b", "c")
    for other in (of("a", "b"), of("b", "a", "c"), of("a", "x", "c"), of("a", "b", "c", lr=0.2)):
        with pytest.raises(RunError, match="another configuration"):
            claim(run, other, {"m": {"k": 1}}, grows=grows)
    with pytest.raises(RunError, match="another configuration"):
        claim(run, of("a", "b", "c", "d"), {"m": {"k": 1}})


def test_a_stranger_is_named_and_at_most_five_are(run: RunDirectory) -> None:
    run.root.mkdir()
    for name in "abcdef":
        (run.root / name).touch()
    with pytest.raises(RunError, match=r"found a, b, c, d, e\)"):
        claim(run, {}, {})


def test_versions_name_what_decides_a_number() -> None:
    found = versions()
    assert {"python", "holdfast", "torch", "transformers", "peft"} <= set(found)
    assert all(isinstance(value, str) and value for value in found.values())


def test_what_was_recorded_by_old_names_goes_on_by_the_new(run: RunDirectory) -> None:
    def today(method: str | None, recorded: Mapping[str, Any]) -> Mapping[str, Any]:
        assert method in ("m", None)
        return {"new": recorded["old"]} if "old" in recorded else recorded

    claim(run, {}, {"m": {"old": 1}, "other": {"old": 1}})
    with pytest.raises(RunError, match="new: absent -> 1"):
        claim(run, {}, {"m": {"new": 1}})
    with pytest.raises(RunError, match="new: 1 -> 2"):
        claim(run, {}, {"m": {"new": 2}}, today=today)
    assert claim(run, {}, {"m": {"new": 1}}, today=today) == ()
    assert read_json(run.config_path)["methods"] == {"m": {"new": 1}, "other": {"old": 1}}


@pytest.mark.parametrize("learned", [False, True])
def test_a_task_that_starts_again_starts_from_nothing(run: RunDirectory, learned: bool) -> None:
    """Whatever parts a method learned it in (CRAM: a buffer, then an expert): they are of the old learning rate."""

    def of(rate: float) -> dict[str, dict[str, Any]]:
        return {"m": {"training": {"learning_rate": rate}}}

    claim(run, {}, of(0.1))
    step = run.step_dir("m", 0, "task 1")
    for part in ("buffer", "initial", "phase/trainer"):
        (step / "scratch" / part).mkdir(parents=True)
    write_json(step / "phases.json", {"begin": {"seconds": 1.0}, **({"train": {"seconds": 1.0}} if learned else {})})
    write_json(step / DIVERGED, {})
    write_json(step / "training.json", {"steps": 1})  # of a method that publishes what it learned beside it
    (step / "moelora").mkdir()
    assert claim(run, {}, of(0.01))
    assert (step / "scratch" / "buffer").exists() is (step / "phases.json").exists() is learned
    assert (step / "moelora").exists() is (step / "training.json").exists() is learned
    assert not (step / DIVERGED).exists()


@pytest.mark.parametrize("damage", [{"config": []}, {"config": None}, {"methods": 1}, {"methods": {"m": []}}])
def test_a_record_whose_groups_are_gone_is_none_of_ours(run: RunDirectory, damage: dict[str, object]) -> None:
    claim(run, {"seed": 0}, {"m": {"rank": 1}})
    write_json(run.config_path, {**read_json(run.config_path), **damage})
    with pytest.raises(RunError, match="was not written by this version"):
        claim(run, {"seed": 0}, {"m": {"rank": 1}})
