"""OR-Bench (Cui et al. 2024, arXiv 2405.20947; CC-BY-4.0): prompts that look toxic and are not, beside toxic ones.

Tables of `prompt, category`: `or-bench-toxic` (655, to refuse), `or-bench-hard-1k` (1,319, harmless and often refused)
and `or-bench-80k` (harmless). The text-only reader also takes any pair of tables of that layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from holdfast.data.safety import choose, field_of, safety_set
from holdfast.data.safety_text import table
from holdfast.data.types import SafetySet, Sample
from holdfast.errors import DataError

BENIGN = {"hard": "or-bench-hard-1k", "80k": "or-bench-80k"}
OBTAIN = "`hf download bench-llm/or-bench --repo-type dataset --local-dir <root>`."


def read(
    root: Path,
    *,
    name: str,
    benign: Literal["hard", "80k", "none"] = "hard",
    categories: str | Sequence[str] | None = None,
    limit_benign: int | None = None,
    max_new_tokens: int = 256,
) -> SafetySet:
    """`or-bench-toxic` as requests to refuse; beside it the hard 1k, the 80k, or nothing.

    categories: only these, as the files name them ("violence", "illegal", ...). limit_benign: the first so many of the
        harmless prompts.

    Raises: DataError: files are missing or of another layout.
    """
    choose("OR-Bench side", benign, (*BENIGN, "none"))
    if limit_benign is not None and limit_benign < 1:
        raise DataError(f"{name}: limit_benign is {limit_benign}; expected a positive number, or none for all.")
    unsafe = _side(root, name, "or-bench-toxic", categories)
    harmless = _side(root, name, BENIGN[benign], categories)[:limit_benign] if benign in BENIGN else []
    return safety_set(name, unsafe, harmless, where=root, max_new_tokens=max_new_tokens)


def _side(root: Path, name: str, stem: str, categories: str | Sequence[str] | None) -> list[Sample]:
    wanted = None if categories is None else {categories} if isinstance(categories, str) else set(categories)
    samples, known = [], set()
    stems = (stem, f"data/{stem}", f"{stem}/*", f"{stem}/*/*")
    for index, (where, row) in enumerate(table(root, stems, what=f"{name}, {stem}", obtain=OBTAIN)):
        category = field_of(row, "category", where)
        known.add(category)
        if wanted is None or category in wanted:
            samples.append(
                Sample.single(f"{stem}/{index + 1}", field_of(row, "prompt", where), meta={"category": category})
            )
    for category in sorted(wanted - known) if wanted else ():
        choose("OR-Bench category", category, sorted(known))
    return samples
