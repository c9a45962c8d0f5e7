"""What every picture of a run, and every model beside its own, was when it began: a path may show another tomorrow.

Size and time are compared first; a picture whose time changed is hashed, where the run knows its hash.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from holdfast.data.source_files import read_json, write_text
from holdfast.errors import RunError
from holdfast.files import sha256

# Pictures of more bytes than this are not read for their hashes: size and time must do.
HASHED_BYTES = 256 * 2**20


def check_pictures(file: Path, pictures: Iterable[Path], root: Path, *, add: bool = True) -> None:
    """Write `file` with what `pictures` are, or compare them with what it says; new pictures are added.

    add: False: compare only. root: data root, from which names are taken, so that the data may move. Pictures that are
    missing are left to whoever opens them.
    Raises RunError: a picture is another one than when the run began, or that cannot be ruled out.
    """
    known = read_json(file) if file.is_file() else {}
    now: dict[str, list[object]] = {}
    stats = {}
    for path in dict.fromkeys(pictures):
        try:
            stats[path] = path.stat()
        except OSError:
            continue
    hashed = sum(stat.st_size for stat in stats.values()) <= HASHED_BYTES
    changed: list[str] = []
    unsure: list[str] = []
    for path, stat in stats.items():
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
        size, time, digest = known.get(name, (None, None, None))
        if size == stat.st_size and time == stat.st_mtime_ns:
            now[name] = [size, time, digest]
            continue
        found = _hash(path) if digest is not None or (size is None and hashed) else None
        if size is not None and (size != stat.st_size or (digest is not None and found != digest)):
            changed.append(name)
        elif size is not None and digest is None:
            unsure.append(name)
        now[name] = [stat.st_size, stat.st_mtime_ns, found]
    if changed or unsure:
        what = f"{len(changed)} picture(s) are others than when this run began: {_named(changed)}. " if changed else ""
        if unsure:
            what += (
                f"{len(unsure)} picture(s) have another time than when this run began, and no hash was taken of them: "
                f"{_named(unsure)}. "
            )
        raise RunError(
            f"{file.parent}: {what}Finished tasks saw the old ones. Put those back (a copy with `cp -p` or `rsync -a` "
            "keeps times), or choose another --out."
        )
    merged = {**known, **now}
    if add and merged != known:
        write_text(file, json.dumps(merged, separators=(",", ":")) + "\n")


def check_models(file: Path, models: Mapping[str, str], *, add: bool = True) -> None:
    """Write `file` with the fingerprints of `models`, or compare them with what it says; new ones are added.

    models: folder -> fingerprint, of what a run names beside the model that it tunes. add: False: compare only.
    Raises RunError: a folder holds another model than when the run began.
    """
    known = read_json(file) if file.is_file() else {}
    changed = [name for name, digest in models.items() if known.get(name, digest) != digest]
    if changed:
        raise RunError(
            f"{file.parent}: {len(changed)} model(s) that this run names are others than when it began: "
            f"{_named(changed)}. Finished tasks were made with the old ones. Put those back, or choose another --out."
        )
    merged = {**known, **models}
    if add and merged != known:
        write_text(file, json.dumps(merged, indent=1) + "\n")


def _hash(path: Path) -> str:
    digest: str = sha256(path).hexdigest()
    return digest[:32]


def _named(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
