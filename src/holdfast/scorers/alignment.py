"""Predictions meet their gold answers: by id or by order, nothing dropped in silence, then one figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from holdfast.errors import ConfigError, DataError
from holdfast.scorers.base import Missing, Score, Scorer
from holdfast.scorers.predictions import Gold, Prediction, PredictionFile, ReferenceFile

Align = Literal["auto", "id", "order"]


@dataclass(frozen=True, kw_only=True)
class ScoredItem:
    """One row of the outcome: the item, what was predicted, what it was worth and why."""

    id: str
    prediction: str | None
    references: tuple[str, ...]
    score: Score


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A scored prediction file.

    value: in 0..1 (captions may exceed it), None when nothing could be scored. n: items in the denominator.
    problems: kind -> names, only kinds that occurred: unknown (no such gold id), repeated (the same answer twice,
        counted once), conflicting (two different answers to one item: unscored), missing (gold without a prediction),
        without_text (rows that hold no answer).
    notes: what a reader of the number should know (alignment, mixed id types, empty answers, missing predictions).
    """

    scorer: str
    mode: str
    value: float | None
    n: int
    items: tuple[ScoredItem, ...]
    figures: Mapping[str, Any]
    problems: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """Plain data for a record: everything but the items."""
        return {
            "scorer": self.scorer,
            "mode": self.mode,
            "value": self.value,
            "n": self.n,
            "figures": dict(self.figures),
            "problems": {kind: {"count": len(names), "ids": list(names)} for kind, names in self.problems.items()},
            "notes": list(self.notes),
        }


def score_file(
    predictions: PredictionFile, references: ReferenceFile | None, scorer: Scorer, *, align: Align = "auto"
) -> Outcome:
    """Score a prediction file.

    A gold item without a prediction counts as wrong in strict mode; in paper mode it leaves the denominator, as in the
    published scripts, except for option letters by CoIN's and Prism's rule (wrong) and captions (an empty caption).
    Unknown ids do not count, except by SEFE's rule for option letters, which divides by the number of predictions.
    align: "id", "order" (item i with gold i), or "auto": by order where the published script does so (captions without
    image ids, rows without ids), else by id.
    Raises DataError: no gold answers anywhere; ConfigError: `align` cannot be done with these files.
    """
    notes = [f"{predictions.empty} answer(s) are empty"] if predictions.empty else []
    if predictions.mixed_ids:
        notes.append(f"ids mix numbers and strings ({', '.join(predictions.mixed_ids)}); compared as strings")
    problems: dict[str, list[str]] = {"without_text": list(predictions.without_text)}
    if references is None:
        pairs = _own_references(predictions)
    else:
        order = _by_order(predictions, references, align)
        notes.append(f"aligned with {references.path} by {'order' if order else 'id'}")
        pairs = _pair(predictions, references, order=order, problems=problems)
    return _score(pairs, scorer, problems, notes)


def _own_references(predictions: PredictionFile) -> list[tuple[Gold, list[Prediction]]]:
    lacking = [i for i, row in enumerate(predictions.rows) if not row.references]
    if len(lacking) == len(predictions.rows):
        raise DataError(
            f"{predictions.path} carries no gold answers; give them with --references FILE, or --stream and --task."
        )
    # Position names a row: rows that carry their own gold need no id, and a repeated one does no harm.
    return [
        (Gold(id=row.id or str(index), references=row.references, meta=row.meta), [row])
        for index, row in enumerate(predictions.rows)
    ]


def _by_order(predictions: PredictionFile, references: ReferenceFile, align: Align) -> bool:
    nameless = sum(row.id is None for row in predictions.rows)
    if align not in ("auto", "id", "order"):
        raise ConfigError(f"align is {align!r}; expected auto, id or order.")
    if align == "id" and nameless:
        raise ConfigError(
            f"{predictions.path}: {nameless} row(s) have no id and cannot be aligned by id; use --align order."
        )
    if align == "auto":
        if nameless and nameless < len(predictions.rows):
            raise ConfigError(
                f"{predictions.path}: {nameless} of {len(predictions.rows)} rows have no id; say --align order."
            )
        return bool(nameless) or (references.by_order and not predictions.by_image)
    return align == "order"


