"""An error in words for whoever ran the command, and its traceback in a file for whoever mends it."""

from __future__ import annotations

import errno
import os
import re
import sys
import tempfile
import time
import traceback
from pathlib import Path

from holdfast.errors import HoldfastError, StorageError
from holdfast.files import atomic_path, storage_error
from holdfast.text import one_line, visible
from holdfast.version import __version__

# What torch says when the main memory or a device's is used up; its class is no MemoryError.
_NO_MEMORY = re.compile(r"can't allocate memory|out of memory|not enough memory|Cannot allocate memory", re.IGNORECASE)


def explain(error: Exception) -> str | None:
    """A sentence for a user who can do something about it; None for what only we can mend."""
    name = type(error).__name__
    if isinstance(error, HoldfastError):
        return f"{name}: {_without_worker(str(error), name)}"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        first = str(error).strip().splitlines()[:1]
        return (
            f"MemoryError: the memory is used up{f' ({first[0]:.200})' if first else ''}. Use a smaller batch size "
            "(--batch-size, micro_batch_size), smaller pictures (max_pixels), --memory where the verb has it, or a "
            "machine with more; `holdfast doctor` estimates what is needed."
        )
    if isinstance(error, RecursionError):
        return "RecursionError: one of the files that were read is nested too deeply to be worked with."
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return (
            f"UnicodeEncodeError: '{one_line(error.object, 200)}' holds bytes that are no UTF-8, or half of a "
            "character, and cannot be written down. Rename the file, or correct the text."
        )
    if isinstance(error, OSError):
        return _explain_system(error)
    return None


def report_bug(error: BaseException) -> str:
    """What is said of an error that only we can mend; its traceback goes into a file."""
    first = str(error).strip().splitlines()[:1] or [""]
    return (
        f"This is a bug in holdfast, or in a plug-in of yours: {type(error).__name__}: {first[0]:.300}\n"
        f"{keep_traceback(error)} Nothing that was published before is harmed, and the same command goes on where it "
        "can."
    )


def keep_traceback(error: BaseException) -> str:
    """Put the traceback into a file of its own, and say where it is."""
    return keep("".join(traceback.format_exception(error)), "Its traceback", "HOLDFAST_DEBUG=1 shows it")


def keep(text: str, what: str, otherwise: str) -> str:
    """Put `text` into a file of its own in the folder for temporary files, and say where it is.

    what: the subject of that sentence. otherwise: what to do where it cannot be written.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = Path(tempfile.gettempdir()) / f"holdfast-{stamp}-{os.getpid()}.txt"
    head = f"holdfast {__version__}, Python {sys.version.split()[0]}, {sys.platform}\n{' '.join(sys.argv)}\n\n"
    try:
        with atomic_path(path) as temporary:
            temporary.write_text(visible(head + text), encoding="utf-8")
    except (OSError, StorageError):
        return f"{what} could not be written to a file; {otherwise}."
    return f"{what} is in {path}; please send it with your report."


def _without_worker(text: str, name: str) -> str:
    """A loader's worker hands on its whole traceback as the message; only its last words are the message."""
    if not text.startswith("Caught ") or "Original Traceback" not in text:
        return text
    last = [*re.finditer(rf"^[\w.]*\b{re.escape(name)}: ", text, re.MULTILINE)]
    return text[last[-1].end() :].strip() if last else text.splitlines()[0]


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
