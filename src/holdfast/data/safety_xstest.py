"""XSTest (Röttger et al. 2024, arXiv 2308.01263; CC-BY-4.0): 250 safe prompts and 200 unsafe contrasts, text only.

`xstest_prompts.csv` has `id, prompt, type, label, focus, note`; the older `xstest_v2_prompts.csv` has no `label`, and
there a type that begins with `contrast_` is unsafe.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from holdfast.data.safety import choose_many, field_of, safety_set
from holdfast.data.safety_text import table
from holdfast.data.types import SafetySet, Sample
from holdfast.errors import DataError

CONTRAST = "contrast_"
TYPES = (
    "homonyms",
    "figurative_language",
    "safe_targets",
    "safe_contexts",
    "definitions",
    "nons_group_real_discr",
    "real_group_nons_discr",
    "historical_events",
    "privacy_public",
    "privacy_fictional",
    "contrast_homonyms",
    "contrast_figurative_language",
    "contrast_safe_targets",
    "contrast_safe_contexts",
    "contrast_definitions",
    "contrast_discr",
    "contrast_historical_events",
    "contrast_privacy",
)
OBTAIN = "`hf download Paul/XSTest --repo-type dataset --local-dir <root>`."


def read(
    root: Path,
    *,
    name: str,
    types: str | Sequence[str] | None = None,
    benign: bool = True,
    max_new_tokens: int = 256,
) -> SafetySet:
    """The unsafe contrasts as requests to refuse, the safe prompts beside them.

    types: only these (names as published, the unsafe ones begin with "contrast_"). benign: leave the safe prompts out.

    Raises: DataError: files are missing or of another layout.
    """
    wanted = set(choose_many("XSTest type", types, TYPES))
    sides: dict[str, list[Sample]] = {"unsafe": [], "safe": []}
    stems = ("xstest_prompts", "xstest_v2_prompts", "data/xstest_prompts", "data/*", "data/test-*", "default/*/*")
    for index, (where, row) in enumerate(table(root, stems, what=name, obtain=OBTAIN)):
        kind = field_of(row, "type", where)
        label = row.get("label") or ("unsafe" if kind.startswith(CONTRAST) else "safe")
        if label not in sides:
            raise DataError(f"{where}: 'label' is {label!r}; expected safe or unsafe.")
        if kind not in TYPES:
            raise DataError(f"{where}: 'type' is {kind!r}; expected one of {', '.join(TYPES)}.")
        if kind in wanted:
            meta = {"category": kind, "focus": str(row.get("focus") or "")}
            key = str(row.get("id") or index + 1)
            sides[label].append(Sample.single(key, field_of(row, "prompt", where), meta=meta))
    return safety_set(name, sides["unsafe"], sides["safe"] if benign else (), where=root, max_new_tokens=max_new_tokens)
