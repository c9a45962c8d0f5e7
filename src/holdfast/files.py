"""Files of others read with bounds, and small files written whole or not at all.

Reading: ordinary files only (a pipe or a device would be waited for), of a bounded size; JSON and YAML of a bounded
depth, without keys that stand twice where that matters, and without text or numbers that nothing can work with.
Writing: a temporary name beside the target, fsync, one rename.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from holdfast.errors import ConfigError, HoldfastError, StorageError
from holdfast.text import one_line

# Settings are read whole: a tokenizer.json of the largest vocabularies has 35 MB, the index of a 1T model 20 MB.
MAX_SETTINGS_BYTES = 256 * 2**20
# Run and stream files have some kB; the parser needs seconds for a MB.
MAX_YAML_BYTES = 2**20
# Levels of lists and objects within each other; configurations have 5, data files 8.
MAX_DEPTH = 64
# Values of a YAML file with its aliases written out.
MAX_YAML_VALUES = 200_000

_LOG = logging.getLogger("holdfast")

# What the system says when the disk, a quota or a file-size limit is the trouble.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


# Should a file be exchanged for a pipe meanwhile, opening does not wait for a writer. Windows has no such pipes, and
# reads text unless told otherwise.
_READ = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class NotAFileError(OSError):
    """A folder, pipe, device or socket where a file was expected."""


def open_regular(path: Path | str) -> int:
    """A descriptor of an ordinary file, for reading. What is no ordinary file is never opened, nor waited for.

    Raises: OSError: what `os.open` raises; NotAFileError: a folder, pipe, device or socket.
    """
    _require_regular(Path(path).stat(), path)
    handle = os.open(path, _READ)
    try:
        _require_regular(os.fstat(handle), path)
    except NotAFileError:
        os.close(handle)
        raise
    return handle


def _require_regular(found: os.stat_result, path: Path | str) -> None:
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a named pipe", stat.S_ISSOCK: "a socket"}
    if not stat.S_ISREG(found.st_mode):
        kind = next((word for test, word in kinds.items() if test(found.st_mode)), "a device")
        number = errno.EISDIR if stat.S_ISDIR(found.st_mode) else errno.EINVAL
        raise NotAFileError(number, f"it is {kind}, not a file", str(path))


def read_bytes(path: Path, *, error: type[HoldfastError], most: int | None = None, what: str = "a file") -> bytes:
    """The content of an ordinary file. most: bytes that it may have.

    Raises: FileNotFoundError; `error`: no ordinary file, unreadable or too large.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if most is not None and size > most:
                raise error(f"{path} has {size} bytes; expected {what}, of at most {most}.")
            return file.read()
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror or problem}; expected {what}.") from problem


