"""`holdfast calibrate-data`: no file that somebody made is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from holdfast.cli import app
from holdfast.errors import HoldfastError

ROW = '{"prompt": "How?", "id": 1}\n'


def ask(*options: object) -> BaseException | None:
    return CliRunner().invoke(app, ["calibrate-data", "no-model", *map(str, options)]).exception


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.jsonl").write_text(ROW)
    return tmp_path / "prompts.jsonl"


def test_an_out_that_exists_is_kept_unless_it_may_be_replaced(prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    out.write_text("precious")
    assert "exists. Choose another --out, remove it, or pass --overwrite" in str(
        ask("--prompts", prompts, "--out", out)
    )
    assert "no-model" in str(ask("--prompts", prompts, "--out", out, "--overwrite"))
    assert out.read_text() == "precious"


@pytest.mark.parametrize("name", ["prompts.jsonl", "../tests/prompts.jsonl", "link.jsonl"])
def test_the_prompts_are_never_the_out(name: str, prompts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tests"
    folder.mkdir()
    prompts = prompts.rename(folder / "prompts.jsonl")
    (folder / "link.jsonl").symlink_to(prompts)
    error = ask("--prompts", prompts, "--out", folder / name, "--overwrite")
    assert isinstance(error, HoldfastError) and "which is read; it would be lost" in str(error)
    assert prompts.read_text() == ROW


def test_a_device_that_is_not_there_is_named_before_the_model_is_loaded(prompts: Path, tmp_path: Path) -> None:
    error = ask("--prompts", prompts, "--out", tmp_path / "o.jsonl", "--device", "cuda:77")
    assert "device is 'cuda:77'; expected one of this machine: cpu" in str(error)
