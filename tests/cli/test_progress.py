"""A log without a terminal says what is going on: a line when a phase begins and ends, and one a minute between."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from holdfast.cli import console as run_console
from holdfast.cli import progress as module
from holdfast.cli.progress import Shown, bars, phases


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> tuple[Callable[[], list[str]], Clock]:
    """(the lines of a log so far, its clock) of whatever is shown in this test."""
    out, clock = io.StringIO(), Clock()
    usual = Shown.__init__

    def init(self: Shown, **options: Any) -> None:
        usual(self, **{"console": Console(file=out, width=40), "clock": clock, **options})

    monkeypatch.setattr(Shown, "__init__", init)
    return lambda: out.getvalue().splitlines(), clock


def test_one_line_of_work_begins_tells_once_a_minute_and_ends(log: Any) -> None:
    lines, clock = log
    with bars("calibrating") as progress:
        for done in range(1, 601):
            clock.now += 0.5
            progress("calibrate", blocks=(0, 1, 1), done=done, total=600)
    told = lines()
    assert told[0] == "[0:00:00] calibrating: begins" and told[-1] == "[0:05:00] calibrating: done after 0:05:00"
    assert told[1] == "[0:01:00] calibrating: 120 of 600 (20 %), 0:04:00 left"
    assert len(told) == 2 + 5


def test_quick_work_is_two_lines_and_a_fault_says_where_it_stopped(log: Any) -> None:
    lines, clock = log
    with bars("editing") as progress:
        progress("edit_layer", done=3, total=3)

    def killed() -> None:
        with bars("asking") as progress:
            clock.now += 5
            progress("evaluate", done=7, total=9)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert lines()[:2] == ["[0:00:00] editing: begins", "[0:00:00] editing: done after 0:00:00"]
    assert lines()[-1] == "[0:00:05] asking: stopped at 7 of 9 after 0:00:05"


def test_every_phase_begins_and_ends_once_per_turn(log: Any) -> None:
    lines, clock = log
    with phases() as progress:
        for event in ("answers", "grams", "answers"):
            for done in (1, 2):
                clock.now += 1
                progress(event, done=done, total=2)
    said = [re.sub(r"^\[.*?\] ", "", line) for line in lines()]
    assert said == [
        "answers: begins", "answers: done after 0:00:02",
        "grams: begins", "grams: done after 0:00:02",
        "answers: begins", "answers: done after 0:00:01",
    ]  # fmt: skip


def test_a_run_tells_every_phase_of_every_task(log: Any) -> None:
    lines, clock = log
    with run_console.run_bars(["seqft"], 2) as progress:
        progress("evaluate", done=4, total=4)
        for step, task in enumerate(("a", "b")):
            here = {"method": "seqft", "step": step, "task": task}
            progress("phase", phase="begin", **here)
            progress("phase", phase="train", **here)
            for done in (1, 2, 3):
                clock.now += 50
                progress("train", done=done, total=3, **here)
            progress("phase", phase="end", **here)
            progress("edit", done=1, total=1, **here)
            progress("phase", phase="evaluate", **here)
            progress("evaluate", done=1, total=1, **here)
            progress("step_done", **here)
    said = [re.sub(r"^\[.*?\] ", "", line) for line in lines()]
    assert said[:2] == ["before any task: asking: begins", "before any task: asking: done after 0:00:00"]
    assert said[2] == "seqft: a (1/2): learning: begins"
    assert said[3] == "seqft: a (1/2): learning: 2 of 3 (67 %), 0:00:50 left"  # the first after a minute
    assert "seqft: a (1/2): learning: done after 0:02:30" in said
    assert "seqft: b (2/2): asking: done after 0:00:00" in said
    assert said[-1] == "seqft: task 2 of 2 (b) done"


@pytest.mark.parametrize("begun, told", [(True, "load: at work for 0:00:00"), (False, "at work")])
def test_work_that_reports_nothing_is_told_of_all_the_same(begun: bool, told: str) -> None:
    """A large model is read, one batch takes minutes: no call of `progress` comes meanwhile."""
    out = io.StringIO()
    with Shown(console=Console(file=out, width=40), every_s=0.04) as shown:
        if begun:
            shown.at("load")
        until = time.monotonic() + 5
        while told not in out.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
    said = [re.sub(r"^\[.*?\] ", "", line) for line in out.getvalue().splitlines()]
    assert told in said
    time.sleep(0.05)
    assert len(out.getvalue().splitlines()) == len(said)  # nothing after its end


@pytest.mark.parametrize("silent_s, lines_due", [(44, 0), (45, 1), (60, 1)])
def test_no_minute_of_silence(log: Any, silent_s: int, lines_due: int) -> None:
    lines, clock = log
    with Shown() as shown:
        shown.at("asking", done=3, total=9)
        clock.now += silent_s
        shown._tell_silent()
        shown._tell_silent()  # said once
    said = [line for line in lines() if "at work" in line]
    assert [re.sub(r"^\[.*?\] ", "", line) for line in said] == [
        f"asking: 3 of 9, at work for 0:{silent_s // 60:02}:{silent_s % 60:02}"
    ] * lines_due


def test_a_quiet_process_and_a_terminal_write_no_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with bars("asking", quiet=True) as progress:
        progress("evaluate", done=1, total=1)
    assert capsys.readouterr().err == ""
    out = io.StringIO()
    with Shown(console=Console(file=out, force_terminal=True, width=80)) as shown:
        shown.at("asking", done=1, total=2)
        shown.finish("asking")
    assert "begins" not in out.getvalue() and "asking" in out.getvalue()


def test_every_long_command_shows_its_work_this_way() -> None:
    """Nothing else in the commands draws a bar of its own."""
    from pathlib import Path

    folder = Path(module.__file__).parent
    draws = re.compile(r"rich\.progress import.*\bProgress\b")
    assert [path.name for path in folder.glob("*.py") if draws.search(path.read_text())] == ["progress.py"]
    for name in ("evaluate", "calibrate", "edit", "restore", "run"):
        assert re.search(r"\b(bars|phases|run_bars)\(", (folder / f"{name}.py").read_text()), name
