"""One's own data: JSON lines (or a JSON list) of prompts with answers, as a task or as a safety set.

`{"id"?, "prompt", "answer"?, "answers"?, "image"?, "images"?, ...}`; remaining keys travel in `Sample.meta`.
"""

from __future__ import annotations

from pathlib import Path

from holdfast.data.items import refuse_duplicates, to_samples
from holdfast.data.readers import Source
from holdfast.data.source_files import find, read_records
from holdfast.data.types import SafetySet, Sample
from holdfast.errors import DataError


def read(source: Source) -> list[Sample]:
    """Samples of one split. Options: prompt_suffix, appended to every prompt of every split."""
    options = source.take({"prompt_suffix": ""})
    path = source.path()
    return to_samples(
        read_records(path),
        where=path,
        root=source.root,
        folders=source.images,
        image_search=source.image_search,
        limit=source.limit,
        prompt_suffix=options["prompt_suffix"],
    )


def read_safety(
    root: Path,
    *,
    name: str,
    unsafe: str,
    benign: str | None = None,
    images: str = ".",
    max_new_tokens: int = 256,
) -> SafetySet:
    """A safety set from a file of requests to refuse and, beside it, one of requests to answer (over-refusal).

    Raises: DataError: a file is missing or holds no request.
    """
    sides: dict[str, list[Sample]] = {}
    for side, file in (("unsafe", unsafe), ("benign", benign)):
        if file is None:
            sides[side] = []
            continue
        path = find(root, [file], what=f"Safety set {name!r}, {side} side")
        sides[side] = to_samples(read_records(path), where=path, root=root, folders=(images,))
        refuse_duplicates(sides[side], path)
        if not sides[side]:
            raise DataError(f"Safety set {name!r}: {path} holds no request.")
    return SafetySet(name=name, unsafe=sides["unsafe"], benign=sides["benign"], max_new_tokens=max_new_tokens)
