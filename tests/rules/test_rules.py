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
        "resta:RestaRule",
        "cgm:CgmRule",
        "many:ManyRule",
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


def test_safe_lora_projects_the_layers_that_stray_most(layer, factors):
    from holdfast.errors import ConfigError
    from holdfast.rules.safe_lora import lowest_of

    base, a, b = factors
    safe_lora = RULES["safe_lora:SafeLoraRule"]
    options = decode(safe_lora.Config, {"unaligned": "u"})
    assert options.lowest == 10 and options.threshold is None
    for lowest, projected in (((layer.name,), True), (("other",), False)):
        rule = safe_lora(options, Stored(base), Stored(base + 1), lowest)  # type: ignore[call-arg]
        assert rule.edit(layer, base, base + b @ a).row["projected"] is projected
    with pytest.raises(ConfigError, match="a layer alone does not know"):
        safe_lora(options, Stored(base), Stored(base + 1)).edit(layer, base, base + b @ a)  # type: ignore[call-arg]
    cosines = {"a": 0.3, "b": 0.100001, "c": 0.100002, "d": 0.2, "e": -0.5}
    assert lowest_of(cosines, 1) == {"e"}
    # Equal to five places, as the released code compares them.
    assert lowest_of(cosines, 2) == {"e", "b", "c"} == lowest_of(cosines, 3)
    assert lowest_of(cosines, 9) == set(cosines)


@pytest.mark.parametrize("trim", ["all", "layer"])
def test_ties_averages_task_vectors_from_theta_0_and_not_residuals(layer, factors, trim):
    """Before 1, tuned to 2: the entry's vectors are 1 and 2, and their mean is 1.5. Residuals (1 and 1) gave 1."""
    base = factors[0]
    ties = RULES["ties:TiesRule"]
    vectors = {"layers.1.linear/0": torch.ones_like(base), "layers.1.linear/1": 2 * torch.ones_like(base)}
    rule = ties(decode(ties.Config, {"density": 1.0, "trim": trim}), Stored(base), vectors)  # type: ignore[call-arg]
    merged = rule.edit(layer, base + 1, base + 2)
    torch.testing.assert_close(merged.weight, base + 1.5)
    assert merged.row["distance"] == pytest.approx(merged.row["change"] / 2, rel=1e-4)


def test_ready_edits_keep_their_figures_and_leave_earlier_blocks_as_they_were_tuned(tmp_path, layer, factors):
    from holdfast.rules.ready_edits import write_edit

    base, a, b = factors
    write_edit(tmp_path / "layers.1.linear.safetensors", base + 2 * (b @ a), {"tuned_share": 0.25})
    edited = made(RULES["ready_edits:ReadyEdits"], tmp_path).edit(layer, base, base + b @ a)
    assert edited.row["tuned_share"] == 0.25
    assert edited.row["distance"] == pytest.approx(2 * edited.row["change"])
    later = made(RULES["ready_edits:ReadyEdits"], tmp_path, first_block=2).edit(layer, base, base + b @ a)
    assert later.row == {"edited": False} and torch.equal(later.weight, base + b @ a)


def test_a_report_says_where_an_edit_moved_further_than_the_tuning():
    from holdfast.editing.descent import describe_moved_further

    rows = [{"layer": "a", "change": 1.0, "distance": 1.7}, {"layer": "b", "change": 2.0, "distance": 2.0}]
    assert describe_moved_further(rows) == [
        "1 of 2 layers are farther from BEFORE than AFTER is, a by 1.70 times: the edit moves what the tuning had not"
    ]
    assert describe_moved_further(rows[1:]) == describe_moved_further([{"layer": "c"}]) == []


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_resta_adds_its_share_of_the_safety_vector(layer, factors, alpha):
    base, a, b = factors
    resta = RULES["resta:RestaRule"]
    rule = resta(decode(resta.Config, {"unaligned": "u", "alpha": alpha}), Stored(base), Stored(base - 2))  # type: ignore[call-arg]
    torch.testing.assert_close(rule.edit(layer, base, base + b @ a).weight, base + b @ a + 2 * alpha)


def test_cgm_without_earlier_tasks_keeps_the_change(layer, factors):
    base, a, b = factors
    rule = RULES["cgm:CgmRule"](decode(RULES["cgm:CgmRule"].Config, {}), {layer.name: torch.ones_like(base)}, {})  # type: ignore[call-arg]
    torch.testing.assert_close(rule.edit(layer, base, base + b @ a).weight, base + b @ a)
