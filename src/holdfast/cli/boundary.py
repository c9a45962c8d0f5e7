"""How a command ends: one place for every verb.

    0    done                     1    a bug of holdfast, with its traceback in a file (or a verb's own "no")
    2    an error with a sentence 130  stopped with Ctrl-C      141  whoever read the output has gone

HOLDFAST_DEBUG=1 shows the traceback of any error.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable

from holdfast.bounds import is_panic
from holdfast.cli.terminal import guarded_output
from holdfast.errors import HoldfastError
from holdfast.failures import explain, keep_traceback, report_bug

FAILED, BUG, STOPPED, NOBODY_READS = 2, 1, 130, 141


def run(command: Callable[[], object]) -> None:
    """Call a command and exit the process as this module says. Raises SystemExit, always."""
    with guarded_output():
        code = _code_of(command)
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError as error:
            code = _without_reader() if error.errno in (errno.EPIPE, errno.EINVAL) else code or _told(error)
    sys.exit(code)


def _code_of(command: Callable[[], object]) -> int:
    try:
        command()
    except SystemExit as error:
        # typer ends a command of its own accord; of a closed pipe it tells by the streams that it leaves.
        if type(sys.stdout).__name__ == "PacifyFlushWrapper":
            return _without_reader()
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return STOPPED
    except BrokenPipeError:
        return _without_reader()
    except Exception as error:  # noqa: BLE001 (this is the boundary: nothing is above it)
        if os.environ.get("HOLDFAST_DEBUG"):
            traceback.print_exception(error)
        return _told(error)
    except BaseException as error:
        if not is_panic(error):
            raise
        print(report_bug(error), file=sys.stderr)
        return BUG
    return 0


def _told(error: Exception) -> int:
    """Print an error as a sentence and return the exit status."""
    sentence = explain(error)
    if sentence is None:
        print(report_bug(error), file=sys.stderr)
        return BUG
    if not isinstance(error, HoldfastError):
        sentence = f"{sentence}\n{keep_traceback(error)}"
    print(sentence, file=sys.stderr)
    return FAILED


def _without_reader() -> int:
    """Nobody reads on: what is still in the buffers goes nowhere, and nothing is said about it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        try:
            os.dup2(nowhere, number)
        except OSError:
            continue
    return NOBODY_READS
