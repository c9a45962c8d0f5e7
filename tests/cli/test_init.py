"""`holdfast init` and `--version`."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import holdfast
from holdfast import experiment, shipped
from holdfast.cli import app
from holdfast.errors import ConfigError, StorageError, UnknownNameError

RUNNER = CliRunner()


@pytest.mark.parametrize("name", sorted(shipped.run_files()))
def test_what_init_writes_is_a_run_file_with_its_stream(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOLDFAST_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    result = RUNNER.invoke(app, ["init", name])
    assert result.exit_code == 0, result.output
    written = experiment.read_run(tmp_path / f"{name}.yaml")
    assert written == experiment.read_run(shipped.run_files()[name])
    assert f"holdfast doctor {name}.yaml" in result.output.replace("\n", "")


def test_init_lists_every_name_with_a_line_about_it() -> None:
    result = RUNNER.invoke(app, ["init", "--list"])
    rows = [line.split("  ", 1) for line in result.output.splitlines()]
    assert {row[0].strip() for row in rows} == set(shipped.run_files()) and all(row[1].strip() for row in rows)


def test_init_overwrites_nothing_of_the_users(tmp_path: Path) -> None:
    arguments = ["init", "llava-1.5-7b", "--out", str(tmp_path)]
    assert RUNNER.invoke(app, arguments).exit_code == 0
    assert RUNNER.invoke(app, arguments).exit_code == 0, "unchanged files are no loss"
    changed = tmp_path / "llava-1.5-7b.yaml"
    changed.write_text("model: mine\n")
    with pytest.raises(StorageError, match=r"llava-1\.5-7b\.yaml exists and may hold changes of yours"):
        RUNNER.invoke(app, arguments, catch_exceptions=False)
    assert changed.read_text() == "model: mine\n"
    assert RUNNER.invoke(app, [*arguments, "--overwrite"]).exit_code == 0
    assert changed.read_text() != "model: mine\n"


def test_init_of_an_unknown_name_or_of_none_says_what_there_is() -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean 'llava-1\.5-7b'"):
        RUNNER.invoke(app, ["init", "llava-1.5-7"], catch_exceptions=False)
    with pytest.raises(ConfigError, match="init --list"):
        RUNNER.invoke(app, ["init"], catch_exceptions=False)


def test_the_version_is_shown() -> None:
    result = RUNNER.invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"holdfast {holdfast.__version__}\n")