def _pair(
    predictions: PredictionFile, references: ReferenceFile, *, order: bool, problems: dict[str, list[str]]
) -> list[tuple[Gold, list[Prediction]]]:
    if order and predictions.without_text:
        raise DataError(
            f"{predictions.path}: {len(predictions.without_text)} row(s) hold no answer "
            f"({predictions.without_text[0]}), so the order cannot be trusted; give each row an id or an answer."
        )
    if order:
        golds = references.rows
        surplus = predictions.rows[len(golds) :]
        problems["unknown"] = [row.id or f"row {len(golds) + i + 1}" for i, row in enumerate(surplus)]
        return [
            (gold, [predictions.rows[index]] if index < len(predictions.rows) else [])
            for index, gold in enumerate(golds)
        ]
    by_id: dict[str, list[Prediction]] = {gold.id: [] for gold in references.rows}
    unknown: Counter[str] = Counter()
    for row in predictions.rows:
        name = str(row.id)
        if name in by_id:
            by_id[name].append(row)
        else:
            unknown[name] += 1
    problems["unknown"] = list(unknown.elements())
    return [(gold, by_id[gold.id]) for gold in references.rows]


def _score(
    pairs: list[tuple[Gold, list[Prediction]]], scorer: Scorer, problems: dict[str, list[str]], notes: list[str]
) -> Outcome:
    scored: list[tuple[Gold, Prediction]] = []
    others: dict[str, ScoredItem] = {}
    # A scorer of someone else's need not say; neither is needed to score answers that are there.
    absent: Missing = getattr(scorer, "missing", "wrong" if scorer.mode == "strict" else "left out")
    for kind in ("repeated", "conflicting", "missing"):
        problems[kind] = []
    for gold, rows in pairs:
        if not rows:
            problems["missing"].append(gold.id)
            if absent == "an empty caption":
                scored.append((gold, Prediction(id=gold.id, text="")))
            else:
                value = 0.0 if absent == "wrong" and gold.references else None
                others[gold.id] = _item(gold, None, Score(value=value, evidence="no prediction"))
            continue
        if len({row.text for row in rows}) > 1:
            problems["conflicting"].append(gold.id)
            reason = f"{len(rows)} predictions that differ: {rows[0].text!r:.60}, {rows[1].text!r:.60}"
            others[gold.id] = _item(gold, rows[0].text, Score(value=None, evidence=reason))
            continue
        if len(rows) > 1:
            problems["repeated"].append(gold.id)
        scored.append((gold, rows[0]))
    metas = [{**row.meta, **gold.meta, **_prompt(gold, row)} for gold, row in scored]
    value, scores, figures = scorer.aggregate(
        [row.text for _, row in scored], [gold.references for gold, _ in scored], metas
    )
    done = iter(_item(gold, row.text, score) for (gold, row), score in zip(scored, scores, strict=True))
    items = tuple(others[id_] if (id_ := gold.id) in others else next(done) for gold, _ in pairs)
    n = sum(item.score.value is not None for item in items)
    strangers = len(set(problems.get("unknown", ()))) if getattr(scorer, "counts_unknown", False) else 0
    if absent == "an empty caption":
        n = int(figures["scored"])
    elif others or strangers:
        values = [item.score.value for item in items if item.score.value is not None]
        n += strangers
        value = sum(values) / n if values else None
    if problems["missing"]:
        notes.append(f"{len(problems['missing'])} missing prediction(s) count as {absent}")
    if strangers:
        notes.append(f"{strangers} prediction(s) of no gold item count as wrong, as in the published script")
    return Outcome(
        scorer=scorer.name,
        mode=scorer.mode,
        value=value,
        n=n,
        items=items,
        figures=figures,
        problems={kind: tuple(names) for kind, names in problems.items() if names},
        notes=tuple(notes),
    )


def _item(gold: Gold, prediction: str | None, score: Score) -> ScoredItem:
    return ScoredItem(id=gold.id, prediction=prediction, references=gold.references, score=score)


def _prompt(gold: Gold, row: Prediction) -> dict[str, str]:
    """The prompt as it was asked; the gold file's own where the row has none."""
    prompt = row.prompt if row.prompt is not None else gold.meta.get("prompt")
    return {"prompt": prompt} if isinstance(prompt, str) else {}
