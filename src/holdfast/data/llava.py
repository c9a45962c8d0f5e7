"""LLaVA's instruction files: a JSON list (or JSON lines) in training or test shape."""

from __future__ import annotations

from holdfast.data.items import to_samples
from holdfast.data.readers import Source
from holdfast.data.source_files import read_records
from holdfast.data.types import Sample

OPTIONS = {"prompt_suffix": ""}


def read(source: Source) -> list[Sample]:
    """Samples of one split, images left on disk. Options: prompt_suffix (test splits only)."""
    options = source.take(OPTIONS)
    path = source.path()
    test = source.split != "train"
    return to_samples(
        read_records(path),
        where=path,
        root=source.root,
        folders=source.images,
        image_search=source.image_search,
        limit=source.limit,
        prompt_suffix=options["prompt_suffix"] if test else "",
        keep_meta=test,  # a scorer may need the extras of a test item; 40,000 training items need no second copy
    )
