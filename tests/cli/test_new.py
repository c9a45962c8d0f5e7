"""`holdfast new`: what it writes passes its own test; `list` and `edit` know code of one's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import stranger_kit
from holdfast import registry
from holdfast.cli import app
from holdfast.cli.list import KINDS, REGISTRIES
from holdfast.cli.new import Kind
from holdfast.errors import ConfigError, StorageError, UnknownNameError


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def test_what_is_written_passes_as_written(tmp_path):
    """Every kind, and names that are also words of the package."""
    for kind in Kind:
        for name in (f"half_{kind.value}", kind.value):
            assert invoke("new", kind.value, name, "--out", tmp_path).exit_code == 0
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "."],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(registry.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # And is in the project's own style.
    check = [sys.executable, "-m", "ruff", "check", "--config", str(Path(__file__).parents[2] / "pyproject.toml")]
    done = subprocess.run([*check, "."], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["Half", "my-edit", "class", "1st", "", "a/b", "_x"])
def test_a_name_that_can_be_no_module_is_refused(name, tmp_path):
    with pytest.raises(ConfigError, match="cannot be a Python module"):
        invoke("new", "method", name, "--out", tmp_path)


def test_nothing_is_overwritten_or_hidden(tmp_path):
    with pytest.raises(ConfigError, match="would hide the module 'json'"):
        invoke("new", "judge", "json", "--out", tmp_path)
    (tmp_path / "test_mine.py").write_text("")
    with pytest.raises(StorageError, match=r"test_mine\.py exists already"):
        invoke("new", "judge", "mine", "--out", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["test_mine.py"]


def test_list_says_where_a_name_comes_from(tmp_path, monkeypatch):
    points = stranger_kit.ENTRY_POINTS + "\n[holdfast.tuners]\ncram = strangers.parts:Half\n"
    monkeypatch.syspath_prepend(stranger_kit.install(tmp_path, entry_points=points))
    for what, name, line in [
        ("methods", "strangers_half", "Half of what was learned stays."),
        ("rules", "strangers_share", "A share of the change stays."),
        ("judges", "strangers_curt", "Unsafe is what is longer"),
        ("scorers", "strangers_length", "The share of characters"),
        ("readers", "strangers_lines", "A question, a tab, an answer."),
    ]:
        rows = invoke("list", what).output.splitlines()
        (row,) = (row for row in rows if row.startswith(name))
        assert "  strangers 1.2  " in row and line in row
        assert any("  builtin  " in row for row in rows)
    assert "claimed twice: by holdfast itself" in invoke("list", "tuners").output
    assert set(REGISTRIES) < set(KINDS)
    for what in REGISTRIES:
        assert invoke("list", what).exit_code == 0


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (["--rule", "interpolaton"], UnknownNameError, "Did you mean 'interpolation'"),
        (["--rule", "interpolation", "--set", "factr=0.5"], UnknownNameError, "Did you mean 'factor'"),
        (["--rule", "interpolation", "--set", "factor"], ConfigError, "expected KEY=VALUE"),
        (["--rule", "interpolation", "--set", "factor=["], ConfigError, "--set factor: .* is not valid YAML"),
        (["--rule", "interpolation", "--set", "factor=2"], ConfigError, "factor is 2"),
        (["--rule", "interpolation", "--focus", "2"], ConfigError, "--focus is an option of rule hpa"),
        (["--rule", "interpolation", "--projection", "none"], ConfigError, "--projection is an option of rule hpa"),
        (["--focus", "2", "--set", "focus_ratio=3"], ConfigError, "focus_ratio is set twice: by --focus"),
        (["--set", "focus_ration=3"], UnknownNameError, "Did you mean 'focus_ratio'"),
        (["--rule", "ties"], ConfigError, "takes theta_0, updates beside its options"),
        (["--rule", "no_module:Mine"], ConfigError, "there is no module 'no_module'"),
        (["--rule", "hpa"], ConfigError, "Pass --calibration FILE, or both"),
    ],
)
def test_a_mistake_in_a_rule_is_a_sentence(arguments, error, message, tmp_path):
    with pytest.raises(error, match=message):
        invoke("edit", tmp_path, tmp_path, "--out", tmp_path / "out", *arguments)


def test_options_of_a_file_are_laid_under_those_of_the_line(tmp_path):
    import typer

    from holdfast.cli.rule_options import read_rule

    context = typer.Context(typer.main.get_command(app))
    (tmp_path / "options.json").write_text(json.dumps({"factor": 0.25}))
    made = [
        read_rule(context, "interpolation", pairs, tmp_path / "options.json", flags={}).settings()["factor"]
        for pairs in ([], ["factor=0.75"])
    ]
    assert made == [0.25, 0.75]
