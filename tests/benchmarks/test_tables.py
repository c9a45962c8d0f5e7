"""`make tables`: what it runs exists, what it writes lands between its marks, orderings are paired by seed."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest

from holdfast import methods
from holdfast.tiny.recipe import own_options

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def tables():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("tables")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize(
    "name", ["main", "rivals", "released", "harm-0.1", "harm-5", "order", "edit-once", "guard", "small"]
)
def test_every_command_names_a_program_and_methods_that_exist(tables, tmp_path, name):
    args = argparse.Namespace(seeds="0..1", prompts=10, jobs=1, methods=None, chosen=None)
    five_seeds = importlib.import_module("five_seeds")
    for program, *words in tables.TABLES[name].commands(args, tmp_path / "out"):
        assert (BENCHMARKS / program).is_file()
        if "--methods" in words:
            for label in words[words.index("--methods") + 1].split(","):
                options = own_options(label) | five_seeds.VARIANTS.get(label, {})
                methods.get(str(options.pop("method", label)), **options)


def test_a_row_that_no_table_has_is_said(tables, tmp_path):
    args = argparse.Namespace(seeds="0", prompts=10, jobs=1, methods=["reg_lore"], chosen=None)
    with pytest.raises(SystemExit, match="reg_lore: none of them is among"):
        tables.TABLES["rivals"].commands(args, tmp_path)
    narrow = argparse.Namespace(**{**vars(args), "methods": ["reg_lora", "anchor"]})
    choose, table = tables.TABLES["rivals"].commands(narrow, tmp_path)
    assert choose[2] == "reg_lora" and table[table.index("--methods") + 1] == "anchor,reg_lora"


def test_settings_that_were_chosen_are_tries_and_are_not_chosen_again(tables, tmp_path):
    choose = importlib.import_module("choose")
    file = BENCHMARKS / "chosen.json"
    chosen = json.loads(file.read_text())
    assert set(chosen) == set(tables.TRIED)
    for name, row in chosen.items():
        assert row in choose.tries_of(name).values()
    asked = argparse.Namespace(seeds="0", prompts=10, jobs=1, methods=["seqft", "osf"], chosen=file)
    (words,) = tables.TABLES["rivals"].commands(asked, tmp_path)
    assert words[0] == "five_seeds.py" and words[words.index("--settings") + 1] == str(file)
    (tmp_path / "table.md").write_text("| a table |\n")
    assert 'Settings that were chosen: osf "kept": 0.75.' in tables.TABLES["rivals"].shown(tmp_path, asked)
    (tmp_path / "few.json").write_text(json.dumps({"hpa": {"method": "hpa"}}))
    with pytest.raises(SystemExit, match="has no settings for osf; leave them out"):
        tables.TABLES["rivals"].commands(
            argparse.Namespace(**{**vars(asked), "chosen": tmp_path / "few.json"}), tmp_path
        )
    # Nothing to choose for these two: the table alone.
    alone = argparse.Namespace(**{**vars(asked), "methods": ["seqft", "anchor"], "chosen": None})
    (words,) = tables.TABLES["rivals"].commands(alone, tmp_path)
    assert words[0] == "five_seeds.py" and "--settings" not in words
    assert tables.TABLES["rivals"].shown(tmp_path, alone).startswith("| a table |")


def test_no_method_is_left_out(tables):
    ran = {*tables.METHODS, *tables.RIVALS, *tables.FEW}
    assert set(tables.TRIED) | set(tables.BESIDE) <= {*tables.METHODS, *tables.RIVALS}
    # A class without a row of its own would be a rival that no table shows.
    classes = {methods.METHODS[name][0] for name in ran if name in methods.METHODS}
    assert {place for place, _ in methods.METHODS.values()} == classes


def test_a_table_lands_between_its_marks_and_nowhere_else(tables, tmp_path):
    document = tmp_path / "page.md"
    document.write_text(
        "before\n<!-- table a -->\nold\n<!-- end of table -->\nafter\n<!-- table b -->\n<!-- end of table -->\n"
    )
    assert tables.insert("a", "| new \\1 |\n\n", document)
    assert not tables.insert("c", "x", document)
    assert document.read_text() == (
        "before\n<!-- table a -->\n| new \\1 |\n<!-- end of table -->\nafter\n<!-- table b -->\n<!-- end of table -->\n"
    )


@pytest.mark.parametrize(
    ("better", "worse", "word"),
    [
        ([0.7, 0.72, 0.71], [0.5, 0.53, 0.5], "AP seen"),
        ([0.5, 0.53, 0.5], [0.7, 0.72, 0.71], "AP opposite"),
        ([0.5, 0.6, 0.7], [0.6, 0.5, 0.7], "AP not seen"),
        ([0.7], [0.5], "AP in its direction by 20.0 (one seed)"),
    ],
)
def test_an_ordering_is_seen_where_the_paired_interval_says_so(tables, better, worse, word):
    rows = {"hpa": {"ap": {"values": better}}, "safe_delta": {"ap": {"values": worse}}}
    found = tables.orderings({"clean": {"methods": rows}})
    assert [line for line in found if line.startswith("- clean: hpa better than safe_delta")] == [
        f"- clean: hpa better than safe_delta: {word}"
    ]
    assert tables.orderings({"clean": {"methods": {}}}) == []


def test_less_is_better_where_it_is(tables):
    rows = {"hpa": {"masr": {"values": [0.1, 0.12, 0.11]}}, "safe_delta": {"masr": {"values": [0.5, 0.53, 0.5]}}}
    assert any(line.endswith("MASR seen") for line in tables.orderings({"clean": {"methods": rows}}))
