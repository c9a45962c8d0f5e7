"""What a judge answered, kept by the content of what it was asked: a verdict is paid for once.

One JSON line per answer, `{"key", "text"}`, appended with one write and fsync. The key hashes the judge's identity, the
request, the bytes of its images and the reply; replies themselves are not stored. The judge's raw text is kept rather
than its label, so that a better parser needs no new answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from holdfast.data.types import Sample
from holdfast.errors import JudgeError, StorageError
from holdfast.files import append, open_regular, parse_json, sha256, storage_errors

if sys.platform != "win32":
    import fcntl

# A process has one open file for each cache's locks: closing any would let go of the locks of all.
_OPEN: dict[str, int] = {}


def default_folder() -> Path:
    """`$HOLDFAST_CACHE/verdicts`, or `~/.cache/holdfast/verdicts`."""
    base = os.environ.get("HOLDFAST_CACHE")
    if base:
        return Path(base).expanduser() / "verdicts"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "holdfast" / "verdicts"


class VerdictCache:
    """An append-only file of answers; safe against a kill in the middle of a write, and for several writers.

    path: the file, made on the first `put`; None keeps answers in memory only.
    torn: lines that do not parse (a write that a kill cut off); they are asked again.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.torn = 0
        self._answers: dict[str, str] = {}
        self._lock = threading.Lock()
        self._read_to = 0  # bytes of the file whose lines are known
        self._read(torn_end=True)

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> str | None:
        """The judge's text for `key`, or None."""
        return self._answers.get(key)

    def put(self, key: str, text: str) -> None:
        """Keep `text` under `key`, on disk before this returns. Raises JudgeError: the file cannot be written."""
        with self._lock:
            if self.path is not None:
                line = json.dumps({"key": key, "text": text}, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
                self._append(self.path, line)
            self._answers[key] = text

    @contextmanager
    def asking(self, keys: Sequence[str]) -> Iterator[list[str]]:
        """Within, no other process asks for any of `keys`; gives those that nobody has answered by then.

        Two runs that share a cache and meet in the same question wait for one another there, and only there. On a file
        system without locks, nothing is waited for. Raises: JudgeError: the cache cannot be read or written.
        """
        with self._claimed(sorted(set(keys))):
            self._read()
            yield [key for key in dict.fromkeys(keys) if key not in self._answers]

    @contextmanager
    def _claimed(self, keys: Sequence[str]) -> Iterator[None]:
        if self.path is None or not keys:
            yield
            return
        place = self.path.with_name(f".{self.path.name}.lock")
        try:
            with storage_errors(place):
                place.parent.mkdir(parents=True, exist_ok=True)
        except StorageError as error:
            raise _unwritable(self.path, error) from error
        if sys.platform == "win32":
            with FileLock(str(place)):
                yield
            return
        name = str(place.absolute())
        if name not in _OPEN:
            try:
                _OPEN[name] = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise _unwritable(self.path, error) from error
        held: list[int] = []
        try:
            # A byte for each key, far behind the file's end; in one order, so that no two wait for each other.
            for place_of in sorted({int(hashlib.sha256(key.encode()).hexdigest()[:15], 16) for key in keys}):
                with suppress(OSError):  # no locks here: a question may be asked twice, as by two machines
                    fcntl.lockf(_OPEN[name], fcntl.LOCK_EX, 1, place_of)
                    held.append(place_of)
            yield
        finally:
            for place_of in held:
                fcntl.lockf(_OPEN[name], fcntl.LOCK_UN, 1, place_of)

    def _append(self, path: Path, data: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # A write that was cut off, by whomever, has no newline; the next one must not be glued to it.
            append(path, data if _ends_in_newline(path) else b"\n" + data)
        except (OSError, StorageError) as error:
            raise _unwritable(path, error) from error

    def _read(self, *, torn_end: bool = False) -> None:
        """Take in what the file has got since it was last read, by this process or by others.

        torn_end: what stands behind the last newline is a write that was cut off, and not one that goes on.
        """
        if self.path is None or not self.path.exists():
            return
        with self._lock:
            raw = _read_from(self.path, self._read_to)
            if not torn_end:
                raw = raw[: raw.rfind(b"\n") + 1]
            for line in raw.split(b"\n"):
                if not line.strip():
                    continue
                try:
                    entry = parse_json(line, self.path, error=JudgeError)
                    key, text = entry["key"], entry["text"]
                except (JudgeError, KeyError, TypeError):
                    self.torn += 1
                    continue
                self._answers[str(key)] = str(text)
            self._read_to += len(raw)


def _unwritable(path: Path, error: Exception) -> JudgeError:
    return JudgeError(
        f"The verdict cache {path} cannot be written: {error} Choose another file with the judge's option `cache`, or "
        "set HOLDFAST_CACHE."
    )


def _read_from(path: Path, start: int) -> bytes:
    """The bytes of an ordinary file from `start` on. Raises JudgeError."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            file.seek(start)
            return file.read()
    except OSError as error:
        raise JudgeError(f"The verdict cache {path} cannot be read: {error.strerror or error}.") from error


def _ends_in_newline(path: Path) -> bool:
    """Whether the next line may begin where the file ends; also of a file that is empty or not there."""
    try:
        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return True
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"
    except FileNotFoundError:
        return True


class ContentKey:
    """Keys of (judge, sample, reply); a file's bytes are hashed once."""

    def __init__(self, identity: Mapping[str, Any]) -> None:
        self._identity = dict(identity)
        self._files: dict[tuple[str, int, int], str] = {}

    def __call__(self, sample: Sample, reply: str, **more: Any) -> str:
        """Hash of everything that the judge's answer may depend on; ids and meta data are not part of it."""
        content = {
            "judge": self._identity,
            "turns": [[turn.role, turn.text] for turn in sample.request],
            "images": [self._file(path) for path in sample.images],
            "reply": reply,
            **more,
        }
        text = json.dumps(content, sort_keys=True, ensure_ascii=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def _file(self, path: Path) -> str:
        try:
            status = path.stat()
            key = (str(path), status.st_size, status.st_mtime_ns)
            if key not in self._files:
                self._files[key] = sha256(path).hexdigest()
        except OSError:
            # Whoever opens the image says what is wrong with it; here it only must not equal another.
            return f"missing:{path}"
        return self._files[key]


def open_cache(cache: str | Path | bool | None, name: str) -> VerdictCache:
    """The cache that an option asks for: None the default file of judge `name`, False memory only, else a path."""
    if cache is False:
        return VerdictCache(None)
    if cache is None or cache is True:
        return VerdictCache(default_folder() / f"{name}.jsonl")
    return VerdictCache(Path(cache).expanduser())
