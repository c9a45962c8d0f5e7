"""What the readers of published safety sets share.

Every reader is `read(root, *, name, **options) -> SafetySet`. `meta` of a sample: `category` (the set's own word),
`topic` (the request in words where the prompt itself does not show it: typographic images), `safe_response` (a
published safe answer). `references` stay empty on the unsafe side: there is no right answer to compare with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.data.images import choose_image_root
from holdfast.data.items import rename_duplicates
from holdfast.data.source_files import inside
from holdfast.data.types import SafetySet, Sample
from holdfast.errors import DataError, unknown_name


def field_of(item: Mapping[str, Any], key: str, where: str, kind: type | tuple[type, ...] = str) -> Any:
    """`item[key]`, non-empty and of type `kind`. Raises DataError that names the place and what is there instead."""
    value = item.get(key)
    if isinstance(value, kind) and (value or isinstance(value, bool | int)):
        return value
    expected = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
    found = f"{key!r} is {value!r:.60}" if key in item else f"there is no {key!r} (keys: {', '.join(map(str, item))})"
    raise DataError(f"{where}: {found}; expected a non-empty {expected}.")


def image_folder(root: Path, folders: Sequence[str], probe: str) -> Path:
    """The first of `folders` below `root` that holds `probe`, else the first."""
    return choose_image_root(root, folders, probe)


def image_path(root: Path, folder: Path, relative: str, where: str) -> Path:
    """Absolute path of an image named by a data file; one that leaves the root is refused.

    Raises: DataError: the path leaves `root`.
    """
    try:
        return inside(root, relative, start=folder, what="image")
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def choose(kind: str, value: str, known: Iterable[str]) -> str:
    """`value` if it is known. Raises UnknownNameError with the nearest and all that are known."""
    names = list(known)
    if value not in names:
        raise unknown_name(kind, value, names)
    return value


def choose_many(kind: str, values: str | Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """Chosen names in the order of `known`; None means all."""
    if values is None:
        return list(known)
    wanted = [values] if isinstance(values, str) else list(values)
    for value in wanted:
        choose(kind, value, known)
    return [name for name in known if name in wanted]


def safety_set(
    name: str, unsafe: Sequence[Sample], benign: Sequence[Sample] = (), *, where: Path | str, max_new_tokens: int = 256
) -> SafetySet:
    """A SafetySet with unique ids on each side. Raises DataError: nothing on the unsafe side."""
    if not unsafe:
        raise DataError(f"Safety set {name!r}: {where} holds no request that these options choose.")
    return SafetySet(
        name=name,
        unsafe=tuple(rename_duplicates(unsafe)),
        benign=tuple(rename_duplicates(benign)),
        max_new_tokens=max_new_tokens,
    )
