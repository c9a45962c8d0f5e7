"""The table's paired differences: those of `metrics.paired`, written as they always were."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

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
    text = five_seeds.difference({"values": ours}, {"values": others}).replace("−", "-")
    assert text.startswith(f"{100 * wanted.value:.1f}")
    if len(ours) == 1:
        assert "[" not in text
        return
    assert f"[{100 * wanted.low:.1f}, {100 * wanted.high:.1f}]" in text
    assert text.endswith("*") == (wanted.low > 0 or wanted.high < 0)


def test_other_seeds_are_no_pairs(five_seeds):
    with pytest.raises(DataError, match="over the same samples"):
        five_seeds.difference({"values": [0.1, 0.2]}, {"values": [0.1]})
