"""`--preset`: the table, what it makes of a run file and of an edit, and what it does not go with."""

from __future__ import annotations

import typing
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import pico
from holdfast import experiment
from holdfast.cli import app
from holdfast.cli import run as run_verb
from holdfast.cli.presets import PRESETS, PresetName, with_preset
from holdfast.errors import ConfigError
from holdfast.functional.hpa_config import HpaConfig
from holdfast.methods.anchor import AnchorMethodConfig

# Other constants than a preset's, as a run file may hold them for all methods.
BENT = {
    "edit": {"keep_bounds": [1, 2], "ranking": "eps", "safety_weight": 9.0, "past_weight": 0.9},
    "calibration": {"damping": 1.0, "batch_size": 3},
    "task_samples": 5,
    "benign_samples": 1,
    "screen": True,
}


@pytest.fixture
def bent(tmp_path: Path, pico_folder: Path) -> Path:
    file = pico.run_file(tmp_path, pico_folder)
    data = yaml.safe_load(file.read_text())
    data["defaults"] |= BENT
    file.write_text(yaml.safe_dump(data))
    return file


def test_the_flag_takes_the_names_of_the_table() -> None:
    assert set(typing.get_args(PresetName)) == set(PRESETS)


def test_the_paper_s_constants_stand_over_a_file_s_defaults(bent: Path) -> None:
    made = experiment.build_methods(with_preset(experiment.read_run(bent), "paper"))
    assert list(made) == ["hpa"]
    config = made["hpa"].config
    assert config.edit == HpaConfig() and config.calibration.damping == 0.01
    # arXiv 2511.20158: p from 5 to 15 %, k = 2 p, alpha from 0.4 to 0.8, 128 samples of the task.
    assert (config.edit.keep_bounds, config.edit.focus_ratio, config.edit.alpha_bounds) == ((5, 15), 2, (0.4, 0.8))
    assert (config.task_samples, config.benign_samples, config.screen) == (128, 0, False)
    # What is no part of the edit stays the file's.
    assert config.training.rank == 2 and config.calibration.batch_size == 3


def test_ours_is_the_anchored_edit_with_its_defaults(bent: Path) -> None:
    made = experiment.build_methods(with_preset(experiment.read_run(bent), "holdfast"))
    config = made["anchor"].config
    assert config.edit == AnchorMethodConfig().edit and config.screen and config.benign_samples is None
    assert config.task_samples == 128 and config.training.rank == 2


@pytest.mark.parametrize("name", list(PRESETS))
def test_run_runs_the_preset_s_method(bent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    seen = []
    monkeypatch.setattr(run_verb, "finish", lambda config, out, **options: seen.append(config))
    result = CliRunner().invoke(app, ["run", str(bent), "--preset", name, "--seed", "3"])
    assert result.exit_code == 0, result.output
    assert list(seen[0].methods) == [PRESETS[name].method] and seen[0].seed == 3


def test_a_preset_and_a_method_are_one_too_many(bent: Path) -> None:
    with pytest.raises(ConfigError, match="--preset names a method and --method another"):
        CliRunner().invoke(app, ["run", str(bent), "--preset", "paper", "--method", "hpa"], catch_exceptions=False)


@pytest.mark.parametrize("verb", ["run", "edit"])
def test_help_shows_the_table_and_a_word_that_is_none_is_refused(verb: str) -> None:
    # Words that wrap in a column of the table stand with its frame between them.
    text = " ".join(CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200"}).output.replace("│", " ").split())
    assert "--preset" in text
    for preset in PRESETS.values():
        assert all(word in text for word in preset.line.split())
    result = CliRunner().invoke(app, [verb, "a", "b", "--preset", "papre"])
    assert result.exit_code == 2


@pytest.mark.parametrize("name", list(PRESETS))
def test_edit_takes_the_preset_s_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from holdfast.cli import rule_options

    seen = []

    def read_rule(context, rule, pairs, file, **given):  # type: ignore[no-untyped-def]
        seen.append((rule, pairs, file))
        raise ConfigError("far enough")

    monkeypatch.setattr(rule_options, "read_rule", read_rule)
    arguments = ["edit", "a", "b", "--out", str(tmp_path / "out"), "--preset", name]
    with pytest.raises(ConfigError, match="far enough"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert seen == [(PRESETS[name].rule, [], None)]


@pytest.mark.parametrize(
    "more",
    [["--rule", "hpa"], ["--set", "focus_ratio=3"], ["--options", "o.yaml"], ["--keep", "1..2"], ["--alpha", "0..1"],
     ["--focus", "3"], ["--ranking", "eps"], ["--curvature-form", "multiply"], ["--projection", "none"]],
)  # fmt: skip
@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_fixes_rule_and_options(tmp_path: Path, name: str, more: list[str]) -> None:
    arguments = ["edit", "a", "b", "--out", str(tmp_path / "out"), "--preset", name, *more]
    with pytest.raises(ConfigError, match=rf"--preset {name} stands for .* and {more[0]} sets one"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_ours_says_that_an_edit_needs_gram_matrices(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--grams"):
        CliRunner().invoke(
            app, ["edit", "a", "b", "--out", str(tmp_path / "out"), "--preset", "holdfast"], catch_exceptions=False
        )
