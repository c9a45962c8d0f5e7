"""A grid of runs: its cells, and that the finished are kept, the killed started again, and mistakes stay."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from pathlib import Path

import pytest

import pico
from holdfast import registry
from holdfast.config import encode
from holdfast.data.inventory import check_pictures
from holdfast.errors import ConfigError, RunError
from holdfast.experiment import cell_process, read_run
from holdfast.experiment.cell_process import HereProcesses
from holdfast.experiment.resolve import resolve
from holdfast.experiment.sweep import read_grid, sweep
from holdfast.stream.record import claim

RUN = """
model: some/model
stream: {name: s, tasks: [{name: a, test: a.jsonl}]}
methods: [seqft]
defaults: {training: {rank: 4}}
"""


@pytest.fixture
def grid(tmp_path):
    def write(text: str) -> Path:
        (tmp_path / "run.yaml").write_text(RUN)
        path = tmp_path / "grid.yaml"
        path.write_text(textwrap.dedent(text))
        return path

    return write


GRID = """
run: run.yaml
vary:
  seed: [0, 1]
  injection: {clean: null, injected: {fraction: 0.01}}
"""


def test_every_combination_is_a_run_with_its_values(grid):
    cells = read_grid(grid(GRID))
    assert [c.name for c in cells] == [
        "seed=0,injection=clean",
        "seed=0,injection=injected",
        "seed=1,injection=clean",
        "seed=1,injection=injected",
    ]
    assert [(c.config.seed, c.config.injection is not None) for c in cells] == [
        (0, False),
        (0, True),
        (1, False),
        (1, True),
    ]
    assert cells[1].config.injection.fraction == 0.01 and cells[0].values == {"seed": "0", "injection": "clean"}


def test_dots_lead_into_mappings_and_a_methods_name_is_a_list_of_one(grid):
    cells = read_grid(
        grid("run: run.yaml\nvary: {methods: [hpa, ewc], defaults.training.rank: [8], evaluation.batch_size: [3]}")
    )
    assert [list(c.config.methods) for c in cells] == [["hpa"], ["ewc"]]
    assert cells[0].config.defaults == {"training": {"rank": 8}} and cells[0].config.evaluation.batch_size == 3


@pytest.mark.parametrize(
    "text, message",
    [
        ("run: run.yaml", "is no grid: expected `run`"),
        ("run: run.yaml\nvary: [1]", "is no grid"),
        ("run: run.yaml\nvary: {seed: 3}", r"vary\.seed is 3; expected a list"),
        ("run: run.yaml\nvary: {seed: []}", r"vary\.seed is \[\]"),
        ("run: run.yaml\nvary: {seed: [0, 1, 0]}", r"vary\.seed has 0 twice"),
        ("run: run.yaml\nvary: {seed: ['0']}", r"cell seed=0\.seed: found '0' \(str\), expected int"),
        ("run: run.yaml\nvary: {seeds: [1]}", "seeds"),
        ("run: run.yaml\nvary: {model.name: [x]}", "leads through model, which is 'some/model'"),
        ("run: run.yaml\nvary: {tasks: {'a b': [a], 'a?b': [a]}}", "two cells are called tasks=a-b"),
        (
            "run: run.yaml\nvary: {defaults.training.rank: [2, 4], defaults.training: {a: {rank: 8}, b: {rank: 16}}}",
            r"vary\.defaults\.training\.rank lies inside vary\.defaults\.training",
        ),
        (
            "run: run.yaml\nvary: {methods.seqft.training.rank: [2, 4], methods: [seqft, hpa]}",
            r"vary\.methods\.seqft\.training\.rank lies inside vary\.methods, and one would overwrite the other",
        ),
        ("run: run.yaml\nvary: {injection: {clean: null, plain: null}}", "injection=clean and injection=plain ask for"),
        ("run: run.yaml\nvary: {methods: {one: hpa, two: [hpa]}}", "methods=one and methods=two ask for the same run"),
        ("run: run.yaml\nvary: {defaults: [{d: 2020-01-01}]}", r"cannot record a date"),
        ("run: run.yaml\nvary: {seed: {'?': 0, '!': 1}}", "in letters, digits"),
    ],
)
def test_a_mistake_in_a_grid_is_named(grid, text, message):
    with pytest.raises((ConfigError, LookupError, ValueError), match=message):
        read_grid(grid(text))


def test_names_of_other_alphabets_are_names(grid):
    cells = read_grid(grid("run: run.yaml\nvary: {methods: {'метод': [seqft], 'другой': [hpa], '方法 1': [ewc]}}"))
    assert [cell.name for cell in cells] == ["methods=метод", "methods=другой", "methods=方法-1"]


@pytest.mark.parametrize("letter", ["a", "я"])
def test_a_name_that_is_too_long_for_a_folder_is_cut_and_stays_its_own(grid, fake, tmp_path, letter):
    keys = ["rank", "alpha", "dropout", "learning_rate", "max_steps", "batch_size", "weight_decay", "warmup_ratio"]
    axes = "".join(f"  defaults.training.{key}: {{{letter}: 1, b: 2}}\n" for key in keys)
    cells = read_grid(grid(f"run: run.yaml\nvary:\n{axes}"))
    assert len({cell.name for cell in cells}) == 2 ** len(keys)
    assert all(len(cell.name.encode()) <= 255 for cell in cells)
    assert [r.state for r in sweep(cells[:2], tmp_path / "out", places=fake)] == ["finished"] * 2
    assert [r.state for r in sweep(cells[:2], tmp_path / "out", places=fake)] == ["kept"] * 2


# A cell that leaves a mark for each start, and ends as its seed says: killed at first, with a mistake, or well.
FAKE = """
import json, os, signal, sys
from pathlib import Path
job = json.loads(sys.stdin.readline())
out = Path(job["out"]); out.mkdir(parents=True, exist_ok=True)
starts = len(list(out.glob("start-*"))); (out / f"start-{starts}").touch()
seed = job["config"]["seed"]
if seed == 1 and starts == 0:
    os.kill(os.getpid(), signal.SIGKILL)
