"""Cells on a Ray cluster of two workers on this machine: dead ones are started again, finished ones are kept."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from typer.testing import CliRunner

from holdfast.cli import app
from holdfast.errors import ConfigError, RunError
from holdfast.experiment.ray_places import RayPlaces

with_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra holdfast[ray]")

# In a process of its own: Ray changes signal handlers and warns about this and that.
SWEEP = """
import json, sys
from pathlib import Path
from holdfast.experiment.ray_places import RayPlaces
from holdfast.experiment.sweep import read_grid, sweep
grid, out, fake = sys.argv[1:]
places = RayPlaces("local", workers=2, command=(sys.executable, fake))
rounds = []
for _ in range(2):
    found = sweep(read_grid(grid), out, jobs=4, retries=2, places=places)
    rounds.append([[r.name, r.state, r.attempts, r.error] for r in found])
places.close()
print(json.dumps(rounds))
"""
CELL = """
import json, os, signal, sys
from pathlib import Path
job = json.loads(sys.stdin.readline())
out = Path(job["out"]); out.mkdir(parents=True, exist_ok=True)
starts = len(list(out.glob("start-*"))); (out / f"start-{starts}").write_text(f"{Path.cwd()}|{os.getpid()}")
seed = job["config"]["seed"]
if seed == 1 and starts == 0:
    os.kill(os.getppid(), signal.SIGKILL)  # the Ray worker, as a machine that is lost
    sys.stdin.read()  # ... and nobody waits for this any more
    sys.exit(1)
if seed == 2:
    print("ConfigError: the data is not there.", file=sys.stderr); sys.exit(2)
"""


def ended(pid: int, seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.2)
    return False


@with_ray
@pytest.mark.timeout(240)
def test_a_lost_worker_is_replaced_and_a_finished_cell_is_kept(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "model: some/model\nstream: {name: s, tasks: [{name: a, test: a.jsonl}]}\nmethods: [seqft]\n"
    )
    (tmp_path / "grid.yaml").write_text("run: run.yaml\nvary: {seed: [0, 1, 2]}\n")
    (tmp_path / "cell.py").write_text(CELL)
    done = subprocess.run(
        [sys.executable, "-c", SWEEP, str(tmp_path / "grid.yaml"), "out", str(tmp_path / "cell.py")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=200,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, again = json.loads(done.stdout.splitlines()[-1])
    assert first[0] == ["seed=0", "finished", 1, ""] and first[1] == ["seed=1", "finished", 2, ""]
    assert first[2] == ["seed=2", "failed", 1, "ConfigError: the data is not there."]
    assert [row[1] for row in again] == ["kept", "kept", "failed"]
    said = {path.parent.name: path.read_text().split("|") for path in (tmp_path / "out").glob("*/start-0")}
    assert {name: where for name, (where, _) in said.items()} == dict.fromkeys(
        ("seed=0", "seed=1", "seed=2"), str(tmp_path)
    )
    assert len(list((tmp_path / "out" / "seed=0").glob("start-*"))) == 1
    assert ended(int(said["seed=1"][1])), "a cell ends with its worker"


@with_ray
@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "127.0.0.1:99999", "no.such.host.invalid:6379"])
def test_a_cluster_that_is_not_there_is_said(address: str) -> None:
    with pytest.raises(RunError, match=re.escape(f"No Ray cluster answers at '{address}'")):
        RayPlaces(address)


@pytest.mark.parametrize(
    "kind, said", [("RayTaskError", "could not start it: no such interpreter"), ("Lost", "is gone")]
)
def test_a_cell_that_cannot_start_is_told_from_a_lost_worker(
    kind: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for Ray: its errors, and who raises them."""
    ray = ModuleType("ray")
    errors = ray.exceptions = SimpleNamespace(RayError=type("RayError", (Exception,), {}))  # type: ignore[attr-defined]
    errors.RayTaskError = type("RayTaskError", (errors.RayError,), {"cause": "no such interpreter"})
    errors.Lost = type("Lost", (errors.RayError,), {})

    def get(_: object) -> None:
        raise getattr(errors, kind)

    remote = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_: object()))
    for name, value in {"init": lambda **_: None, "remote": lambda _: remote, "get": get}.items():
        setattr(ray, name, value)
    monkeypatch.setitem(sys.modules, "ray", ray)
    status, found = RayPlaces("local", workers=1).run({"cwd": None})
    assert status == 1 and said in found


def test_amounts_and_a_missing_ray_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for amounts in ({"cpus": 0}, {"gpus": -1}):
        with pytest.raises(ConfigError, match="a cell reserves"):
            RayPlaces(**amounts)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'holdfast\[ray\]'"):
        RayPlaces()
    (tmp_path / "run.yaml").write_text(
        "model: m\nstream: {name: s, tasks: [{name: a, test: a.jsonl}]}\nmethods: [seqft]\n"
    )
    (tmp_path / "grid.yaml").write_text("run: run.yaml\nvary: {seed: [0]}\n")
    found = CliRunner().invoke(app, ["sweep", str(tmp_path / "grid.yaml"), "--gpus-per-cell", "0.5"])
    assert found.exit_code != 0 and "add --ray" in str(found.exception) + found.output
