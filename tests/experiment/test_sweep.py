"""A grid of runs: its cells, and that the finished are kept, the killed started again, and mistakes stay."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from pathlib import Path

import pytest

from holdfast.errors import ConfigError, RunError
from holdfast.experiment.cell_process import HereProcesses
from holdfast.experiment.sweep import read_grid, sweep

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
    ],
)
def test_a_mistake_in_a_grid_is_named(grid, text, message):
    with pytest.raises((ConfigError, LookupError, ValueError), match=message):
        read_grid(grid(text))


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
