"""How a command ends: one place for every verb.

    0    done                     1    a bug of holdfast, with its traceback in a file (or a verb's own "no")
    2    an error with a sentence 130  stopped with Ctrl-C      141  whoever read the output has gone

HOLDFAST_DEBUG=1 shows the traceback of any error.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from holdfast.cli.terminal import guarded_output
from holdfast.errors import HoldfastError, StorageError
from holdfast.files import atomic_path, storage_error
from holdfast.text import visible
from holdfast.version import __version__

FAILED, BUG, STOPPED, NOBODY_READS = 2, 1, 130, 141

# What torch says when the main memory or a device's is used up; its class is no MemoryError.
_NO_MEMORY = re.compile(r"can't allocate memory|out of memory|not enough memory|Cannot allocate memory", re.IGNORECASE)
_OF_A_WORKER = re.compile(r"\ACaught \w+ in .*?Original Traceback.*^[\w.]*\b{}: (.*)\Z", re.DOTALL | re.MULTILINE)


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
    return 0


def _told(error: Exception) -> int:
    """Print an error as a sentence and return the exit status."""
    sentence = explain(error)
    if sentence is None:
        where = _keep_traceback(error)
        last = str(error).strip().splitlines()[:1] or [""]
        sentence = (
            f"This is a bug in holdfast, or in a plug-in of yours: {type(error).__name__}: {last[0]:.300}\n"
            f"{where} Nothing that was published before is harmed, and the same command goes on where it can."
        )
        print(sentence, file=sys.stderr)
        return BUG
    if not isinstance(error, HoldfastError):
        sentence = f"{sentence}\n{_keep_traceback(error)}"
    print(sentence, file=sys.stderr)
    return FAILED


def explain(error: Exception) -> str | None:
    """A sentence for a user who can do something about it; None for what only we can mend."""
    name = type(error).__name__
    if isinstance(error, HoldfastError):
        # A loader's worker hands on its whole traceback as the message.
        found = re.search(_OF_A_WORKER.pattern.replace("{}", name), str(error), _OF_A_WORKER.flags)
        return f"{name}: {found.group(1).strip() if found else error}"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        first = str(error).strip().splitlines()[:1]
        return (
            f"MemoryError: the memory is used up{f' ({first[0]:.200})' if first else ''}. Use a smaller batch size "
            "(--batch-size, micro_batch_size), smaller pictures (max_pixels), --memory where the verb has it, or a "
            "machine with more; `holdfast doctor` estimates what is needed."
        )
    if isinstance(error, RecursionError):
        return "RecursionError: one of the files that were read is nested too deeply to be worked with."
    if isinstance(error, OSError):
        return _explain_system(error)
    return None


def _explain_system(error: OSError) -> str:
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
    if path is not None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return f"{StorageError.__name__}: {storage_error(error, path)}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"{StorageError.__name__}: the disk is full ({error.strerror}). Free some space and run the same command "
            "again."
        )
    hints = {
        errno.EACCES: "Ask its owner for the right to it, or name another.",
        errno.EPERM: "Ask its owner for the right to it, or name another.",
        errno.ENOENT: "Was it moved or removed while the command ran?",
        errno.ENAMETOOLONG: "Give it a shorter name.",
        errno.EMFILE: "Raise the limit of open files (`ulimit -n`).",
        errno.ENOMEM: "The memory is used up: use smaller batches or pictures.",
        errno.EIO: "The disk or the network under it fails.",
    }
    what = f"{path}: {error.strerror}" if path is not None else str(error)
    return f"{type(error).__name__}: {what}. {hints.get(error.errno or 0, '')}".rstrip()


def _keep_traceback(error: BaseException) -> str:
    """Put the traceback into a file of its own, and say where it is."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = Path(tempfile.gettempdir()) / f"holdfast-{stamp}-{os.getpid()}.txt"
    lines = "".join(traceback.format_exception(error))
    text = f"holdfast {__version__}, Python {sys.version.split()[0]}, {sys.platform}\n{' '.join(sys.argv)}\n\n{lines}"
    try:
        with atomic_path(path) as temporary:
            temporary.write_text(visible(text), encoding="utf-8")
    except (OSError, StorageError):
        return "Its traceback could not be written to a file; HOLDFAST_DEBUG=1 shows it."
    return f"Its traceback is in {path}; please send it with your report."


def _without_reader() -> int:
    """Nobody reads on: what is still in the buffers goes nowhere, and nothing is said about it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        try:
            os.dup2(nowhere, number)
        except OSError:
            continue
    return NOBODY_READS
