"""Foreign code that never ends, or takes all memory, is stopped with a sentence; the caller's own alarm stays."""

from __future__ import annotations

import re
import resource
import signal
import threading
import time

import pytest

from holdfast.bounds import bounded
from holdfast.errors import DataError


def spin() -> None:
    while True:
        pass


def backtrack() -> None:
    re.match(r"(a|a)*b", "a" * 60)


def double() -> None:
    text = "x" * 2**20
    while True:
        text += text


def recurse() -> None:
    recurse()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "code, said", [(spin, "within 0.3 s"), (backtrack, "within 0.3 s"), (double, "memory"), (recurse, "itself")]
)
def test_code_without_end_is_stopped(code, said: str) -> None:
    memory = 2**28 if code is double else None
    seconds = 20.0 if code is double else 0.3
    with pytest.raises(DataError, match=f"It .*{said}"), bounded("It", seconds=seconds, error=DataError, memory=memory):
        code()


def test_an_alarm_of_the_caller_still_rings_and_other_errors_pass() -> None:
    rung = []
    before = signal.signal(signal.SIGVTALRM, lambda *_: rung.append(True))
    old = signal.setitimer(signal.ITIMER_VIRTUAL, 30)
    try:
        with bounded("It", seconds=5, error=DataError):
            pass
        assert 20 < signal.getitimer(signal.ITIMER_VIRTUAL)[0] <= 31
        with pytest.raises(KeyError), bounded("It", seconds=5, error=DataError, memory=2**30):
            raise KeyError("x")
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.05)
        started = time.monotonic()
        while not rung and time.monotonic() < started + 20:
            pass
        assert rung
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, *old)
        signal.signal(signal.SIGVTALRM, before)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("clock", ["the thread's", "the wall's"])
def test_a_thread_is_stopped_too(clock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if clock == "the wall's":  # macOS and Windows
        monkeypatch.delattr(time, "pthread_getcpuclockid", raising=False)
    found: list[str] = []

    def work() -> None:
        try:
            with bounded("It", seconds=0.2, error=DataError):
                spin()
        except DataError as error:
            found.append(str(error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(10)
    assert found and "within 0.2 s" in found[0]


@pytest.mark.timeout(60)
def test_the_bound_on_memory_is_gone_when_threads_had_it_at_once() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    held: list[bytearray] = []

    def work() -> None:
        for _ in range(100):
            with bounded("It", seconds=5, error=DataError, memory=2**30):
                held.append(bytearray(2**20))
                time.sleep(0.0005)
                held.clear()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert resource.getrlimit(resource.RLIMIT_AS) == before
