"""`run` and `list` on the command line, and the run files that the repository ships."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import pico
from holdfast import experiment
from holdfast.cli import app
from holdfast.errors import StorageError
from holdfast.experiment.sweep import CellResult
from holdfast.methods import METHODS

CONFIGS = Path(__file__).parents[2] / "configs"


def test_run_shows_a_table_and_says_where_to_look(tmp_path, pico_folder):
    file = pico.run_file(tmp_path, pico_folder)
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["run", str(file), "--out", str(out), "--method", "seqft", "--no-report"])
    assert result.exit_code == 0, result.output
    assert "seqft" in result.output and "before any task" in result.output
    assert str(out / "summary.json") in result.output.replace("\n", "")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["methods"]["seqft"]["complete"] and summary["name"] == "pico"


def test_with_json_stdout_of_a_run_holds_the_result_and_nothing_else(tmp_path, pico_folder):
    file = pico.run_file(tmp_path, pico_folder)
    out = tmp_path / "out"
    ran = CliRunner().invoke(app, ["run", str(file), "--out", str(out), "--method", "seqft", "--no-report", "--json"])
    assert ran.exit_code == 0 and json.loads(ran.stdout)["methods"]["seqft"]["complete"], ran.output
    assert "asking: begins" in ran.stderr
    told = CliRunner().invoke(app, ["doctor", str(file), "--json"])
    assert told.exit_code == 0 and json.loads(told.stdout)["ok"], told.output


def test_a_sweep_writes_lines_in_a_log_and_its_result_alone_with_json(tmp_path, pico_folder, monkeypatch):
    def fake(cells, out, *, progress, **rest):
        for cell, state in zip(cells, ("kept", "finished"), strict=True):
            if state != "kept":
                progress("cell", name=cell.name, state="running", done=None, total=2)
            progress("cell", name=cell.name, state=state, done=1, total=2)
        return [CellResult(name=cell.name, state="finished") for cell in cells]

    monkeypatch.setattr("holdfast.experiment.sweep.sweep", fake)
    file = pico.run_file(tmp_path, pico_folder)
    (tmp_path / "grid.yaml").write_text(f"run: {file.name}\nvary: {{seed: [0, 1]}}\n")
    told = CliRunner().invoke(app, ["sweep", str(tmp_path / "grid.yaml"), "--json"])
    assert told.exit_code == 0, (told.output, told.exception)
    assert [cell["name"] for cell in json.loads(told.stdout)["cells"]] == ["seed=0", "seed=1"]
    for line in ("seed=0: kept", "seed=1: running: begins", "seed=1: finished"):
        assert line in told.stderr


def test_room_for_a_whole_checkpoint_is_asked_for_before_a_task_is_learned(tmp_path, pico_folder, monkeypatch):
    weights = (pico_folder / "model.safetensors").stat().st_size
    file = pico.run_file(tmp_path, pico_folder)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=weights - 1))
    monkeypatch.setattr("holdfast.methods.seqft.train", None)  # is never called
    args = ["run", str(file), "--out", str(tmp_path / "out"), "--no-report"]
    with pytest.raises(StorageError, match=r"After the tuning, the edited checkpoint needs about .* GB below"):
        CliRunner().invoke(app, args, catch_exceptions=False)


@pytest.mark.parametrize(
    "what, some", [("methods", "hpa_eps"), ("scorers", "anls"), ("judges", "keyword"), ("streams", "tiny")]
)
def test_list_shows_every_name_with_a_line_about_it(what, some):
    result = CliRunner().invoke(app, ["list", what])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert max(map(len, lines)) <= 80  # in a log; on a terminal as wide as it is
    rows = [line.split("  ", 1) for line in lines if not line.startswith(" ")]  # what is indented goes on
    assert some in {row[0].strip() for row in rows}
    assert all(len(row) == 2 and row[1].strip() for row in rows)
    if what == "methods":
        assert {row[0].strip() for row in rows} == set(METHODS)


def test_list_of_something_else_names_what_there_is():
    result = CliRunner().invoke(app, ["list", "method"])
    assert result.exit_code == 2 and all(f"'{name}'" in result.output for name in ("methods", "scorers", "judges"))


@pytest.mark.parametrize("name", sorted(p.name for p in CONFIGS.glob("*.yaml")))
def test_shipped_run_files_decode_and_name_methods_that_exist(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HOLDFAST_DATA", str(tmp_path))
    config = experiment.read_run(CONFIGS / name)
    assert experiment.build_methods(config)
