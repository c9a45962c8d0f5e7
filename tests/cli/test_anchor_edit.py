"""The anchored edit by every road that makes an edit: files, live models, and the function itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from typer.testing import CliRunner

import holdfast
from holdfast.calibration.gram_sets import GramSets
from holdfast.cli import app
from holdfast.errors import CalibrationError, ConfigError
from holdfast.functional.anchor import anchor_lora
from holdfast.models.load import load
from holdfast.rules.anchor import AnchorConfig
from holdfast.tiny.example import ExampleFiles, write_example


@dataclass(frozen=True)
class World:
    """The example, its Gram matrices, and safe answers."""

    files: ExampleFiles
    grams: Path
    safe: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("anchor")
    files = write_example(folder / "example", requests=8)
    safe = folder / "safe.jsonl"
    made = CliRunner().invoke(
        app,
        ["calibrate-data", str(files.before), "--prompts", str(files.forbidden), "--out", str(safe), "--allow-short",
         "--max-new-tokens", "32"],
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    grams = folder / "grams"
    result = CliRunner().invoke(
        app,
        ["calibrate-grams", str(files.before), "--after", str(files.after), "--safety", str(safe), "--task",
         str(files.task), "--limit", "16", "--out", str(grams)],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return World(files, grams, safe)


def edited(world: World, out: Path, *more: str) -> Path:
    result = CliRunner().invoke(
        app,
        ["edit", str(world.files.before), str(world.files.after), "--rule", "anchor", "--out", str(out), *more],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    return out


def test_files_live_models_and_the_function_make_one_edit(world: World, tmp_path: Path) -> None:
    out = edited(
        world, tmp_path / "out", "--grams", str(world.grams), "--set", "safety_weight=0.6", "--export", "adapter"
    )
    written = load_file(out / "adapter_model.safetensors")
    before = load_file(world.files.after / "adapter_model.safetensors")
    base = load(world.files.before, dtype="float32").model
    model = PeftModel.from_pretrained(base, world.files.after)
    result = holdfast.harmonize({}, model, world.grams, config=AnchorConfig(safety_weight=0.6))
    live = {name.replace(".default", ""): value for name, value in model.state_dict().items() if "lora_A" in name}
    sets = GramSets.open(world.grams)
    assert result.report.rule == "anchor"
    for key, value in written.items():
        if "lora_B" in key:
            assert torch.equal(value, before[key])
            continue
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        wanted = anchor_lora(before[key].float(), sets.task.gram(module), sets.safety.gram(module), safety_weight=0.6)
        # The adapter is stored in fp16.
        torch.testing.assert_close(value.float(), wanted, rtol=1e-2, atol=2e-4)
        torch.testing.assert_close(live[key].float(), wanted, rtol=1e-4, atol=1e-5)
        assert not torch.equal(value, before[key])


def test_a_dense_export_is_the_same_edit(world: World, tmp_path: Path) -> None:
    out = edited(world, tmp_path / "dense", "--grams", str(world.grams), "--past", str(world.grams / "task"))
    assert (out / "verification.json").is_file()


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ([], "takes grams beside its options"),
        (["--past", "x"], "--past goes with --grams"),
    ],
)
def test_what_is_missing_is_said(world: World, tmp_path: Path, more: list[str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        edited(world, tmp_path / "out", *more)


def test_gram_matrices_of_another_model_are_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"no index\.json|is unfinished|no Gram store"):
        edited(world, tmp_path / "out", "--grams", str(tmp_path))
