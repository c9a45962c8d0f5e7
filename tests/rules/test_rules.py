"""Every rule answers the same questions: made from plain options, an edit of a layer, dense and as a LoRA alike."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import is_dataclass

import pytest
import torch

import holdfast.rules
from holdfast.config import decode, encode
from holdfast.errors import CalibrationError, CheckpointError
from holdfast.rules.base import EditRule, Layer, LoraEditRule, Rule, needs_of

ROWS, COLUMNS, RANK, SCALING = 12, 20, 3, 0.5


def rule_classes() -> dict[str, type[Rule]]:
    """Every rule that a file of `holdfast.rules` defines, by its place."""
    found = {}
    for info in pkgutil.iter_modules(holdfast.rules.__path__):
        module = importlib.import_module(f"holdfast.rules.{info.name}")
        for value in vars(module).values():
            named = isinstance(value, type) and issubclass(value, Rule) and value.__module__ == module.__name__
            if named and isinstance(getattr(value, "name", None), str | property) and value.__name__ != "Rule":
                found[f"{info.name}:{value.__name__}"] = value
    # The common part of the controls is no rule of its own.
    del found["column_factors:ColumnFactorRule"]
    return found


RULES = rule_classes()
FROM_OPTIONS = {place: cls for place, cls in RULES.items() if not cls.inputs}


def made(cls: type[Rule], tmp_path, **options):
    if "folder" in cls.Config.__dataclass_fields__:
        options["folder"] = str(tmp_path)
    return cls(decode(cls.Config, options))


@pytest.fixture
def layer():
    draw = torch.Generator().manual_seed(0)
    safety, task = (torch.rand(COLUMNS, generator=draw) + 0.05 for _ in range(2))
    return Layer(name="layers.1.linear", block=1, block_count=4, safety=safety, task=task, seed=3)


@pytest.fixture
def factors():
    draw = torch.Generator().manual_seed(1)
    return tuple(torch.randn(*shape, generator=draw) for shape in ((ROWS, COLUMNS), (RANK, COLUMNS), (ROWS, RANK)))


def test_the_rules_are_found():
    assert {"hpa:HpaRule", "keep:KeepUpdate", "ties:TiesRule", "ready_edits:ReadyEdits"} <= set(RULES)
    assert {place for place, cls in RULES.items() if cls.inputs} == {
        "anchor:AnchorRule",
        "ties:TiesRule",
        "safe_lora:SafeLoraRule",
    }


@pytest.mark.parametrize("place", RULES)
def test_a_rule_has_frozen_options_of_its_own(place):
    config = RULES[place].Config
    assert is_dataclass(config) and config.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert "training" not in config.__dataclass_fields__ and "calibration" not in config.__dataclass_fields__


@pytest.mark.parametrize("place", FROM_OPTIONS)
def test_a_rule_is_made_from_plain_options_which_it_records(place, tmp_path):
    rule = made(FROM_OPTIONS[place], tmp_path)
    assert isinstance(rule, EditRule) and rule.name
    assert needs_of(rule) in ("nothing", "curvature", "grams")
    assert rule.needs_curvature is (needs_of(rule) == "curvature")
    if place != "ready_edits:ReadyEdits":
        assert dict(rule.settings()) == encode(rule.config)


@pytest.mark.parametrize("place", FROM_OPTIONS)
def test_the_closed_form_for_lora_is_the_dense_edit(place, tmp_path, layer, factors):
    rule = made(FROM_OPTIONS[place], tmp_path)
    if not isinstance(rule, LoraEditRule):
        return
    base, a, b = factors
    dense = rule.edit(layer, base.clone(), base + SCALING * (b @ a)).weight
    lora = rule.edit_lora(layer, base, a, b, SCALING)
    old = base if lora.input_scale is None else base * lora.input_scale
    torch.testing.assert_close(old + SCALING * (b @ lora.lora_a), dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", ["interpolation:InterpolationRule", "largest_change:LargestChangeRule"])
def test_a_matched_control_needs_a_calibration_and_moves_as_far_as_hpa(place, tmp_path, layer, factors):
    rule = made(RULES[place], tmp_path, match="hpa", edit={"projection": "none"})
    hpa = made(RULES["hpa:HpaRule"], tmp_path, projection="none")
    assert needs_of(rule) == "curvature"
    base, a, b = factors
    new = base + SCALING * (b @ a)
    assert rule.edit(layer, base, new.clone()).row["distance"] == pytest.approx(
        hpa.edit(layer, base, new.clone()).row["distance"], rel=1e-5
    )
    with pytest.raises(CalibrationError, match=r"needs the safety and the task diagonal of bare"):
        rule.edit(Layer(name="bare", block=0, block_count=1), base, new.clone())


def test_a_rule_of_somebody_else_need_not_know_what_grams_are():
    class Old:
        name = "old"
        needs_curvature = True

    assert needs_of(Old()) == "curvature"  # type: ignore[arg-type]


def test_ready_edits_say_which_layer_has_none(tmp_path, layer, factors):
    rule = made(RULES["ready_edits:ReadyEdits"], tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.linear\.safetensors does not exist: no edit of"):
        rule.edit(layer, factors[0], factors[0])


class Stored:
    """An open checkpoint that holds one layer."""

    def __init__(self, weight):
        self.weight = weight

    def read_float(self, key):
        assert key == "layers.1.linear.weight"
        return self.weight


def test_rules_that_are_handed_more_than_options_edit_with_it(layer, factors):
    base, a, b = factors
    safe_lora = RULES["safe_lora:SafeLoraRule"]
    rule = safe_lora(decode(safe_lora.Config, {"unaligned": "u", "threshold": 1.0}), Stored(base), Stored(base + 1))
    edited = rule.edit(layer, base, base + b @ a)
    assert edited.row["projected"] and edited.row["change"] > 0
    # `cosine` in a row is that of the weights before and after, by which strangers are told.
    assert "cosine" not in edited.row
    ties = RULES["ties:TiesRule"]
    updates = {"layers.1.linear/0/a": a, "layers.1.linear/0/b": b}
    merged = ties(decode(ties.Config, {"density": 1.0}), Stored(base), updates).edit(layer, base, base + b @ a)
    torch.testing.assert_close(merged.weight, base + b @ a)
