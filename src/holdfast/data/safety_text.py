"""What the text-only safety sets share: tables of prompts as CSV, JSON, JSON lines or Parquet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from holdfast.data.embedded import parquet_rows
from holdfast.data.source_files import find, read_csv, read_records
from holdfast.errors import DataError


def table(root: Path, stems: Sequence[str], *, what: str, obtain: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of the first file that exists: each of `stems` as .csv, .jsonl, .json or .parquet, or, with a `*`,
    the sorted Parquet shards of a Hub download.

    Raises DataError: no such file (with `obtain`), or one that holds no row.
    """
    for stem in stems:
        if "*" in stem:
            shards = sorted(root.glob(f"{stem}.parquet"))
            if shards:
                for path, number, row in parquet_rows(shards):
                    yield f"{path}, row {number}", row
                return
    names = [s for s in stems if "*" not in s]
    path = find(
        root, [f"{s}{e}" for s in names for e in (".csv", ".jsonl", ".json", ".parquet")], what=what, obtain=obtain
    )
    if path.suffix == ".parquet":
        for _, number, row in parquet_rows([path]):
            yield f"{path}, row {number}", row
        return
    rows: Sequence[dict[str, Any]] = read_csv(path) if path.suffix == ".csv" else read_records(path)
    if not rows:
        raise DataError(f"{path}: no row; expected a table of prompts.")
    for index, row in enumerate(rows):
        yield f"{path}, row {index + 1}", row
