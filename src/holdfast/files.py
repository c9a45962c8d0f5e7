"""Small files written whole or not at all: a temporary name beside the target, fsync, one rename."""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from holdfast.errors import StorageError

# What the system says when the disk, a quota or a file-size limit is the trouble.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def storage_error(error: OSError, path: Path) -> StorageError:
    """A sentence about a failed write to `path`: no space, no permission, or what the system said."""
    if error.errno in _FULL:
        return StorageError(
            f"No space left to write {path}. Nothing was published there; free some space and run the same command "
            "again: finished parts are kept and reused."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(f"{path} cannot be written: {error.strerror}. Choose an output folder that you may write.")
    return StorageError(f"{path} could not be written: {error.strerror or error}.")


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Within, a failed write to `path` is a StorageError; also one of safetensors, which hides the system's number.

    Raises: StorageError: the disk is full or `path` cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise storage_error(error, path) from error
    except SafetensorError as error:
        # "I/O error: No space left on device (os error 28)"; any other one is about the tensors.
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise storage_error(OSError(code, os.strerror(code)), path) from error


def fsync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; renamed onto it when the block ends well, removed when it does not.

    Raises: StorageError: the disk is full or the folder cannot be written.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with storage_errors(path):
            yield temporary
            # mkstemp makes the file private; a published file gets what the umask allows.
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(0o666 & ~mask)
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
            fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def require_writable(path: Path, *, overwrite: bool = True) -> None:
    """Raise StorageError now where a file at `path` could not be written after hours of work.

    overwrite: whether a file that is there may be replaced (`--overwrite`).
    """
    if path.is_dir():
        raise StorageError(f"{path} is a folder; give --out the name of a file, such as {path / 'out'}.")
    if path.exists() and not overwrite:
        raise StorageError(f"{path} exists. Choose another --out, remove it, or pass --overwrite.")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON with a final newline, atomically; NaN and inf are refused (they are not JSON)."""
    text = json.dumps(value, indent=2, sort_keys=False, allow_nan=False, ensure_ascii=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
