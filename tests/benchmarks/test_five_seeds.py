"""The table's paired differences: those of `metrics.paired`, written as they always were."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from holdfast.errors import DataError
from holdfast.metrics.intervals import over_seeds


@pytest.fixture(scope="module")
def five_seeds() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "five_seeds.py"
    spec = importlib.util.spec_from_file_location("five_seeds", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("ours", "others"),
    [
        ([0.72, 0.70, 0.73, 0.71, 0.74], [0.47, 0.46, 0.49, 0.44, 0.50]),
        ([0.1, 0.2, 0.3, 0.1, 0.2], [0.2, 0.1, 0.2, 0.3, 0.1]),
        ([0.5], [0.25]),
    ],
)
def test_a_paired_difference_is_the_mean_over_seeds_with_its_t_interval(five_seeds, ours, others):
    wanted = over_seeds([a - b for a, b in zip(ours, others, strict=True)])
    text = five_seeds.difference({"values": ours}, {"values": others}, 1.0).replace("−", "-")
    assert text.startswith(f"{100 * wanted.value:.1f}")
    if len(ours) == 1:
        assert "[" not in text
        return
    assert f"[{100 * wanted.low:.1f}, {100 * wanted.high:.1f}]" in text
    assert text.endswith("*") == (wanted.low > 0 or wanted.high < 0)


def test_data_of_another_size_are_not_taken_for_those_asked_for(five_seeds, tmp_path):
    asked = {"prompts": 100, "world": "tiny", "harmful": 0.01}
    five_seeds.require_same_size(tmp_path, asked)  # of an earlier version: nothing is known
    (tmp_path / five_seeds.SIZE).write_text('{"prompts": 100, "world": "tiny", "harmful": 0.01}')
    five_seeds.require_same_size(tmp_path, asked)
    with pytest.raises(SystemExit, match=r"written with prompts 100, and prompts is 200 now"):
        five_seeds.require_same_size(tmp_path, {**asked, "prompts": 200})


def test_a_row_changes_what_it_names_alone(five_seeds):
    own = {"method": "hpa", "calibration": {"damping": 1.0, "tokens": "all"}, "unaligned": "here"}
    found = five_seeds.merged(own, {"calibration": {"damping": 0.01}})
    assert found == {"method": "hpa", "calibration": {"damping": 0.01, "tokens": "all"}, "unaligned": "here"}


def test_parameters_are_counted_from_the_file(five_seeds, tmp_path):
    tensors = {
        "a.lora_A.weight": torch.zeros(2, 5),
        "a.lora_B.weight": torch.zeros(3, 2),
        "base.probe.x": torch.zeros(9),
    }
    save_file(tensors, tmp_path / "one.safetensors")
    assert five_seeds.parameters_of(tmp_path / "one.safetensors") == 16


def test_other_seeds_are_no_pairs(five_seeds):
    with pytest.raises(DataError, match="over the same samples"):
        five_seeds.difference({"values": [0.1, 0.2]}, {"values": [0.1]}, 1.0)


def test_among_many_methods_a_difference_needs_more(five_seeds):
    figures = ("ap", "bwt", "masr", "compliance_mean", "over_refusal")

    def row(*values):
        return {key: {"values": list(values)} for key in figures}

    rows = {
        "hpa": row(0.70, 0.71, 0.72, 0.73, 0.74),
        "far": row(0.20, 0.22, 0.21, 0.24, 0.23),
        "near": row(0.69, 0.695, 0.71, 0.725, 0.738),
        **{f"same {i}": row(0.70, 0.72, 0.71, 0.74, 0.73) for i in range(8)},
    }
    lines = {line.split(" | ")[0]: line for line in five_seeds.differences(rows, "hpa")}
    assert lines["| far"].count("**") == 5
    assert " *" in lines["| near"] and "**" not in lines["| near"]
    assert "*" not in lines["| same 0"].replace("| same 0", "")
    assert five_seeds.differences({"hpa": row(0.7), "far": row(0.2)}, "hpa") == []