if seed == 2:
    print("ConfigError: the data is not there.", file=sys.stderr); sys.exit(2)
if seed == 3:
    os.kill(os.getpid(), signal.SIGKILL)
(out / "summary.json").write_text("{}")
"""


@pytest.fixture
def fake(tmp_path) -> HereProcesses:
    path = tmp_path / "fake.py"
    path.write_text(FAKE)
    return HereProcesses((sys.executable, "-S", str(path)))


def starts(folder: Path) -> int:
    return len(list(folder.glob("start-*")))


def test_killed_cells_are_retried_finished_ones_kept_and_mistakes_reported(grid, fake, tmp_path):
    cells = read_grid(grid("run: run.yaml\nvary: {seed: [0, 1, 2, 3]}"))
    out, seen = tmp_path / "out", []
    found = sweep(cells, out, jobs=2, retries=2, places=fake, progress=lambda e, **v: seen.append(v))
    assert [(r.state, r.attempts) for r in found] == [("finished", 1), ("finished", 2), ("failed", 1), ("failed", 3)]
    assert found[2].error == "ConfigError: the data is not there." and "status -9" in found[3].error
    assert [r.mistake for r in found] == [False, False, True, False]
    assert sorted(v["done"] for v in seen if v["done"]) == [1, 2, 3, 4] and {v["total"] for v in seen} == {4}
    again = sweep(cells[:2], out, places=fake)
    assert [(r.state, r.attempts) for r in again] == [("kept", 0)] * 2
    assert [starts(out / c.name) for c in cells] == [1, 2, 1, 3], "a finished cell is never computed again"


def test_a_finished_cell_with_other_settings_is_refused_before_anything_runs(grid, fake, tmp_path):
    sweep(read_grid(grid("run: run.yaml\nvary: {seed: [0]}")), tmp_path / "out", places=fake)
    changed = grid("run: run.yaml\nvary: {seed: [0, 4]}")
    (tmp_path / "run.yaml").write_text(RUN.replace("rank: 4", "rank: 8"))
    with pytest.raises(RunError, match=r"seed=0 is finished with other settings"):
        sweep(read_grid(changed), tmp_path / "out", places=fake)
    assert not (tmp_path / "out" / "seed=4").exists()
    assert json.loads((tmp_path / "out" / "seed=0" / "finished.json").read_text())["values"] == {"seed": "0"}


def test_an_option_that_is_new_since_a_cell_was_finished_makes_no_other_cell_of_it(grid, fake, tmp_path):
    cells = read_grid(grid("run: run.yaml\nvary: {seed: [0]}"))
    sweep(cells, tmp_path / "out", places=fake)
    path = tmp_path / "out" / "seed=0" / "finished.json"
    mark = json.loads(path.read_text())
    mark["digest"] = "of an earlier version"
    del mark["config"]["safety_calibration"]["allow_short"], mark["config"]["threads"]
    path.write_text(json.dumps(mark))
    assert [r.state for r in sweep(cells, tmp_path / "out", places=fake)] == ["kept"]
    mark["config"]["seed"] = 9
    path.write_text(json.dumps(mark))
    with pytest.raises(RunError, match=r"seed=0 is finished with other settings"):
        sweep(cells, tmp_path / "out", places=fake)


def test_what_stops_the_sweep_stops_its_cells_and_starts_none_again(grid, tmp_path):
    slow = tmp_path / "slow.py"
    slow.write_text(FAKE.replace("seed = job", "import time; time.sleep(60); seed = job"))
    cells, out = read_grid(grid("run: run.yaml\nvary: {seed: [0, 4, 5]}")), tmp_path / "out"
    folders, began = [out / cell.name for cell in cells], time.monotonic()

    def stop(event, **_):
        while starts(folders[0]) == 0 and time.monotonic() < began + 20:
            time.sleep(0.02)
        raise KeyboardInterrupt  # the pool hands it on to the call, as Ctrl-C comes to it

    seen = iter([None, stop])

    def progress(event, **values):
        if (act := next(seen, None)) is not None:
            act(event, **values)

    with pytest.raises(KeyboardInterrupt):
        sweep(cells, out, jobs=2, retries=2, places=HereProcesses((sys.executable, "-S", str(slow))), progress=progress)
    assert time.monotonic() < began + 30 and [starts(folder) for folder in folders] == [1, 0, 0]


def test_a_place_without_the_folder_says_so_and_is_not_asked_again(grid, tmp_path):
    class Elsewhere(HereProcesses):
        def run(self, job):
            return super().run({**job, "cwd": str(tmp_path / "only here")})

    cells = read_grid(grid("run: run.yaml\nvary: {seed: [0, 1]}"))
    found = sweep(cells, tmp_path / "out", jobs=1, retries=2, places=Elsewhere())
    assert [(cell.state, cell.attempts) for cell in found] == [("failed", 1)] * 2
    assert all("has no folder" in cell.error and "only here" in cell.error for cell in found)


def test_a_grid_with_a_method_more_goes_on_in_its_finished_cells(grid, fake, tmp_path):
    """Its run keeps what is finished; another option of a method that was there is another run."""
    out = tmp_path / "out"
    path = grid("run: run.yaml\nvary: {seed: [0, 4]}")
    sweep(read_grid(path), out, places=fake)
    (tmp_path / "run.yaml").write_text(RUN.replace("[seqft]", "[seqft, hpa]"))
    assert [r.state for r in sweep(read_grid(path), out, places=fake)] == ["finished"] * 2
    assert [r.state for r in sweep(read_grid(path), out, places=fake)] == ["kept"] * 2
    (tmp_path / "run.yaml").write_text(RUN.replace("[seqft]", "{seqft: {training: {rank: 2}}, hpa: {}, ewc: {}}"))
    with pytest.raises(RunError, match=r"seed=0 is finished with other settings"):
        sweep(read_grid(path), out, places=fake)


def test_an_out_that_is_a_file_is_said_before_anything_runs(grid, fake, tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(RunError, match="taken is a file; the cells of a grid need a folder"):
        sweep(read_grid(grid("run: run.yaml\nvary: {seed: [0]}")), tmp_path / "taken", places=fake)


def test_a_finished_cell_of_other_data_is_not_kept(tmp_path, pico_folder, fake):
    """Nothing is learned here: the finished cell is a run directory that knows what it was made from."""
    file = pico.run_file(tmp_path, pico_folder)
    path = tmp_path / "grid.yaml"
    path.write_text(f"run: {file.name}\nvary: {{seed: [0, 4]}}\n")
    cells, out = read_grid(path), tmp_path / "out"
    found = resolve(cells[0].config, out / "seed=0")
    claim(found.directory, found.shared_config(), found.recorded)
    mark = {"cell": "seed=0", "digest": cells[0].digest, "config": encode(cells[0].config)}
    (out / "seed=0" / "finished.json").write_text(json.dumps(mark))
    test = tmp_path / "colour-test.json"
    test.write_text(test.read_text().replace("Which?", "What?"))
    with pytest.raises(
        RunError, match=r"seed=0 is finished, and was made with other options, data, code .*data_sha256\.colour"
    ):
        sweep(cells, out, places=fake)
    assert not (out / "seed=4").exists()


def test_what_cannot_be_read_any_more_is_not_held_against_a_cell(tmp_path, pico_folder, monkeypatch):
    file = pico.run_file(tmp_path, pico_folder)
    config, out = read_run(file), tmp_path / "out"
    found = resolve(config, out)
    claim(found.directory, found.shared_config(), found.recorded)
    (tmp_path / "colour-test.json").unlink()
    job = {"names": encode(registry.export()), "cells": [{"config": encode(config), "out": str(out)}]}
    monkeypatch.setattr(cell_process, "_job", lambda: json.loads(json.dumps(job)))
    monkeypatch.setattr(cell_process.registry, "restore", lambda names: None)
    ended = []
    monkeypatch.setattr(cell_process.os, "_exit", ended.append)
    cell_process.look()
    assert ended == [0]


@pytest.mark.parametrize("damage", ["{}", '{"config": 3, "methods": {}}', "not json", '{"config": {}, "methods": {}}'])
def test_a_finished_cell_whose_records_are_damaged_is_not_kept(tmp_path, pico_folder, damage):
    config, out = read_run(pico.run_file(tmp_path, pico_folder)), tmp_path / "out"
    found = resolve(config, out)
    claim(found.directory, found.shared_config(), found.recorded)
    found.refuse_changed()
    found.directory.config_path.write_text(damage)
    with pytest.raises(RunError):
        resolve(config, out).refuse_changed()


def changed_option(folder: Path) -> None:
    path = folder / "out" / "config.json"
    recorded = json.loads(path.read_text())
    recorded["methods"]["seqft"]["training"]["max_steps"] = 99
    path.write_text(json.dumps(recorded))


def changed_picture(folder: Path) -> None:
    shown = sorted((folder / "images").glob("*.png"))
    check_pictures(folder / "out" / "pictures.json", shown, folder)
    shown[0].write_bytes(shown[1].read_bytes() + b" ")


@pytest.mark.parametrize(
    "change, said", [(changed_option, r"methods\.seqft\.training\.max_steps"), (changed_picture, "picture")]
)
def test_whatever_a_resume_refuses_a_finished_cell_is_not_kept_with(tmp_path, pico_folder, change, said):
    config, out = read_run(pico.run_file(tmp_path, pico_folder)), tmp_path / "out"
    found = resolve(config, out)
    claim(found.directory, found.shared_config(), found.recorded)
    found.refuse_changed()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert list(before) == [found.directory.config_path], "looking writes nothing"
    change(tmp_path)
    with pytest.raises(RunError, match=said):
        resolve(config, out).refuse_changed()
