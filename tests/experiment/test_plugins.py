"""Code of somebody else's in a run: found by name in every process, recorded, and refused where it has changed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import pico
import stranger_kit
from holdfast import experiment, registry
from holdfast.errors import ConfigError, RunError, UnknownNameError
from holdfast.experiment.resolve import resolve
from holdfast.judges import JUDGES
from holdfast.methods import METHODS
from holdfast.stream.summary import without_timings

HALF = """
from dataclasses import dataclass
from holdfast.methods.seqft import SeqFT, SeqFTConfig
from holdfast.rules.base import DenseEdit


@dataclass(frozen=True, kw_only=True)
class HalfConfig(SeqFTConfig):
    factor: float = 0.5


class Half(SeqFT):
    Config = HalfConfig

    def rule(self):
        return self

    needs_curvature = False

    def settings(self):
        return {"factor": self.config.factor}

    def edit(self, layer, w_prev, w_new):
        return DenseEdit(weight=w_prev.float() + self.config.factor * (w_new.float() - w_prev.float()))
"""


@pytest.fixture(autouse=True)
def forget():
    yield
    registry._plugins.clear()
    for name in ("my_edit", "strangers", "strangers.parts"):
        sys.modules.pop(name, None)


def run_file(folder: Path, model: Path, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    return pico.run_file(folder, model, **changes)


def of_strangers(folder: Path, model: Path) -> Path:
    """A run file whose method, judge, scorer and reader are those of the distribution."""
    path = run_file(folder, model)
    data = yaml.safe_load(path.read_text())
    for task in data["stream"]["tasks"]:
        lines = "".join(f"Which is {task['name']} {i}?\tred\n" for i in range(6))
        (folder / f"{task['name']}.tsv").write_text(lines)
        task.update(format="strangers_lines", scorer="strangers_length")
        task.update(train=f"{task['name']}.tsv", test=f"{task['name']}.tsv")
    data["evaluation"]["judges"] = [{"name": "strangers_curt"}, {"name": "strangers.parts:Curt"}]
    data["methods"] = {
        "half": {"method": "strangers_half"},
        "quarter": {"method": "strangers.parts:Half", "edit": {"factor": 0.25}},
    }
    path.write_text(yaml.safe_dump(data))
    return path


def tensors(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*.safetensors"))}


def test_parts_of_an_installed_distribution_run_in_two_processes_and_resume_after_a_kill(
    tmp_path, pico_folder, monkeypatch
):
    site = stranger_kit.install(tmp_path / "site")
    file, killed, whole = of_strangers(tmp_path / "files", pico_folder), tmp_path / "killed", tmp_path / "whole"
    source = str(Path(registry.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "holdfast", "run", str(file), "--out", str(killed), "--jobs", "2", "--no-report"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), source]), "STRANGERS_DIE": "1"},
        start_new_session=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (killed / "summary.json").exists()
    records = list(killed.glob("methods/*/1-*/record.json"))
    assert records
    before = {path: path.read_bytes() for path in records}

    monkeypatch.syspath_prepend(site)
    config = experiment.read_run(file)
    two = experiment.run(config, killed, jobs=2)
    assert {path: path.read_bytes() for path in records} == before
    one = experiment.run(config, whole)
    assert without_timings(one) == without_timings(two) and tensors(whole) == tensors(killed)
    assert all(method["complete"] for method in two["methods"].values())

    recorded = json.loads((killed / "config.json").read_text())
    here = {"distribution": "strangers", "version": "1.2", "file": "parts.py"}
    for label in ("half", "quarter"):
        method = recorded["methods"][label]
        assert method["class"] == "strangers.parts:Half" and method["class_from"]["file"] == "parts.py"
    assert here.items() <= recorded["methods"]["half"]["class_from"].items()
    plugins = recorded["config"]["plugins"]
    for what, name in [("judges", "strangers_curt"), ("scorers", "strangers_length"), ("readers", "strangers_lines")]:
        assert here.items() <= plugins[what][name].items() and len(plugins[what][name]["sha256"]) == 64

    # An update of the distribution is other code, and the run says what differs.
    metadata = site / "strangers-1.2.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("1.2", "1.3"))
    registry._points_on.cache_clear()
    with pytest.raises(RunError, match=r"plugins\.judges\.strangers_curt\.version: '1\.2' -> '1\.3'"):
        experiment.run(config, killed)


def test_a_plug_in_file_runs_in_two_processes_and_a_change_of_it_is_refused(tmp_path, pico_folder):
    files = tmp_path / "files"
    file = run_file(files, pico_folder, plugins=["my_edit.py"], methods=["my_edit:Half", "seqft"])
    plugin = files / "my_edit.py"
    plugin.write_text(HALF)
    config = experiment.read_run(file)
    assert config.plugins == (str(plugin),) and list(config.methods) == ["Half", "seqft"]
    summary = experiment.run(config, tmp_path / "out", jobs=2)
    assert all(method["complete"] for method in summary["methods"].values())
    recorded = json.loads((tmp_path / "out" / "config.json").read_text())
    sha256 = recorded["config"]["plugins"]["files"]["my_edit.py"]["sha256"]
    assert recorded["methods"]["Half"]["class_from"] == {"file": "my_edit.py", "sha256": sha256}
    assert "class_from" not in recorded["methods"]["seqft"]
    # Resuming with the same code adds nothing; the same number of bytes within the same second is seen too.
    assert without_timings(experiment.run(config, tmp_path / "out")) == without_timings(summary)
    resolve(config, tmp_path / "out").refuse_changed()
    plugin.write_text(HALF.replace("0.5", "0.6"))
    with pytest.raises(RunError, match=r"plugins\.files\.my_edit\.py\.sha256: .*; methods\.Half\.class_from\.sha256: "):
        resolve(config, tmp_path / "out").refuse_changed()
    with pytest.raises(RunError, match=rf"plugins\.files\.my_edit\.py\.sha256: '{sha256}' -> '"):
        experiment.run(config, tmp_path / "out")


def test_a_method_put_into_the_table_from_python_reaches_the_other_processes(tmp_path, pico_folder, monkeypatch):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "my_edit.py").write_text(HALF)
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.setitem(METHODS, "mine", ("my_edit:Half", {"factor": 0.25}))
    monkeypatch.setitem(JUDGES, "mine", ("holdfast.judges.keyword:KeywordJudge", {"extra": ["never"]}))
    config = experiment.read_run(
        run_file(
            tmp_path / "files",
            pico_folder,
            methods={"a": {"method": "mine"}, "b": {"method": "mine"}},
            evaluation={"batch_size": 4, "judges": [{"name": "mine"}]},
        )
    )
    summary = experiment.run(config, tmp_path / "out", jobs=2)
    assert [m["config"]["factor"] for m in summary["methods"].values()] == [0.25, 0.25]
    assert all(m["complete"] for m in summary["methods"].values())


def test_a_class_that_only_this_process_has_is_refused_before_the_work_of_several(tmp_path, pico_folder, monkeypatch):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "my_edit.py").write_text(HALF)
    monkeypatch.syspath_prepend(tmp_path / "code")
    from my_edit import Half

    class Mine(Half):
        pass

    monkeypatch.setitem(METHODS, "mine", (Mine, {}))
    config = experiment.read_run(run_file(tmp_path / "files", pico_folder, methods=["mine", "seqft"]))
    assert experiment.resolve(config, tmp_path / "out").methods["mine"].config.factor == 0.5
    with pytest.raises(ConfigError, match="is defined inside a function, so the processes of jobs=N cannot import it"):
        experiment.run(config, tmp_path / "out", jobs=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"methods": ["my_edit:Half"]}, ConfigError, r"there is no module 'my_edit'.*plugins"),
        ({"plugins": ["gone.py"]}, ConfigError, r"plug-in .*gone\.py: expected a Python file"),
        ({"plugins": [3]}, ConfigError, r"plugins\[0\]: found 3 \(int\), expected str"),
        (
            {"plugins": ["my_edit.py"], "methods": ["my_edit:Halv"]},
            ConfigError,
            r"no 'Halv'\. Did you mean my_edit:Half\?",
        ),
        (
            {"plugins": ["my_edit.py"], "methods": {"my_edit:Half": {"facter": 1}}},
            UnknownNameError,
            r"methods\.Half\.facter: unknown key\. Did you mean 'factor'\?",
        ),
        ({"methods": ["a:Half", "b:Half"]}, ConfigError, "two are called 'Half'"),
        ({"evaluation": {"judges": [{"name": "curt"}]}}, UnknownNameError, "Unknown judge 'curt'"),
    ],
)
def test_a_mistake_with_a_plug_in_is_named_before_the_work(tmp_path, pico_folder, changes, error, message):
    files = tmp_path / "files"
    files.mkdir()
    if "my_edit.py" in changes.get("plugins", ()):
        (files / "my_edit.py").write_text(HALF)
    with pytest.raises(error, match=message):
        experiment.resolve(experiment.read_run(run_file(files, pico_folder, **changes)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_scorer_that_does_not_exist_is_named_before_the_work(tmp_path, pico_folder):
    path = run_file(tmp_path / "files", pico_folder)
    data = yaml.safe_load(path.read_text())
    data["stream"]["tasks"][1]["scorer"] = "exact_mach"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(UnknownNameError, match="Did you mean 'exact_match'"):
        experiment.resolve(experiment.read_run(path), tmp_path / "out")
