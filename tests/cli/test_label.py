"""`holdfast label` as a user types it: a script answers the terminal form, a saved form is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fake_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return fake_run.write_run(tmp_path / "run", methods={"seqft": 0.6, "hpa": 0.9}, n=30)


def _label(run: Path, *arguments: str, keys: str = "", rc: int = 0) -> str:
    command = [sys.executable, "-m", "holdfast", "label", str(run), *arguments]
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(command, input=keys, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == rc, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_a_labelling_stops_resumes_and_corrects(run: Path) -> None:
    said = _label(run, "--number", "50", keys="1\n2\nq\n")
    assert "drew 50 replies of seqft, hpa" in said and "2 of 50 labelled. Go on with the same command" in said
    # Wrong keys are asked again, b goes back, the end of the input stops.
    said = _label(run, keys="9\nb\n3\n")
    assert "'9' is no label" in said and "2 of 50 labelled" in said
    stored = [json.loads(line) for line in (run / "labels/labels-1.jsonl").read_text().splitlines()]
    assert [(row["item"], row["label"]) for row in stored] == [(1, "refused"), (2, "other_safe")]
    said = _label(run, keys="1\n" * 48)
    assert "all 50 labelled by '1'" in said and "What people say" in said
    corrected = json.loads((run / "labels/corrected.json").read_text())
    assert corrected["labels"] == {"1": 50} and set(corrected["methods"]) == {"seqft", "hpa"}
    assert "all 50 labelled" in _label(run)


def test_two_people_disagree_and_settle(run: Path) -> None:
    _label(run, "--number", "50", "--annotator", "ann", keys="1\n" * 50)
    said = _label(run, "--annotator", "bob", keys="2\n" + "1\n" * 49)
    assert "98 % equal" in said and "1 replies have different labels" in said and "kappa" in said
    said = _label(run, "--settle", keys="2\n")
    assert "all 1 labelled by 'settled'" in said and "different labels" not in said
    assert "Nothing to settle" in _label(run, "--settle")


def test_a_form_is_written_and_its_labels_are_imported(run: Path, tmp_path: Path) -> None:
    form, file = tmp_path / "form.html", tmp_path / "labels-eve.jsonl"
    assert "(50 replies)" in _label(run, "--number", "50", "--html", str(form))
    draw = json.loads((run / "labels/draw.json").read_text())["digest"]
    lines = [{"draw": draw, "item": i, "label": "refused", "annotator": "eve"} for i in range(1, 51)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "50 new labels of eve" in _label(run, "--import", str(file))
    assert "What people say" in _label(run, "--show")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--number", "3"), "at least --number"),
        (("--method", "hpaa"), "Did you mean 'hpa'"),
        (("--show",), "has no labels yet"),
        (("--html", "x.html", "--show"), "do one thing each"),
        (("--settle", "--annotator", "ann"), "leave --annotator out"),
        (("--annotator", "a b"), "annotator is 'a b'"),
        (("--import", "nothing.jsonl"), "nothing.jsonl"),
    ],
)
def test_a_wrong_call_says_what_to_do(run: Path, arguments: tuple[str, ...], sentence: str) -> None:
    assert sentence in _label(run, *arguments, keys="1\n", rc=2)


def test_another_draw_is_refused_while_one_is_there(run: Path) -> None:
    _label(run, "--number", "50", keys="q\n")
    assert "--number 60 (drawn with 50)" in _label(run, "--number", "60", rc=2)
    assert "--seed 5 (drawn with 0)" in _label(run, "--seed", "5", rc=2)
    assert "--method ['hpa']" in _label(run, "--method", "hpa", rc=2)
    _label(run, "--number", "50", "--seed", "0", keys="q\n")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    assert "is no run directory" in _label(tmp_path / "nothing", rc=2)
