"""What an engine in processes of its own writes while it starts: kept for the sentence that says why it did not."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# What vLLM writes before the line that matters: process, level, time and place.
_PREFIX = re.compile(r"^(\([\w ]*(pid=\d+)?\)\s*)*((ERROR|WARNING|INFO|CRITICAL)\s+[\d-]+\s+[\d:]+\s+\[[^\]]*\]\s*)?")
_CAUSE = re.compile(r"^[A-Za-z_.]*(Error|Exception|NotFound)\b: .+")
_NO_CAUSE = ("Engine core initialization failed", "Failed core proc")
_KEPT_BYTES = 400_000
_LONGEST = 500


def root_cause(log: str, error: BaseException) -> str:
    """The sentence that says why an engine did not start: its processes write it to the log, not into the error.

    The first error of the log that is no echo of the failed start, else the end of the exception's own chain.
    """
    for line in log.splitlines():
        said = _PREFIX.sub("", line).strip()
        if _CAUSE.match(said) and not any(echo in said for echo in _NO_CAUSE):
            return said[:_LONGEST]
    found, cause = str(error) or repr(error), error
    while (deeper := cause.__cause__ or cause.__context__) is not None:
        cause = deeper
        if str(cause) and not any(echo in str(cause) for echo in _NO_CAUSE):
            found = str(cause)
    return found[:_LONGEST]


@contextmanager
def listened() -> Iterator[Callable[[], str]]:
    """Within, what this process and those it starts write to stdout and stderr goes to stderr, and is kept.

    Yields a function that gives what was written so far. Processes that were started within go on writing to stderr
    afterwards: stdout is for results. A process without stdout and stderr (a daemon) is left alone.
    """
    descriptors = _descriptors()
    if descriptors is None:
        yield lambda: ""
        return
    reading, writing = os.pipe()
    before = [os.dup(descriptor) for descriptor in descriptors]
    through = os.dup(descriptors[1])
    kept = bytearray()

    def copy() -> None:
        while piece := os.read(reading, 65536):
            del kept[: max(0, len(kept) + len(piece) - _KEPT_BYTES)]
            kept.extend(piece)
            os.write(through, piece)
        os.close(reading)
        os.close(through)

    thread = threading.Thread(target=copy, name="holdfast-engine-log", daemon=True)
    thread.start()
    _flush()
    for descriptor in descriptors:
        os.dup2(writing, descriptor)
    os.close(writing)

    def text() -> str:
        _flush()
        # The last lines of a process that has just died may still be in the pipe.
        thread.join(timeout=0.2)
        return bytes(kept).decode(errors="replace")

    try:
        yield text
    finally:
        _flush()
        for descriptor, own in zip(descriptors, before, strict=True):
            os.dup2(own, descriptor)
            os.close(own)


@contextmanager
def stdout_for_results() -> Iterator[None]:
    """Within, whatever writes to stdout, libraries and their processes included, reaches stderr."""
    descriptors = _descriptors()
    if descriptors is None:
        yield
        return
    _flush()
    own = os.dup(descriptors[0])
    os.dup2(descriptors[1], descriptors[0])
    try:
        yield
    finally:
        _flush()
        os.dup2(own, descriptors[0])
        os.close(own)


def stdout_is_over() -> None:
    """After the results are printed: what an engine still says at its end reaches stderr, until this process ends."""
    descriptors = _descriptors()
    if descriptors is not None:
        _flush()
        os.dup2(descriptors[1], descriptors[0])


def _descriptors() -> tuple[int, int] | None:
    # Not of sys.stdout, which may have been replaced: other processes inherit these two.
    try:
        os.fstat(1)
        os.fstat(2)
    except OSError:
        return None
    return 1, 2


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


__all__ = ["listened", "root_cause", "stdout_for_results", "stdout_is_over"]