def sha256(path: Path | str) -> Any:
    """The sha256 object of an ordinary file's content. Raises: OSError; NotAFileError."""
    with os.fdopen(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256")


def parse_json(
    text: str | bytes,
    where: Path | str,
    *,
    error: type[HoldfastError],
    unique: bool = False,
    nan: bool = True,
    constant: Callable[[str], Any] | None = None,
) -> Any:
    """The JSON value of `text` (bytes: UTF-8).

    unique: a key that stands twice in one object is refused. nan: NaN and infinities, which JSON does not have and
    Python writes, are read; otherwise refused. constant: what the words NaN, Infinity and -Infinity are read as.

    Raises: `error`: no JSON, or JSON that nothing can work with: nested more than MAX_DEPTH levels deep, numbers of
        thousands of digits, half of a character.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_unique if unique else None, parse_constant=constant)
    except json.JSONDecodeError as problem:
        raise error(
            f"{where} is not valid JSON: {problem.msg} at line {problem.lineno}, column {problem.colno}. A truncated "
            "download is the usual cause; fetch the file again."
        ) from None
    except _TwiceError as problem:
        raise error(
            f"{where} says {one_line(str(problem), 80)!r} twice; one of the two would be lost. Remove one."
        ) from None
    except UnicodeDecodeError as problem:
        raise error(f"{where} is not UTF-8 ({problem.reason} at byte {problem.start}).") from None
    except ValueError:
        raise error(f"{where} is not usable JSON: a number of thousands of digits.") from None
    except RecursionError:
        raise error(f"{where} is not usable JSON: {_DEEP}.") from None
    if problem_with := _problem(value, text, nan=nan):
        raise error(f"{where} is not usable JSON: {problem_with}.")
    return value


def read_json(
    path: Path, what: str, *, error: type[HoldfastError], unique: bool = False, most: int = MAX_SETTINGS_BYTES
) -> Any:
    """The JSON value in a file of settings or records. what: what the file should be, for errors.

    Raises: FileNotFoundError; `error`: see `read_bytes` and `parse_json`.
    """
    return parse_json(read_bytes(path, error=error, most=most, what=what), path, error=error, unique=unique)


def read_jsonl(path: Path, what: str, *, error: type[HoldfastError], torn_end: bool = False) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file of our own. torn_end: a last line that a kill cut off is left out.

    Raises: FileNotFoundError; `error`: see `read_bytes` and `parse_json`, or a line that is no object; with its number.
    """
    # Not splitlines(): it also breaks at U+2028 and others, which are legal inside a JSON string.
    lines = read_bytes(path, error=error, what=what).decode("utf-8", "replace").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, f"{path}, line {number}", error=error)
        except error:
            if torn_end and number == len(lines):
                break
            raise
        if not isinstance(row, dict):
            raise error(f"{path}, line {number}: expected an object, found {type(row).__name__}.")
        rows.append(row)
    return rows


_DEEP = f"nested too deeply (more than {MAX_DEPTH} levels)"
_SURROGATE = re.compile(r"\\u[dD][89abAB]|\\u[dD][c-fC-F]|[\ud800-\udfff]")


class _TwiceError(Exception):
    """A key stands twice in one object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        raise _TwiceError(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return found


def _problem(value: Any, text: str, *, nan: bool, most: int | None = None) -> str | None:
    """What makes a parsed value unusable, or None. most: how many values, those of aliases counted each time."""
    level, count = [value], 0
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for item in level:
            kind = type(item)
            if kind is dict:
                inner += item.values()
            elif kind is list:
                inner += item
            elif kind is float:
                if not nan and item - item != 0:
                    return f"the number {item}; write a finite one, or null"
            elif kind is int and item.bit_length() > 1023:
                return "a number of hundreds of digits"
            if most is not None and len(inner) + count > most:
                return f"more than {most} values, aliases written out"
        if not inner:
            break
        count += len(inner)
        level = inner
    else:
        return _DEEP
    # Halves of a pair are escaped one by one, so most texts that hold some are in order.
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
        except UnicodeEncodeError as problem:
            half = ord(problem.object[problem.start])
            return f"half of a character (\\u{half:04x}), which is no text; write the whole one, or U+FFFD"
    return None


class _Loader(yaml.SafeLoader):
    """As `yaml.safe_load`, but a key that stands twice in one mapping is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, yaml.Mark] = {}
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                key = (key_node.tag, key_node.value)
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key_node.value!r} stands twice", key_node.start_mark
                    )
                seen[key] = key_node.start_mark
        return super().construct_mapping(node, deep=deep)


def parse_yaml(text: str, where: Path | str, *, error: type[HoldfastError] = ConfigError) -> Any:
    """The value of YAML text, of standard types only.

    Raises: `error`: no YAML, a key that stands twice, nested too deeply, aliases that multiply, numbers of thousands of
        digits, half of a character.
    """
    if len(text) > MAX_YAML_BYTES:
        raise error(f"{where} has {len(text)} characters; expected a YAML file of at most {MAX_YAML_BYTES}.")
    try:
        value = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as problem:
        raise error(f"{where} is not valid YAML: {one_line(str(problem), 400)}.") from None
    except RecursionError:
        raise error(f"{where} is not usable YAML: {_DEEP}.") from None
    except (ValueError, OverflowError, TypeError, AttributeError) as problem:
        # Of its constructors: numbers of thousands of digits, impossible dates.
        raise error(f"{where} is not usable YAML: {one_line(str(problem))}.") from None
    if problem_with := _problem(value, text, nan=True, most=MAX_YAML_VALUES):
        raise error(f"{where} is not usable YAML: {problem_with}.")
    return value


