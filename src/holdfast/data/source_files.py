"""Text, JSON and JSON lines as the field ships them, read strictly and refused with the place of the fault.

UTF-8 (with or without a byte-order mark) and UTF-16/32 with a byte-order mark are read, gzipped or not; anything else
is an error that names the byte, because a guessed encoding would change gold answers in silence. A relative path never
leaves its root.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import os
import re
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from holdfast import files
from holdfast.errors import DataError, StorageError, nearest
from holdfast.text import one_line

# UTF-32 first: its little-endian mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


# A data file of the field has some hundred MB; a bomb of some kB has more.
MAX_UNPACKED_BYTES = 4 * 2**30


_LONGEST_CELL = 2**28


def read_text(path: Path) -> str:
    """The whole text of `path`. Raises DataError: missing, unreadable, or not UTF-8 (nor UTF-16/32 with a mark)."""
    try:
        raw = files.read_bytes(path, error=DataError, what="a data file")
    except FileNotFoundError:
        raise DataError(missing(path)) from None
    if path.suffix == ".gz":
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
                raw = file.read(MAX_UNPACKED_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} is not a whole gzip file: {error}. Fetch it again.") from None
        if len(raw) > MAX_UNPACKED_BYTES:
            raise DataError(
                f"{path} unpacks to more than {MAX_UNPACKED_BYTES >> 20} MiB. Where that is right, unpack it and name "
                "the unpacked file."
            )
    encoding = next((name for mark, name in _MARKS if raw.startswith(mark)), "utf-8")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} is not {encoding.upper()}: byte 0x{raw[error.start]:02x} at offset {error.start} (line {line}). "
            f"Expected UTF-8; convert it, for example: iconv -f LATIN1 -t UTF-8 {path.name}."
        ) from None


def parse_json(text: str, where: Path | str) -> Any:
    """JSON value of `text`; a fault is named with its line and column. NaN, as pandas writes null, is read as null.

    Raises: DataError: no JSON, nested too deeply, a number that is infinite or of hundreds of digits, or half of a
        character.
    """

    def constant(word: str) -> None:
        if word != "NaN":
            raise DataError(f"{where} holds the number {word}, which is no JSON; write a finite number or null.")

    return files.parse_json(text, where, error=DataError, nan=False, constant=constant)


def read_json(path: Path) -> Any:
    """The JSON value in `path`."""
    return parse_json(read_text(path), path)


def iter_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of each non-blank line of a JSON-lines file."""
    # Not splitlines(): it also breaks at U+2028 and others, which are legal inside a JSON string.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield number, parse_json(line, f"{path}, line {number}")


def is_jsonl(path: Path) -> bool:
    """Whether a file is JSON lines by its name (`.jsonl`, `.ndjson`, gzipped or not)."""
    return path.name.removesuffix(".gz").endswith((".jsonl", ".ndjson"))


