"""Spoiled files thrown at verbs: a sentence and an exit status, never a traceback, a hang or memory without end."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import hostile_kit as kit

# Of each kind of file so many ways to spoil it in one run of the tests; HOLDFAST_HOSTILE=all tries every one.
EACH = {"adapter": 4, "base": 6, "load": 3, "curvature": 4, "samples": 4, "stream": 4, "report": 3, "inspect": 6}
GROWTH = 700 * 2**20


@pytest.fixture(scope="module")
def world(pico_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kit.world(tmp_path_factory.mktemp("hostile") / "world", pico_folder)


def judge(name: str, end: kit.End) -> str | None:
    """What is wrong with an end, or None."""
    faults = {
        "status": end.code not in (0, 1, 2, 3),
        "bug": "This is a bug" in end.text,
        "traceback": "Traceback" in end.text,
        "escape": "\x1b" in end.text,
        "memory": end.grew > GROWTH,
    }
    wrong = [fault for fault, found in faults.items() if found]
    return f"{name}: {wrong}, status {end.code}, {end.text.strip()[-300:]!r}" if wrong else None


def throw(group: str, world: Path, place: Path, capfd: pytest.CaptureFixture[str], names: list[str]) -> list[str]:
    found = []
    table = kit.spoiled()
    for number, name in enumerate(names):
        here = kit.copy(world, place / f"{group}-{number}")
        table[name][1](here)
        for argv in kit.verbs(group, here):
            if fault := judge(f"{argv[0]}, {name}", kit.call(argv, capfd)):
                found.append(fault)
            for hidden in here.glob(".*.partial"):
                found.append(f"{argv[0]}, {name}: {hidden.name} is left")
    return found


@pytest.mark.parametrize("group", EACH)
def test_no_file_brings_a_verb_down(
    group: str, world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names = [name for name, (of, _) in kit.spoiled().items() if of == group]
    chosen = names if kit.ALL else random.Random(f"{group}").sample(names, min(EACH[group], len(names)))
    assert not throw(group, world, tmp_path, capfd, chosen)
    assert not [*tmp_path.glob("holdfast-2*.txt")] or kit.ALL
