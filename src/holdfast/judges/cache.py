"""What a judge answered, kept by the content of what it was asked: a verdict is paid for once.

One JSON line per answer, `{"key", "text"}`, appended with one write and fsync. The key hashes the judge's identity, the
request, the bytes of its images and the reply; replies themselves are not stored. The judge's raw text is kept rather
than its label, so that a better parser needs no new answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast.data.types import Sample
from holdfast.errors import JudgeError, StorageError
from holdfast.files import append, parse_json, read_bytes, sha256


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
        self._ends_in_newline = True
        if path is not None and path.exists():
            self._read(path)

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
                self._append(self.path, line if self._ends_in_newline else b"\n" + line)
                self._ends_in_newline = True
            self._answers[key] = text

    def _append(self, path: Path, data: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            append(path, data)
        except (OSError, StorageError) as error:
            raise JudgeError(
                f"The verdict cache {path} cannot be written: {error} Choose another file with the "
                "judge's option `cache`, or set HOLDFAST_CACHE."
            ) from error

    def _read(self, path: Path) -> None:
        raw = read_bytes(path, error=JudgeError, what="the verdict cache")
        # A write that was cut off has no newline; the next one must not be glued to it.
        self._ends_in_newline = not raw or raw.endswith(b"\n")
        for line in raw.split(b"\n"):
            if not line.strip():
                continue
            try:
                entry = parse_json(line, path, error=JudgeError)
                key, text = entry["key"], entry["text"]
            except (JudgeError, KeyError, TypeError):
                self.torn += 1
                continue
            self._answers[str(key)] = str(text)


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
