"""`holdfast VERB --help` at 80 columns: every name whole, every choice listed, every option in a panel."""

from __future__ import annotations

import importlib
import io
import json
import re
import types
import typing

import pytest
import typer.main
from rich.console import Console
from typer.testing import CliRunner

import fake_run
from holdfast.cli import GROUPS, VERBS, app, choices, environment
from holdfast.cli.console import summary_table
from holdfast.cli.panels import PANELS

GROUP = typer.main.get_command(app)
WIDTH = {"COLUMNS": "80", "TERMINAL_WIDTH": "80"}


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments, "--help"], env=WIDTH)
    assert result.exit_code == 0, result.output
    return result.output


def options(verb: str) -> list[typing.Any]:
    return [p for p in GROUP.commands[verb].params if p.param_type_name == "option" and p.name != "help"]


def fixed(verb: str) -> dict[str, tuple[str, ...]]:
    """Parameter -> its choices, from the annotations of the verb's function."""
    found = {}
    for name, kind in typing.get_type_hints(importlib.import_module(VERBS[verb]).command).items():
        for member in (kind, *typing.get_args(kind)):
            if typing.get_origin(member) is typing.Literal:
                found[name] = typing.get_args(member)
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_and_every_choice_is_shown_whole(verb: str) -> None:
    text = shown(verb)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    words = set(re.findall(r"[\w+./<>|-]+", text))
    for option in options(verb):
        assert {*option.opts, *option.secondary_opts} <= words, option.name
    for name, listed in fixed(verb).items():
        assert set(listed) <= set(re.findall(r"[\w+.-]*[\w+-]", text)), name


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_stands_in_a_panel_and_has_a_help(verb: str) -> None:
    for option in options(verb):
        assert option.rich_help_panel in PANELS and option.help, f"{verb} --{option.name}"
        assert not [twin for twin in option.secondary_opts if twin.startswith("--no-allow")], option.name


def test_an_option_has_one_panel_and_none_is_there_for_nothing() -> None:
    held = [name for names in PANELS.values() for name in names]
    assert len(held) == len(set(held))
    assert set(held) == {option.name for verb in VERBS for option in options(verb)}


def test_the_first_page_names_every_verb_with_its_sentence() -> None:
    text = shown()
    assert "…" not in text and all(f"│ {verb} " in text for verb in VERBS)
    # Each under one heading, in the order of the README's doors.
    assert sorted(verb for verbs in GROUPS.values() for verb in verbs) == sorted(VERBS)
    assert [text.index(f"─ {heading} ─") for heading in GROUPS] == sorted(text.index(f"─ {h} ─") for h in GROUPS)


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("edit", ("refusals", "HPA", "2511.20158")),
        ("sweep-edit", ("HPA",)),
        ("route", ("CRAM", "2606.02502")),
        ("merge-experts", ("CRAM",)),
    ],
)
def test_a_verb_says_what_it_is_for_in_the_words_people_look_for(verb: str, words: tuple[str, ...]) -> None:
    text = " ".join(shown(verb).split())
    assert all(word in text for word in words)


@pytest.mark.parametrize("verb, name", [(verb, name) for verb in VERBS for name in fixed(verb)])
def test_a_value_that_is_no_choice_is_refused_with_the_choices(verb: str, name: str) -> None:
    command = GROUP.commands[verb]
    chosen = next(p for p in command.params if p.name == name)
    given = []
    for p in command.params:
        flag = [p.opts[0]] if p.param_type_name == "option" else []
        given += [*flag, "nonsense"] if p is chosen else [*flag, "x"] if p.required else []
    result = CliRunner().invoke(app, [verb, *given], env=WIDTH)
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", result.output).split())
    assert result.exit_code == 2
    assert all(f"'{choice}'" in text for choice in fixed(verb)[name]), text


def test_the_choices_are_those_of_the_library() -> None:
    from holdfast.calibration import curvature, walk
    from holdfast.editing import editor, recipes
    from holdfast.evaluation.evaluation_config import EvaluationConfig
    from holdfast.functional import hessian, inverse
    from holdfast.scorers import alignment, base
    from holdfast.serving import remote

    evaluation = typing.get_type_hints(EvaluationConfig)
    library = {
        "ActivationsName": curvature.Activations,
        "AlignName": alignment.Align,
        "BackendName": evaluation["backend"],
        "CoefficientName": recipes.CoefficientChoice,
        "DtypeName": typing.get_args(evaluation["dtype"])[0],
        "ExportName": editor.Export,
        "MixedName": remote.MixedName,
        "ModeName": base.Mode,
        "NormalizationName": hessian.Normalization,
        "OnFailureName": inverse.OnFailure,
        "TokensName": walk.Tokens,
    }
    for name, literal in library.items():
        assert set(typing.get_args(getattr(choices, name))) == set(typing.get_args(literal)), name