def storage_error(error: OSError, path: Path) -> StorageError:
    """A sentence about a failed write to `path`: no space, no permission, or what the system said."""
    if error.errno in _FULL:
        return StorageError(
            f"No space left to write {path}. Nothing was published there; free some space and run the same command "
            "again."
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


@contextmanager
def full_disk_errors(path: Path) -> Iterator[None]:
    """Within, a full disk is a StorageError about `path`, whichever library met it; every other error stays itself.

    Raises: StorageError: the disk, a quota or a file-size limit is used up.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise storage_error(error, path) from error
    except (SafetensorError, RuntimeError) as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        full = int(number[1]) in _FULL if number else "PytorchStreamWriter" in str(error)
        if not full:
            raise
        # torch's writer does not say why it failed.
        raise storage_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), path) from error


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise StorageError now where the disk of `folder` has fewer than `needed` bytes left for `what`."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise StorageError(
            f"{what} needs about {needed / 1e9:.2f} GB below {folder}, and its disk has {free / 1e9:.2f} GB left. Free "
            "some space or choose an --out on another disk."
        )


# What a file system says that has no such thing as fsync (or flock): some network and user-space ones.
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


def fsync(handle: int) -> None:
    """`os.fsync`; a file system that has none is told of once, and lived with."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        _say_once(
            "This file system has no fsync: after a power cut, what was just written may be gone. Repeat it then."
        )


def fsync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` survive a power cut; Windows opens no folders, and has to do without."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fsync(handle)
    finally:
        os.close(handle)


@cache
def _say_once(text: str) -> None:
    _LOG.warning(text)


class Lock:
    """Held by one process at a time, until `release` or its end; an operating-system lock, so a kill leaves none.

    On a file system without locks a file stands for one, or, where not even that works, nothing; it is told of once.

    Raises: `error` with the sentence `busy`: another process holds it. StorageError: the file cannot be made.
    """

    def __init__(self, path: Path, *, busy: str, error: type[HoldfastError] = StorageError) -> None:
        self._lock: FileLock | None = FileLock(str(path))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                self._lock.acquire(timeout=0)
            if any("SoftFileLock" in str(one.message) for one in said):
                _say_once(
                    f"{path.parent}: its file system has no locks; a file stands for one. After a kill, remove {path}."
                )
        except Timeout:
            raise error(busy) from None
        except NotImplementedError:  # of filelock, for ENOSYS
            self._lock = None
        except OSError as problem:
            if problem.errno not in _UNSUPPORTED:
                raise storage_error(problem, path) from problem
            self._lock = None
        if self._lock is None:
            _say_once(f"The file system of {path.parent} has no locks: see to it that no other process writes there.")

    def release(self) -> None:
        """Let others have it; once released it stays so."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; renamed onto it when the block ends well, removed when it does not.

    Raises: StorageError: the disk is full or the folder cannot be written.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with storage_errors(path):
            yield temporary
            # mkstemp makes the file private; a published file gets what the umask allows.
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(0o666 & ~mask)
            with temporary.open("rb+") as written:  # Windows syncs only what may be written
                fsync(written.fileno())
            temporary.replace(path)
            fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def append(path: Path, data: bytes) -> None:
    """`data` at the end of a file, on disk before this returns; made where it is not there.

    Raises: StorageError: the disk is full or `path` cannot be written; a part of `data` may then be at its end.
    """
    with storage_errors(path), path.open("ab", buffering=0) as file:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]
        fsync(file.fileno())


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
