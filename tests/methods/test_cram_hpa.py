"""CRAM with HPA's edit: what is released is the trained expert without the columns of A that safety claims."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import cram_kit
from holdfast import methods
from holdfast.checkpoints.curvature_file import Curvature
from holdfast.config import decode
from holdfast.editing.account import EditReport
from holdfast.errors import CalibrationError, ConfigError
from holdfast.functional.cram import RankRule
from holdfast.functional.hpa import HpaConfig, edit_weight
from holdfast.methods.cram_hpa import CramHpa, CramHpaConfig
from holdfast.models.load import load
from holdfast.stream.protocol import Checkpoint
from holdfast.training.training_config import TrainingConfig
from holdfast.tuners.cram.folder import load_expert

TRAINING = TrainingConfig(max_steps=4, batch_size=4, learning_rate=0.02)


def method(**changes) -> CramHpa:
    cram = cram_kit.config(warmup_fraction=0.5, held_out=0.25, rank=RankRule(r_min=2, r_max=4), max_groups=1)
    return CramHpa(CramHpaConfig(training=TRAINING, cram=cram, task_samples=6, **changes))


@pytest.fixture(scope="module")
def learned(pico_stream, pico_folder, tmp_path_factory) -> tuple[Path, list[Checkpoint]]:
    folder = tmp_path_factory.mktemp("stream")
    found: list[Checkpoint] = []
    for step in range(2):
        ctx = cram_kit.context(pico_stream, pico_folder, folder, step, found[-1] if found else None)
        made = method(edit=HpaConfig(projection="none", keep_bounds=(20.0, 20.0)))
        found.append(made.end_task(ctx, made.train_task(ctx)))
    return folder, found


def test_the_released_expert_is_the_trained_one_without_the_columns_of_safety(learned):
    folder, checkpoints = learned
    for step, checkpoint in enumerate(checkpoints):
        (released,) = Path(checkpoint.adapters[-1], "experts").glob(f"{step:02d}-*")
        trained, edited = load_expert(folder / str(step) / "scratch" / "expert"), load_expert(released)
        curvature = Curvature.load(folder / str(step) / "curvature.safetensors")
        rows = {row["layer"]: row for row in EditReport.load(folder / str(step) / "edit.json").layers}
        assert set(rows) == set(trained) == set(edited)
        for name, (a, b) in trained.items():
            new_a, new_b = edited[name]
            # The dense edit of the whole update, by another path through the mathematics.
            dense = edit_weight(
                torch.zeros(b.shape[0], a.shape[1]),
                b @ a,
                curvature.safety[name],
                curvature.task[name],
                keep_percent=20.0,
                orthogonal=False,
            )
            kept = dense.outcome.selection.kept
            assert 0 < int(kept.sum()) == rows[name]["kept"]
            assert torch.equal(new_b, b) and torch.equal(new_a, a.masked_fill(kept, 0.0))


def test_older_experts_stay_as_they_were_released(learned):
    _, (first, second) = learned
    for path in Path(first.adapters[-1], "experts").rglob("*.safetensors"):
        later = Path(second.adapters[-1], path.relative_to(first.adapters[-1]))
        assert later.read_bytes() == path.read_bytes()


def test_an_edited_expert_is_a_stock_adapter(learned, pico_folder):
    _, (_, second) = learned
    loaded = load(pico_folder)
    (expert,) = Path(second.adapters[-1], "experts").glob("01-*")
    model = PeftModel.from_pretrained(loaded.model, str(expert))
    active = [n for n, p in model.named_parameters() if "lora_A" in n and bool(p.any())]
    assert len(active) == len(load_expert(expert))
    assert json.loads((expert / "edit.json").read_text())["rule"] == "hpa"


def test_a_projection_is_refused_and_the_name_leaves_it_out():
    assert methods.get("cram_hpa").config.edit == HpaConfig(projection="none")
    with pytest.raises(ConfigError, match=r"edit\.projection is 'layer'; an expert is a LoRA"):
        methods.get("cram_hpa", edit={"orthogonal": True})
    with pytest.raises(ConfigError, match="cannot hold a multiple"):
        decode(CramHpaConfig, {"edit": {"orthogonal": "column"}})


def test_a_stream_without_safety_answers_is_refused_before_anything_is_trained(
    pico_stream, pico_folder, learned, tmp_path
):
    folder, _ = learned
    ctx = cram_kit.context(replace(pico_stream, safety_calibration=[]), pico_folder, tmp_path, 0)
    with pytest.raises(CalibrationError, match="cram_hpa needs safety calibration samples"):
        method().check_stream(ctx.stream)
    # And where it is needed, by whoever calls that alone.
    trained = Checkpoint(base=str(pico_folder), adapters=(str(folder / "0" / "scratch" / "expert"),))
    with pytest.raises(CalibrationError, match="cram_hpa needs safety calibration samples"):
        method().final_expert(ctx, trained)
    assert not list(tmp_path.rglob("*.safetensors"))
