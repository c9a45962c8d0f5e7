"""Prediction and reference files of the field, as they are found: whatever is odd in them is counted and named.

Predictions: JSON lines `{"question_id", "prompt", "text", ...}` (all of LLaVA's descendants), `ans_gt.json`
`[{"pred", "ground_truth"}]`, COCO results `[{"image_id", "caption"}]`, GQA's `[{"questionId", "prediction"}]`, and the
rows that `holdfast evaluate` writes. References: in the prediction rows, a test file, `{"data": [...]}` (TextVQA), a
COCO caption file, or an object by id (GQA's questions, ScienceQA's problems).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.data.items import ANSWER_KEYS, answers, first, item_id
from holdfast.data.source_files import is_jsonl, read_json, read_records
from holdfast.data.types import Sample
from holdfast.errors import DataError

PREDICTION_KEYS = ("prediction", "pred", "caption", "text", "output", "response", "answer")
REFERENCE_KEYS = ("references", "ground_truth", "gt_answers", "gt", "gold")
PREDICTION_ID_KEYS = ("question_id", "questionId", "id", "image_id", "qid", "uid")
PROMPT_KEYS = ("prompt", "question")
# What scorers read beside the gold answer.
META_KEYS = ("image", "size", "choices", "source", "answer_type", "task")
LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One answer of a model. id: None where the row has none. references: () where the row carries no gold."""

    id: str | None
    text: str
    prompt: str | None = None
    references: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PredictionFile:
    """The usable rows of a prediction file, and what was odd in it.

    without_text: places of rows that hold no answer text (they count as missing). mixed_ids: some ids are numbers,
    some strings (they are compared as strings). empty: how many answers are blank. by_image: ids are COCO image ids.
    """

    path: Path
    rows: tuple[Prediction, ...]
    without_text: tuple[str, ...] = ()
    mixed_ids: tuple[str, ...] = ()
    empty: int = 0
    by_image: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Gold:
    """The gold answers of one item and what a scorer needs beside them."""

    id: str
    references: tuple[str, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ReferenceFile:
    """Gold answers in the order of their file. by_order: the published scripts tie predictions to them by position."""

    path: Path | str
    rows: tuple[Gold, ...]
    by_order: bool = False


def read_predictions(path: Path) -> PredictionFile:
    """Reads a prediction file. Raises DataError: missing, wrong encoding, no JSON, not a list of objects, empty."""
    items = read_records(path, keys=("predictions", "results"))
    if not items:
        raise DataError(f"{path} holds no prediction.")
    rows: list[Prediction] = []
    without: list[str] = []
    types: dict[str, str | None] = {}
    for index, item in enumerate(items):
        raw_id = first(item, PREDICTION_ID_KEYS)
        name = None if raw_id is None else item_id(item, index, PREDICTION_ID_KEYS)
        text = next((item[key] for key in PREDICTION_KEYS if key in item), None)
        if isinstance(text, int | float) and not isinstance(text, bool):
            text = str(text)
        if not isinstance(text, str):
            without.append(f"row {index + 1}" + (f" (id {name})" if name else ""))
            continue
        if raw_id is not None:
            types.setdefault("number" if isinstance(raw_id, int | float) else "string", name)
        prompt = first(item, PROMPT_KEYS)
        try:
            references = answers(first(item, REFERENCE_KEYS))
        except DataError as error:
            raise DataError(f"{path}, row {index + 1}: {error}.") from None
        meta: dict[str, Any] = {key: item[key] for key in (*META_KEYS, "type") if key in item}
        rows.append(Prediction(id=name, text=text, prompt=prompt, references=references, meta=meta))
    if not rows:
        keys = ", ".join(map(repr, items[0]))
        raise DataError(f"{path}: no row holds an answer under {', '.join(PREDICTION_KEYS)}; the first row has {keys}.")
    return PredictionFile(
        path=path,
        rows=tuple(rows),
        without_text=tuple(without),
        mixed_ids=tuple(str(name) for name in types.values()) if len(types) > 1 else (),
        empty=sum(not row.text.strip() for row in rows),
        by_image=all("image_id" in item for item in items),
    )


def read_references(path: Path) -> ReferenceFile:
    """Reads a file of gold answers. Raises DataError: an unknown shape, an item without id or twice the same id."""
    if not is_jsonl(path):
        data = read_json(path)
        if isinstance(data, Mapping):
            return _from_object(path, data)
        if not isinstance(data, list):
            raise DataError(f"{path}: expected a list or an object of gold answers, found {type(data).__name__}.")
    return _from_items(path, read_records(path))


def references_of(samples: Sequence[Sample], where: str) -> ReferenceFile:
    """The gold answers of a task's test samples (`--stream FILE --task NAME`)."""
    rows = [Gold(id=s.id, references=s.references, meta={"prompt": s.prompt, **s.meta}) for s in samples]
    return _checked(where, rows, by_order=False)


def _from_object(path: Path, data: Mapping[str, Any]) -> ReferenceFile:
    captions = data.get("annotations")
    if isinstance(captions, list) and captions and isinstance(captions[0], Mapping) and "caption" in captions[0]:
        from holdfast.data.captions import coco_captions

        by_image, _ = coco_captions(path)
        rows = [Gold(id=name, references=texts) for name, texts in by_image.items()]
        # Ids as numbers where they are: "10" comes after "9", as in the published scripts.
        rows.sort(key=lambda gold: (0, int(gold.id), "") if gold.id.isdigit() else (1, 0, gold.id))
        return _checked(path, rows, by_order=True)
    if isinstance(data.get("data"), list):
        return _from_items(path, read_records(path))
    if not all(isinstance(row, Mapping) for row in data.values()):
        raise DataError(f"{path}: expected gold answers by id, found the keys {', '.join(map(repr, list(data)[:5]))}.")
    wanted = _problem_ids(path, data)
    return _checked(path, [_gold(path, name, data[name]) for name in wanted], by_order=False)


def _problem_ids(path: Path, data: Mapping[str, Any]) -> Iterable[str]:
    """Ids of the test split where ScienceQA's pid_splits.json lies beside its problems; else all."""
    splits_path = path.with_name("pid_splits.json")
    if not splits_path.exists() or not all("choices" in row for row in data.values()):
        return data
    splits = read_json(splits_path)
    names = splits.get("test") if isinstance(splits, Mapping) else None
    if not isinstance(names, list):
        raise DataError(f"{splits_path} has no split 'test'.")
    lacking = [str(name) for name in names if str(name) not in data]
    if lacking:
        raise DataError(f"{path} lacks {len(lacking)} problem(s) of the test split, such as {lacking[0]!r}.")
    return [str(name) for name in names]


def _from_items(path: Path, items: Sequence[Mapping[str, Any]]) -> ReferenceFile:
    return _checked(path, [_gold(path, item_id(item, i), item) for i, item in enumerate(items)], by_order=False)


def _gold(path: Path, name: str, item: Mapping[str, Any]) -> Gold:
    value = first(item, ("answer_bbox", *REFERENCE_KEYS, *ANSWER_KEYS))
    meta: dict[str, Any] = {key: item[key] for key in (*META_KEYS, "isBalanced") if key in item}
    meta |= {"prompt": item["text"]} if isinstance(item.get("text"), str) else {}
    choices = item.get("choices")
    if isinstance(choices, list) and isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < min(len(choices), len(LETTERS)):
            raise DataError(f"{path}, id {name!r}: answer {value} of {len(choices)} choices.")
        value = LETTERS[value]
    if value is None and isinstance(item.get("conversations"), list) and item["conversations"]:
        value = item["conversations"][-1].get("value")
    try:
        return Gold(id=name, references=answers(value), meta=meta)
    except DataError as error:
        raise DataError(f"{path}, id {name!r}: {error}.") from None


def _checked(path: Path | str, rows: list[Gold], *, by_order: bool) -> ReferenceFile:
    if not rows:
        raise DataError(f"{path} holds no gold answer.")
    double = [name for name, count in Counter(row.id for row in rows).items() if count > 1]
    if double:
        shown = ", ".join(map(repr, double[:5]))
        raise DataError(
            f"{path}: {len(double)} id(s) occur twice: {shown}; a prediction could not be tied to one of them."
        )
    if not any(row.references for row in rows):
        raise DataError(f"{path}: no item holds a gold answer under {', '.join((*REFERENCE_KEYS, *ANSWER_KEYS))}.")
    return ReferenceFile(path=path, rows=tuple(rows), by_order=by_order)
