"""Records become figures: checked against values worked out by hand on a small planted run."""

from __future__ import annotations

import json

import pytest

from holdfast.errors import RunError
from holdfast.files import write_json
from holdfast.metrics.safety import set_figures
from holdfast.stream.protocol import Checkpoint
from holdfast.stream.record import CONFIG_FORMAT, Record, RunDirectory
from holdfast.stream.summary import COSTS, summarize_run, without_timings, write_summary

TASKS = ("a", "b")
# method step -> task -> per-sample scores
SCORES = {
    0: {"a": [0, 0, 0, 1], "b": [0, 0, 0, 0]},
    1: {"a": [1, 1, 1, 0]},
    2: {"a": [1, 0, 0, 0], "b": [1, 1, 0, 1]},
}
# step -> set -> behaviours of the unsafe side, of the benign side
SAFETY = {
    0: {"x": ("rrrr", "cccc"), "y": ("rrrc", "")},
    1: {"x": ("rrcl", "cccr"), "y": ("rrrr", "")},
    2: {"x": ("cccl", "ccrr"), "y": ("rrll", "")},
}
NAMES = {"r": "refusal", "c": "compliance", "l": "collapse", "u": "unscored"}


def write_step(run, folder, t, scores, safety):
    rows = {}
    (folder / "predictions").mkdir(parents=True)
    for task, values in scores.items():
        lines = [{"id": i, "prediction": "p", "value": v} for i, v in enumerate(values)]
        known = [v for v in values if v is not None]
        rows[task] = {
            "value": sum(known) / len(known) if known else None,
            "n": len(values),
            "unscored": len(values) - len(known),
        }
        (folder / "predictions" / f"task-{task}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    sets = {}
    for name, sides in safety.items():
        lines, found = [], {}
        for side, letters in zip(("unsafe", "benign"), sides, strict=True):
            found[side] = [NAMES[c] for c in letters]
            lines += [
                {"id": i, "side": side, "behaviour": b, "label": "safe" if b == "refusal" else "unsafe"}
                for i, b in enumerate(found[side])
            ]
        labels = [line["label"] for line in lines if line["side"] == "unsafe"]
        figures = set_figures(labels, found["unsafe"], found["benign"])
        sets[name] = {**figures, "judge": "main", "judges": {"other": {**figures, "asr": 0.5}}}
        (folder / "predictions" / f"safety-{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    run.write_record(
        folder,
        Record(
            method="m" if t else "",
            t=t,
            task=TASKS[t - 1] if t else "",
            tasks=TASKS[:t] if t else TASKS,
            seed=3,
            checkpoint=Checkpoint(base="somewhere"),
            scores=rows,
            safety=sets,
            seconds={"train": 1.0, "evaluate": 0.5},
            answering={"requests": 4, "seconds": 0.5},
            peak_bytes={"begin": {}, "train": {"host": 10 * t, "device": 7}} if t else {},
        ),
    )


@pytest.fixture
def planted(tmp_path):
    run = RunDirectory(tmp_path / "run")
    write_json(
        run.config_path,
        {"format": CONFIG_FORMAT, "config": {"name": "planted"}, "methods": {"m": {"k": 1}, "later": {}}},
    )
    write_step(run, run.theta_0_dir, 0, SCORES[0], SAFETY[0])
    for t in (1, 2):
        write_step(run, run.step_dir("m", t - 1, TASKS[t - 1]), t, SCORES[t], SAFETY[t])
    return run


def test_figures_are_those_worked_out_by_hand(planted):
    summary = write_summary(planted.root)
    assert json.loads(planted.summary_path.read_text()) == summary
    assert summary["name"] == "planted" and summary["seed"] == 3
    assert list(summary["methods"]) == ["m"]  # "later" has no record yet
    method = summary["methods"]["m"]
    assert method["accuracy"] == [[0.75, None], [0.25, 0.75]]
    assert (method["ap"], method["mft"], method["bwt"], method["bwt_t"]) == (0.5, 0.75, -0.5, -0.25)
    assert method["asr"] == {"x": [0.5, 1.0], "y": [0.0, 0.5]}
    assert method["compliance"]["x"] == [0.25, 0.75] and method["collapse"]["y"] == [0.0, 0.5]
    assert summary["theta_0"]["masr"] == 0.125
    assert (method["masr"], method["dasr"]) == (0.75, 0.625)
    assert (method["compliance_mean"], method["collapse_mean"]) == (0.375, 0.375)
    assert (method["over_refusal"], method["helpful"]) == (0.5, 0.5)
    assert method["benign"] == {"x": {"over_refusal": [0.25, 0.5], "helpful": [0.75, 0.5]}}
    assert method["steps_mean"]["masr"] == [0.25, 0.75]
    assert method["judges"] == {"other": {"x": [0.5, 0.5], "y": [0.5, 0.5]}}
    assert method["seconds"] == {"train": 2.0, "evaluate": 1.0, "total": 3.0}
    assert method["peak_bytes"] == {"train": {"host": 20, "device": 7}}
    assert method["request_seconds"] == 0.125
    assert method["complete"] and method["config"] == {"k": 1}


def test_intervals_hold_their_figure_and_have_a_width_at_zero(planted):
    summary = summarize_run(planted.root)
    method = summary["methods"]["m"]
    for name in ("ap", "bwt", "masr", "compliance_mean", "over_refusal"):
        interval = method["intervals"][name]
        assert interval["low"] <= interval["value"] <= interval["high"]
        assert interval["value"] == pytest.approx(method[name])
    assert method["intervals"]["masr"]["n"] == 8
    benign = summary["theta_0"]["intervals"]["over_refusal"]
    assert benign["value"] == 0 and benign["high"] > 0.1 and benign["kind"] == "wilson"


def test_an_unfinished_run_has_the_figures_of_the_tasks_so_far(planted):
    (planted.step_dir("m", 1, "b") / "record.json").unlink()
    method = summarize_run(planted.root)["methods"]["m"]
    assert (method["steps"], method["complete"]) == (1, False)
    assert method["accuracy"] == [[0.75]] and method["bwt"] is None and method["intervals"]["bwt"] is None
    assert method["ap"] == 0.75


def test_a_task_that_was_asked_in_part_again_counts_by_what_was_asked_both_times(planted):
    """As `limit_between: 2` leaves a run that is going on: the task just learned whole, earlier ones in part."""
    path = planted.step_dir("m", 1, "b") / "predictions" / "task-a.jsonl"
    path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines()[1:3]))
    bwt = summarize_run(planted.root)["methods"]["m"]["intervals"]["bwt"]
    assert bwt["value"] == -1.0  # samples 1 and 2: right when learned, wrong now


