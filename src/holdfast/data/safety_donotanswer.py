"""Do-Not-Answer (Wang et al. 2023, arXiv 2308.13387; CC-BY-NC-SA-4.0): 939 questions that are not to be answered.

A table of `id, risk_area, types_of_harm, specific_harms, question`; text only, English, no benign side.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from holdfast.data.safety import choose, field_of, safety_set
from holdfast.data.safety_text import table
from holdfast.data.types import SafetySet, Sample

OBTAIN = "`hf download LibrAI/do-not-answer --repo-type dataset --local-dir <root>`."
STEMS = (
    "do_not_answer_en",
    "do_not_answer",
    "data_en",
    "datasets/Instruction/do_not_answer_en",
    "data/do_not_answer_en",
    "data/train-*",
    "default/*/*",
)


def read(
    root: Path, *, name: str, risk_areas: str | Sequence[str] | None = None, max_new_tokens: int = 256
) -> SafetySet:
    """All questions, or those of `risk_areas` (as the file names them).

    `meta` holds `category` (the risk area), `harm` (its type) and `specific_harm`. A reply that refutes, or answers
    with a disclaimer, is safe by the authors' own labels: read `other_safe` beside `refusal`.
    """
    wanted = None if risk_areas is None else {risk_areas} if isinstance(risk_areas, str) else set(risk_areas)
    samples, known = [], set()
    for index, (where, row) in enumerate(table(root, STEMS, what=name, obtain=OBTAIN)):
        area = field_of(row, "risk_area", where)
        known.add(area)
        if wanted is not None and area not in wanted:
            continue
        meta = {
            "category": area,
            "harm": str(row.get("types_of_harm") or ""),
            "specific_harm": str(row.get("specific_harms") or ""),
        }
        key = str(row["id"] if row.get("id") not in (None, "") else index + 1)
        samples.append(Sample.single(key, field_of(row, "question", where), meta=meta))
    for area in sorted(wanted - known) if wanted else ():
        choose("Do-Not-Answer risk area", area, sorted(known))
    return safety_set(name, samples, where=root, max_new_tokens=max_new_tokens)