def test_a_runs_table_cuts_no_method_at_80_columns() -> None:
    interval = {"low": 0.1, "high": 0.2}
    keys = ("masr", "compliance_mean", "collapse_mean", "over_refusal", "helpful")
    figures = {**dict.fromkeys(keys, 0.123), "intervals": {"ap": interval, "bwt": interval, "masr": interval}}
    names = ("hpa_damping_1_percent", "largest_change_matched", "random_columns_matched")
    row = {**figures, "ap": 0.9, "bwt": -0.5, "complete": True, "seconds": {"total": 600.0}}
    summary = {
        "name": "tiny",
        "seed": 0,
        "tasks": ["a"],
        "theta_0": {**figures, "scores": {"a": 0.5}},
        "methods": dict.fromkeys(names, row),
    }
    console = Console(width=80, file=io.StringIO())
    console.print(summary_table(summary))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    first = "".join(line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│"))
    assert all(name in first for name in names)
    # Figures stand whole, in one line.
    assert max(map(len, text.splitlines())) <= 80 and text.count("−50.0 ±5") == text.count("90.0 ±5") == len(names)


def test_every_verb_can_answer_in_json() -> None:
    # A server answers over its socket.
    without = {verb for verb in VERBS if "--json" not in {o for p in options(verb) for o in p.opts}}
    assert without <= {"serve"}


@pytest.mark.parametrize(
    "words, keys",
    [
        (["list", "rules"], None),
        (["list", "judges", "--names"], None),
        (["init", "--list"], {"files"}),
        (["init", "llava-1.5-7b"], {"written"}),
        (["new", "judge", "mine"], {"written", "kind"}),
        (["example", "try"], {"before", "after", "forbidden", "benign", "task", "command"}),
        (["doctor", "--environment"], {"python", "versions", "cores", "free_memory_bytes", "devices", "extras"}),
        (["report", "run"], {"html", "figures", "tables", "cards", "lines"}),
        (["label", "run", "--html", "form.html"], {"form", "replies"}),
        (["label", "run", "--show"], {"labelled", "drawn"}),
    ],
)
def test_with_json_stdout_holds_the_result_and_nothing_else(words, keys, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    if "run" in words:
        fake_run.write_run(tmp_path / "run", methods={"seqft": 0.6, "hpa": 0.9})
    if "--show" in words:
        app(["label", "run", "--html", "form.html"], standalone_mode=False)
        capfd.readouterr()
    app([*words, "--json"], standalone_mode=False)
    told = json.loads(capfd.readouterr().out)
    if keys is None:
        assert len(told) > 3 and all(set(row) == {"name", "source", "about"} for row in told)
    else:
        assert keys <= set(told)


def test_what_this_machine_has_fits_a_terminal_and_names_what_is_missing(monkeypatch, capsys) -> None:
    monkeypatch.setattr(environment, "missing_by_extra", lambda: {"captions": ["pycocoevalcap>=1.2"], "hf": []})
    app(["doctor", "--environment"], standalone_mode=False)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    assert re.search(r"extra captions .*\n    lacks pycocoevalcap>=1.2\n    pip install \"holdfast\[captions\]\"", text)
    assert re.search(r"extra hf .*: complete", text) and re.search(r"torch \d", text) and "free memory" in text


@pytest.mark.parametrize(
    "requires, lacking",
    [("numpy>=1", []), ("numpy>=99", ["numpy>=99"]), ("no-such-thing", ["no-such-thing"]), ("numpy<1", ["numpy<1"])],
)
def test_an_extra_lacks_what_is_not_there_or_of_another_version(requires, lacking, monkeypatch) -> None:
    distribution = types.SimpleNamespace(
        requires=[f'{requires}; extra == "x"', "torch>=2", 'holdfast[y]; extra == "x"'],
        metadata=types.SimpleNamespace(get_all=lambda _: ["x"]),
    )
    real = environment.metadata.distribution
    fake = lambda name: distribution if name == "holdfast" else real(name)  # noqa: E731
    monkeypatch.setattr(environment.metadata, "distribution", fake)
    assert environment.missing_by_extra() == {"x": lacking}
