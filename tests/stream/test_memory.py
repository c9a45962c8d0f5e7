"""A peak is that of what was asked about: not of what came before, not of what came after."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from holdfast.stream import memory
from holdfast.stream.memory import PeakMemory, highest

MB = 1_000_000


def filled(size: int) -> int:
    block = bytearray(b"\1") * size
    return len(block)


@pytest.mark.skipif(not memory._restart_host(), reason="this system does not set the mark of the highest memory back")
def test_the_peak_is_of_the_time_since_it_was_asked_for() -> None:
    filled(400 * MB)
    peak = PeakMemory()
    quiet = peak.bytes()["host"]
    filled(200 * MB)
    assert 150 * MB < peak.bytes()["host"] - quiet < 300 * MB
    assert PeakMemory().bytes()["host"] - quiet < 100 * MB


def test_what_a_system_does_not_tell_is_not_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_RESET", tmp_path / "absent" / "clear_refs")
    assert "host" not in PeakMemory().bytes()


def test_devices_are_added_up_and_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {0: 5, 1: 7}
    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        device_count=lambda: len(held),
        reset_peak_memory_stats=lambda number: held.update({number: 0}),
        max_memory_allocated=lambda number: held[number],
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    peak = PeakMemory()
    assert peak.bytes()["device"] == 0
    held.update({0: 3, 1: 4})
    assert peak.bytes()["device"] == 7


def test_no_device_is_woken_to_ask_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asleep = SimpleNamespace(is_initialized=lambda: False)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=asleep))
    assert "device" not in PeakMemory().bytes()


def test_the_higher_is_taken_kind_by_kind() -> None:
    assert highest({"host": 3}, {"host": 2, "device": 1}) == {"host": 3, "device": 1}
    assert highest({}, {}) == {}
