"""Foreign code that may never end (patterns, templates), run with a bound on time and on memory."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from holdfast.errors import HoldfastError

if sys.platform != "win32":
    import resource

GIB = 1 << 30

# The bound on memory is the process's, not a thread's: one block at a time has it, and puts back what was there before.
_MEMORY_LOCK = threading.RLock()


class _OutOfTimeError(BaseException):
    """Raised within the block; no Exception, so that foreign code does not catch it."""


def is_panic(error: BaseException) -> bool:
    """Whether an error is what Rust code (tokenizers, safetensors) leaves when it breaks off; it is no Exception."""
    return type(error).__module__ == "pyo3_runtime"


@contextmanager
def no_panic(what: str, *, error: type[HoldfastError]) -> Iterator[None]:
    """Within, Rust code that breaks off raises `error`, with `what` as its subject."""
    try:
        yield
    except BaseException as found:
        if not is_panic(found):
            raise
        raise error(f"{what} cannot be used: {str(found).strip().splitlines()[0]:.300}. Its file is damaged.") from None


@contextmanager
def bounded(what: str, *, seconds: float, error: type[HoldfastError], memory: int | None = None) -> Iterator[None]:
    """Within, Python code (and `re`, which looks for signals) ends after `seconds` of the processor's time.

    Not of the clock's: on a busy machine right code would be stopped. What waits is not stopped.

    what: the subject of the error's sentence. memory: bytes that the whole process may grow by within the block, where
        the system keeps such a bound (Linux); None: no bound.

    In another thread than the main one no signal can be had: there the bound holds for Python code alone, not within
    one call of a C function.

    Raises: `error`: out of time, out of memory, recursion without end, or Rust code that breaks off.
    """
    try:
        with (
            no_panic(what, error=error),
            _memory(memory),
            _alarm(seconds) if _on_main_thread() else _watchdog(seconds),
        ):
            yield
    except _OutOfTimeError:
        raise error(f"{what} does not end within {seconds:g} s, and was stopped. Do not use such a file.") from None
    except MemoryError:
        raise error(f"{what} takes more than {(memory or 0) / GIB:g} GiB of memory, and was stopped.") from None
    except RecursionError:
        raise error(f"{what} calls itself without end, and was stopped.") from None


def _on_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    inside = True

    def late(number: int, frame: FrameType | None) -> None:
        del number, frame
        if inside:
            raise _OutOfTimeError

    left, interval = signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        inside = False
        used = seconds - signal.setitimer(signal.ITIMER_VIRTUAL, 0)[0]
        signal.signal(signal.SIGVTALRM, before)
        if left:  # somebody's own alarm, which has waited meanwhile
            signal.setitimer(signal.ITIMER_VIRTUAL, max(1e-3, left - used), interval)


@contextmanager
def _watchdog(seconds: float) -> Iterator[None]:
    """The same for a thread that gets no signals: another one raises in it at its next step of Python code."""
    thread, over, lock = threading.get_ident(), threading.Event(), threading.Lock()
    # A thread's own time where another may read it (Linux); elsewhere the clock's.
    clock = time.pthread_getcpuclockid(thread) if hasattr(time, "pthread_getcpuclockid") else None

    def now() -> float:
        return time.monotonic() if clock is None else time.clock_gettime(clock)

    until = now() + seconds

    def watch() -> None:
        while not over.wait(min(0.1, seconds)):
            with lock:
                if not over.is_set() and now() > until:
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(thread), ctypes.py_object(_OutOfTimeError)
                    )
                    return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        with lock:
            over.set()


@contextmanager
def _memory(more: int | None) -> Iterator[None]:
    """Within, the process's address space grows by at most `more` bytes; a bound that is set already stays."""
    if more is None or sys.platform == "win32" or not os.path.exists("/proc/self/statm"):  # noqa: PTH110 (asked for every sample)
        yield
        return
    with _MEMORY_LOCK:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        with open("/proc/self/statm") as file:  # noqa: PTH123
            wanted = int(file.read().split()[0]) * resource.getpagesize() + more
        if any(limit != resource.RLIM_INFINITY and limit <= wanted for limit in (soft, hard)):
            yield
            return
        resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
