"""A file of samples, in any of the shapes that `data.items` reads, as a list."""

from __future__ import annotations

from pathlib import Path

from holdfast.data.items import rename_duplicates, to_samples
from holdfast.data.source_files import read_records
from holdfast.data.types import Sample
from holdfast.errors import DataError


def read_samples(path: Path | str, *, images: Path | str | None = None) -> list[Sample]:
    """Samples of a JSON or JSON-lines file of prompts with answers, or of LLaVA conversations.

    images: folder that image paths start from; by default the file's own. Raises DataError: see the readers.
    """
    path = Path(path)
    samples = to_samples(read_records(path), where=path, root=Path(images) if images is not None else path.parent)
    if not samples:
        raise DataError(f"{path} is empty; expected at least one sample.")
    return rename_duplicates(samples)
