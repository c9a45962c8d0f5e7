"""BeaverTails-V (Ji et al. 2025, arXiv 2503.17682), both releases, told apart by their columns.

`PKU-Alignment/BeaverTails-V` (CC-BY-NC-4.0): one row per answer, `question, image, category, image_severity, response,
is_response_safe` ("yes" / "no"). `saferlhf-v/BeaverTails-V`: one row per pair of answers, `response_1, response_2,
safer_response_id, more_helpful_response_id, ...`. One folder per category, splits `train` and `evaluation`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from holdfast.data.embedded import embedded_image, parquet_columns, parquet_rows
from holdfast.data.safety_set import choose, choose_many, field_of, safety_set
from holdfast.data.types import SafetySet, Sample
from holdfast.errors import DataError

Release = Literal["response", "preference"]
OBTAIN = (
    "`hf download saferlhf-v/BeaverTails-V --repo-type dataset --local-dir <root>` (or PKU-Alignment/BeaverTails-V, "
    "which is CC-BY-NC-4.0 and may ask you to accept its terms)."
)


def read(
    root: Path,
    *,
    name: str,
    split: Literal["evaluation", "train"] = "evaluation",
    categories: str | Sequence[str] | None = None,
    min_severity: int = 0,
    cache: str | None = None,
    max_new_tokens: int = 512,
) -> SafetySet:
    """Every distinct (question, image) of a split as a request to refuse; no benign side is published.

    categories: only these folders. min_severity: only images at least so severe (the releases grade 0 to 3).
    `meta["safe_response"]`: a published answer that is marked safe (or the safer of a pair), where there is one.

    Raises: DataError: no such files below `root`, or a row of another layout.
    """
    choose("BeaverTails-V split", split, ("evaluation", "train"))
    shards = _shards(root, split)
    if not shards:
        raise DataError(f"{name}: no {split}*.parquet below {root}, in one folder per category. {OBTAIN}")
    wanted = choose_many("BeaverTails-V category", categories, list(shards))
    folder = Path(cache).expanduser() if cache else None
    samples: dict[str, Sample] = {}
    for category in wanted:
        release = sniff(parquet_columns(shards[category][0]), shards[category][0])
        for path, number, row in parquet_rows(shards[category], needed=("question", "image")):
            where = f"{path}, row {number}"
            severity = row.get("image_severity")
            if min_severity and (not isinstance(severity, int) or severity < min_severity):
                continue
            question = field_of(row, "question", where)
            picture = embedded_image(row["image"], root, what=where, cache=folder)
            # The same request comes with several answers; asking it twice would count it twice.
            key = hashlib.sha256(f"{question}\0{picture.name}".encode()).hexdigest()[:16]
            meta = {"category": str(row.get("category") or category), "image_severity": severity, "release": release}
            if safe := safe_response(row, release, where):
                meta["safe_response"] = safe
            if key not in samples or ("safe_response" in meta and "safe_response" not in samples[key].meta):
                samples[key] = Sample.single(f"{category}/{key}", question, images=(picture,), meta=meta)
    return safety_set(name, list(samples.values()), where=root, max_new_tokens=max_new_tokens)


def sniff(columns: Sequence[str], where: Path | str) -> Release:
    """Which release a file belongs to. Raises DataError: neither, with the columns found."""
    if {"response_1", "response_2", "safer_response_id"} <= set(columns):
        return "preference"
    if {"response", "is_response_safe"} <= set(columns):
        return "response"
    raise DataError(
        f"{where} is of neither release of BeaverTails-V: it has {', '.join(columns)}; expected response and "
        "is_response_safe, or response_1, response_2 and safer_response_id."
    )


def safe_response(row: Mapping[str, Any], release: Release, where: str) -> str | None:
    """A published safe answer of a row, or None. Raises DataError: a mark that is not understood."""
    if release == "preference":
        chosen = row.get("safer_response_id")
        if chosen not in (1, 2):
            raise DataError(f"{where}: safer_response_id is {chosen!r}; expected 1 or 2.")
        return row.get(f"response_{chosen}") or None
    mark = row.get("is_response_safe")
    text = str(mark).strip().lower()
    if text in ("yes", "true", "1", "safe"):
        return row.get("response") or None
    if text in ("no", "false", "0", "unsafe"):
        return None
    raise DataError(f"{where}: is_response_safe is {mark!r}; expected yes or no.")


def _shards(root: Path, split: str) -> dict[str, list[Path]]:
    """Category -> its shards, from `<...>/<category>/<split>*.parquet`; sorted by name."""
    found: dict[str, list[Path]] = {}
    for path in sorted(root.rglob(f"{split}*.parquet")):
        found.setdefault(path.parent.name, []).append(path)
    return dict(sorted(found.items()))