def test_what_could_not_be_scored_is_absent_and_counted(tmp_path):
    run = RunDirectory(tmp_path / "run")
    write_json(run.config_path, {"format": CONFIG_FORMAT, "config": {}, "methods": {"m": {}}})
    write_step(run, run.theta_0_dir, 0, SCORES[0], SAFETY[0])
    write_step(run, run.step_dir("m", 0, "a"), 1, {"a": [None, None]}, {"x": ("rrrr", "cc")})
    write_step(run, run.step_dir("m", 1, "b"), 2, {"a": [None, None], "b": [1, None, 0]}, {"x": ("rrrr", "cc")})
    method = summarize_run(run.root)["methods"]["m"]
    assert method["accuracy"] == [[None, None], [None, 0.5]]
    assert method["ap"] is None and method["intervals"]["ap"] is None
    assert method["unscored"]["tasks"] == 5


def test_timings_are_the_only_thing_left_out(planted):
    summary = summarize_run(planted.root)
    assert set(summary["methods"]["m"]) - set(without_timings(summary)["methods"]["m"]) == set(COSTS)


def test_what_is_no_run_directory_is_said(planted, tmp_path):
    with pytest.raises(RunError, match=r"has no config\.json; expected a run directory"):
        summarize_run(tmp_path / "nowhere")
    (planted.root / "theta_0" / "predictions" / "safety-x.jsonl").unlink()
    with pytest.raises(RunError, match=r"safety-x\.jsonl is missing, but its record is there"):
        summarize_run(planted.root)
    (planted.root / "theta_0" / "record.json").unlink()
    with pytest.raises(RunError, match="has no record of theta_0 yet"):
        summarize_run(planted.root)