def read_records(path: Path, *, keys: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The list of objects in a `.json` (list, or an object that holds one under one of `keys`) or `.jsonl` file.

    Raises DataError: another shape, or an item that is not an object (named by its place).
    """
    if is_jsonl(path):
        items: Any = [value for _, value in iter_jsonl(path)]
    else:
        items = read_json(path)
        if isinstance(items, dict):
            for key in (*keys, "data", "items", "questions", "annotations"):
                if isinstance(items.get(key), list):
                    items = items[key]
                    break
    if not isinstance(items, list):
        found = f"keys {', '.join(map(repr, list(items)[:5]))}" if isinstance(items, dict) else type(items).__name__
        raise DataError(f"{path}: expected a list of objects, found {found}.")
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise DataError(f"{path}, item {index}: expected an object, found {type(item).__name__} {item!r:.60}.")
    return items


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file with a header line, as dicts. Raises DataError: a row with more fields than the header."""
    # A cell may hold a picture as text; the module's own bound is 128 kB.
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    rows = []
    try:
        for row in reader:
            if None in row:
                raise DataError(f"{path}, line {reader.line_num}: more fields than the header ({reader.fieldnames}).")
            rows.append({key: value or "" for key, value in row.items()})
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: no CSV that can be read: {error}.") from None
    return rows


# Names of letters, digits and harmless signs, none of them "." or "..", one after another.
_PLAIN_PATH = re.compile(r"(?:(?!\.{1,2}(?:/|$))[\w .,+@()=~%-]+/)*(?!\.{1,2}$)[\w .,+@()=~%-]+")


@cache
def _origin(root: Path, start: Path | None) -> tuple[Path, Path, bool]:
    """`root` without detours, where relative paths start from, and whether that is certainly below the root."""
    # Not resolve(): it would follow the owner's links.
    base = Path(os.path.normpath(root))
    origin = base / (start or base)
    return base, origin, origin.is_relative_to(base) and Path(os.path.normpath(origin)) == origin


def is_plain_path(relative: str) -> bool:
    """Whether a relative path is names alone, one below the other: nothing in it to resolve or to refuse."""
    return _PLAIN_PATH.fullmatch(relative) is not None and not relative.isspace()


def plain_start(root: Path, start: Path) -> Path | None:
    """What `inside(root, path, start=start)` puts before a plain path; None where that is not surely below `root`."""
    _, origin, below = _origin(root if root.is_absolute() else Path.cwd() / root, start)
    return origin if below else None


def inside(root: Path, relative: str, *, start: Path | None = None, what: str = "path") -> Path:
    """Absolute path of `relative` (from `start`, or from `root`); a path that leaves `root` is refused.

    The check is on the path as written: a data file cannot reach out with `..`, a drive or an absolute path, while
    links that the owner of the root placed inside it are followed (data roots are often links to other disks).

    Raises: DataError: the path is empty, absolute, or leaves `root`.
    """
    if "\x00" in relative or not relative.strip():
        raise DataError(f"{what} {relative!r} is empty or holds a NUL character; expected a path relative to {root}.")
    base, origin, below = _origin(root, start) if root.is_absolute() else _origin(Path.cwd() / root, start)
    if below and is_plain_path(relative):
        # Nothing to resolve and nothing to refuse: nearly every path of a data file, and most of a reader's time.
        return origin / relative
    posix = relative.replace("\\", "/")
    # A drive needs its separator: "a:b.png" is an ordinary name here.
    foreign = PureWindowsPath(relative).is_absolute() or posix.startswith("//")
    joined = Path(os.path.normpath(origin / PurePosixPath(posix)))
    if foreign or not joined.is_relative_to(base):
        raise DataError(
            f"{what} {relative!r} leaves the data root {base}. Data files may only name files below their root; "
            "correct the entry, or set `root` to a folder that holds both."
        )
    return joined


_BRACES = re.compile(r"\{([^{}]*,[^{}]*)\}")
# Shards of one release number some hundred.
MAX_NAMES = 10_000


def expand_braces(pattern: str) -> list[str]:
    """`a/{x,y}.json` as `a/x.json`, `a/y.json`, in that order; several groups multiply, the first varying slowest.

    Raises: DataError: more than MAX_NAMES names.
    """
    names = [pattern]
    while any(_BRACES.search(name) for name in names):
        names = [one for name in names for one in _first_group(name)]
        if len(names) > MAX_NAMES:
            raise DataError(
                f"{one_line(pattern, 120)!r} stands for more than {MAX_NAMES} names; list the files instead."
            )
    return names


def _first_group(name: str) -> list[str]:
    group = _BRACES.search(name)
    if group is None:
        return [name]
    return [f"{name[: group.start()]}{choice}{name[group.end() :]}" for choice in group.group(1).split(",")]


def find(root: Path, aliases: Sequence[str], *, what: str, obtain: str = "") -> Path:
    """The first of `aliases` (relative to `root`) that exists. Raises DataError that names all and how to get them."""
    if not aliases:
        raise DataError(f"{what}: no file is named.")
    paths = [inside(root, alias, what=what) for alias in aliases]
    for path in paths:
        if path.exists():
            return path
    others = [path.name if path.parent == paths[0].parent else _below(path, root) for path in paths[1:]]
    raise DataError(f"{what}: {missing(paths[0], others=others, obtain=obtain)}")


def _below(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def missing(path: Path, *, others: Sequence[str] = (), obtain: str = "") -> str:
    """A sentence about a file that is not there: nearest existing folder, look-alike names, how to obtain it."""
    parent = path.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    text = f"{path} does not exist"
    if others:
        text += f" (nor under the name(s) {', '.join(others)})"
    if parent != path.parent:
        text += f"; the folder {parent} is there, {path.relative_to(parent).parts[0]!r} below it is not"
    elif parent.is_dir():
        alike = nearest(path.name, [entry.name for _, entry in zip(range(10_000), parent.iterdir(), strict=False)])
        text += f"; did you mean {alike!r}?" if alike else ""
    return text.rstrip("?.") + ("?" if text.endswith("?") else ".") + (f" {obtain.strip()}" if obtain.strip() else "")


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 in one rename: the file is whole or not there. Raises StorageError."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            files.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
