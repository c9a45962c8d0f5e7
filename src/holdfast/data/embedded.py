"""Rows of Parquet files, and images that live inside them: put on disk once, named by their content.

A Sample names images by path and opens them late. Parquet releases carry the bytes themselves, so each picture is
written below a cache folder, under the hash of its bytes: reading a set twice writes nothing.
"""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from holdfast.data.source_files import inside, missing
from holdfast.errors import DataError
from holdfast.text import one_line

_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", ".png"),
    (b"\xff\xd8\xff", ".jpg"),
    (b"GIF8", ".gif"),
    (b"BM", ".bmp"),
    (b"II*\x00", ".tif"),
    (b"MM\x00*", ".tif"),
)

# Base64 of the signatures, as far as they fill whole characters: PNG, JPEG, GIF, BMP, TIFF (both orders), WebP.
_BASE64_SIGNATURES = ("iVBORw0KGgo", "/9j/", "R0lGOD", "Qk0", "Qk1", "Qk2", "SUkqA", "TU0AK", "UklGR")
# No picture is shorter as Base64, and a short name that begins with such letters is a path.
_LONGEST_PATH = 60


def image_cache() -> Path:
    """Folder for pictures taken out of Parquet files: `$HOLDFAST_CACHE/images`, or `~/.cache/holdfast/images`."""
    base = os.environ.get("HOLDFAST_CACHE")
    if base:
        return Path(base).expanduser() / "images"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "holdfast" / "images"


def store_image(data: bytes, folder: Path, *, what: str) -> Path:
    """Absolute path of a file with exactly these bytes below `folder`, written in one rename unless it is there.

    Raises DataError: no bytes, or the folder cannot be written. Whether they are a picture shows when it is opened.
    """
    if not data:
        raise DataError(f"{what}: the image holds no byte; fetch the file again.")
    suffix = next((s for mark, s in _SIGNATURES if data.startswith(mark)), ".webp" if data[8:12] == b"WEBP" else ".bin")
    name = hashlib.sha256(data).hexdigest()
    path = folder.absolute() / name[:2] / f"{name}{suffix}"
    try:
        if not (path.exists() and path.stat().st_size == len(data)):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(temporary).replace(path)
    except OSError as error:
        raise DataError(
            f"{what}: its image cannot be kept in {folder}: {error.strerror or error}. Set HOLDFAST_CACHE to a folder "
            "that can be written."
        ) from error
    return path


def is_embedded(text: str) -> bool:
    """Whether an image's "path" is the picture itself: a data URI, or the Base64 of a picture's first bytes."""
    return text.startswith("data:") or (len(text) > _LONGEST_PATH and text.startswith(_BASE64_SIGNATURES))


def embedded_text(text: str, *, what: str, cache: Path | None = None) -> Path:
    """Path of a picture that is written out in a text (see `is_embedded`).

    Raises DataError: a data URI of something else, or text that is no Base64.
    """
    head, comma, body = text.partition(",") if text.startswith("data:") else ("data:image/;base64", ",", text)
    kind, *marks = head.removeprefix("data:").split(";")
    if not comma or not kind.startswith("image/"):
        raise DataError(f"{what}: {head[:60]!r} is no picture; expected 'data:image/...;base64,...'")
    try:
        data = base64.b64decode("".join(body.split()), validate=True) if "base64" in marks else unquote_to_bytes(body)
    except ValueError as error:
        raise DataError(f"{what}: its picture is no whole Base64 text ({error}); write the item again") from None
    return store_image(data, cache or image_cache(), what=what)


def embedded_image(value: Any, root: Path, *, what: str, cache: Path | None = None) -> Path:
    """Path of an image cell: bytes, a `{"bytes", "path"}` struct as the Hub writes it, or a path below `root`.

    Raises: DataError: neither bytes nor a path below `root`.
    """
    data, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if isinstance(data, bytes | bytearray):
        return store_image(bytes(data), cache or image_cache(), what=what)
    name = data if isinstance(data, str) else name
    if isinstance(name, str) and is_embedded(name):
        return embedded_text(name, what=what, cache=cache)
    if isinstance(name, str) and name:
        return inside(root, name, what=f"{what}: image")
    raise DataError(f"{what}: the image is {value!r:.60}; expected bytes, {{'bytes', 'path'}} or a path.")


def parquet_rows(paths: Sequence[Path], *, needed: Sequence[str] = ()) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """(file, row number, row) over Parquet files, in the order given; a batch of rows in memory at a time.

    Raises DataError: pyarrow is not installed, a file is missing or no Parquet, or a needed column is not there.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(
            f"{paths[0] if paths else 'A Parquet file'} needs pyarrow to be read; install `holdfast[hf]`."
        ) from None
    for path in paths:
        if not path.exists():
            raise DataError(missing(path))
        if not path.is_file():
            raise DataError(f"{path} is no file; expected a Parquet file.")
        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path} is no Parquet file: {error}. Fetch it again (a Git LFS pointer?).") from None
        with file:
            columns = file.schema_arrow.names
            lacking = [name for name in needed if name not in columns]
            if lacking:
                raise DataError(f"{path} has no column {', '.join(map(repr, lacking))}; it has {', '.join(columns)}.")
            number = 0
            batches = file.iter_batches(batch_size=64)
            while True:
                try:
                    rows = next(batches).to_pylist()
                except StopIteration:
                    break
                except (pa.ArrowException, OSError, ValueError) as error:
                    raise DataError(f"{path}, row {number} and on: damaged: {one_line(str(error))}.") from None
                for row in rows:
                    yield path, number, row
                    number += 1


def parquet_columns(path: Path) -> list[str]:
    """Names of the columns of a Parquet file, read from its footer."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return list(file.schema_arrow.names)
