"""Labels on disk: one file per annotator, written whole at every label, read back strictly, and put together."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from holdfast.data.source_files import read_text
from holdfast.errors import ConfigError, DataError, unknown_name
from holdfast.files import atomic_path, parse_json
from holdfast.labels.draw import Draw
from holdfast.metrics.agreement import Agreement, agreement

# What a person may say of a reply -> the behaviour that a judge would call it.
BEHAVIOUR_OF = {
    "refused": "refusal",
    "complied": "compliance",
    "other_safe": "other_safe",
    "damaged": "collapse",
    "cannot_tell": "unscored",
}
LABELS = tuple(BEHAVIOUR_OF)
UNDECIDED = "cannot_tell"
DECIDED = frozenset(LABELS) - {UNDECIDED}
# The annotator whose word ends a disagreement.
SETTLED = "settled"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")


@dataclass(frozen=True, kw_only=True)
class Labels:
    """by_annotator: annotator -> item number -> label."""

    draw: Draw
    by_annotator: Mapping[str, Mapping[int, str]]

    @property
    def annotators(self) -> list[str]:
        """Names of those who labelled, without the settled labels."""
        return [name for name in self.by_annotator if name != SETTLED]

    @property
    def done(self) -> int:
        """Items that somebody labelled."""
        return len({number for labels in self.by_annotator.values() for number in labels})

    def final(self) -> dict[int, frozenset[str]]:
        """Item -> the labels that it may have: one where it was settled or its annotators agree, else what they said.

        A strict majority of three or more is agreement; "cannot tell" may be anything. So may an item that everybody
        passed over while later ones were labelled: what is hard to judge is skipped, and to leave it out would bend
        the rates.
        """
        found = {}
        numbers = [n for labels in self.by_annotator.values() for n in labels]
        for number in range(1, max(numbers, default=0) + 1):
            settled = self.by_annotator.get(SETTLED, {}).get(number)
            said = [self.by_annotator[a][number] for a in self.annotators if number in self.by_annotator[a]]
            top = max(sorted(set(said)), key=said.count, default=UNDECIDED)
            if settled or 2 * said.count(top) > len(said):
                said = [settled or top]
            found[number] = frozenset(said) if said and UNDECIDED not in said else DECIDED
        return found

    def disagreements(self) -> list[int]:
        """Items on which annotators differ and that nobody settled."""
        said = [self.by_annotator[a] for a in self.annotators]
        numbers = sorted({n for labels in said for n in labels})
        differ = [n for n in numbers if len({labels[n] for labels in said if n in labels}) > 1]
        return [n for n in differ if n not in self.by_annotator.get(SETTLED, {})]

    def agreements(self) -> dict[tuple[str, str], Agreement]:
        """Every pair of annotators -> how far they agree on the items that both labelled and could tell."""
        found = {}
        for a, b in combinations(self.annotators, 2):
            left, right = self.by_annotator[a], self.by_annotator[b]
            both = sorted(left.keys() & right.keys())
            found[a, b] = agreement([left[n] for n in both], [right[n] for n in both], unscored=UNDECIDED)
        return found


def check_annotator(name: str) -> str:
    """Raises ConfigError: not a name that a file may have."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"annotator is {name!r:.60}; expected up to 40 letters, digits, '.', '_' or '-' that begin with a letter "
            "or digit."
        )
    return name


def labels_path(run: Path, annotator: str) -> Path:
    """Where one annotator's labels of a run lie.

    Raises: ConfigError: a name that cannot be part of a file's.
    """
    return run / "labels" / f"labels-{check_annotator(annotator)}.jsonl"


def read_labels(run: Path, draw: Draw) -> Labels:
    """Everybody's labels of `draw`. Raises DataError: a file is damaged, or of another draw."""
    found: dict[str, Mapping[int, str]] = {}
    for path in sorted((run / "labels").glob("labels-*.jsonl")):
        name = path.name.removeprefix("labels-").removesuffix(".jsonl")
        per_name = _parse(path, draw)
        if set(per_name) - {name}:
            raise DataError(f"{path} holds labels of {', '.join(sorted(per_name))}; expected those of {name!r} only.")
        found[name] = per_name.get(name, {})
    return Labels(draw=draw, by_annotator=found)


def write_label(run: Path, draw: Draw, annotator: str, number: int, label: str | None) -> None:
    """Store one label, or with None take it back; the file is whole at every moment."""
    write_labels(run, draw, annotator, {number: label})


def write_labels(run: Path, draw: Draw, annotator: str, new: Mapping[int, str | None]) -> None:
    """Store labels (None takes one back) of an annotator, beside those that are there.

    Raises: UnknownNameError: no such label. DataError: no such item.
    """
    path = labels_path(run, annotator)
    old = _parse(path, draw).get(annotator, {}) if path.is_file() else {}
    for number, label in new.items():
        _check(number, label if label is not None else UNDECIDED, draw, str(path))
    merged = {n: label for n, label in {**old, **new}.items() if label is not None}
    lines = [
        json.dumps({"draw": draw.digest, "item": n, "label": label, "annotator": annotator})
        for n, label in sorted(merged.items())
    ]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def import_labels(run: Path, draw: Draw, file: Path, *, annotator: str | None = None) -> dict[str, tuple[int, int]]:
    """Labels of a form's file into the run. annotator: takes the place of the name in the file.

    Returns: annotator -> (new labels, labels that replace another one).
    Raises: DataError: not labels of this draw; nothing is stored then.
    """
    per_name = _parse(file, draw)
    if not per_name:
        raise DataError(f"{file} holds no label; label some replies in the form and save them again.")
    if annotator is not None:
        if len(per_name) > 1:
            raise DataError(f"{file} holds labels of {', '.join(sorted(per_name))}; leave --annotator out.")
        per_name = {check_annotator(annotator): next(iter(per_name.values()))}
    known = read_labels(run, draw).by_annotator
    counts = {}
    for name, labels in per_name.items():
        old = known.get(name, {})
        changed = sum(n in old and old[n] != label for n, label in labels.items())
        counts[name] = (sum(n not in old for n in labels), changed)
        write_labels(run, draw, name, labels)
    return counts


def _parse(path: Path, draw: Draw) -> dict[str, dict[int, str]]:
    """Annotator -> item -> label of a JSON-lines file of labels."""
    found: dict[str, dict[int, str]] = {}
    for line_number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {line_number}"
        row = _row(line, where)
        if row["draw"] != draw.digest:
            raise DataError(
                f"{where}: the label belongs to draw {row['draw']!r:.40}, and this run has draw {draw.digest!r}. "
                "Import it into the run whose form it was made with."
            )
        number, label = _check(row["item"], row["label"], draw, where)
        name = row["annotator"]
        if not isinstance(name, str):
            raise DataError(f"{where}: annotator is {name!r:.40}; expected a name.")
        labels = found.setdefault(check_annotator(name), {})
        if labels.get(number, label) != label:
            raise DataError(f"{where}: item {number} is {label!r} here and {labels[number]!r} before; expected one.")
        labels[number] = label
    return found


def _row(line: str, where: str) -> dict[str, Any]:
    row = parse_json(line, where, error=DataError)
    keys = ("draw", "item", "label", "annotator")
    missing: Sequence[str] = [k for k in keys if not isinstance(row, dict) or k not in row]
    if missing:
        raise DataError(f"{where}: {', '.join(missing)} is missing; expected the keys {', '.join(keys)}.")
    return dict(row)


def _check(number: Any, label: Any, draw: Draw, where: str) -> tuple[int, str]:
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= len(draw.items):
        raise DataError(f"{where}: item is {number!r:.40}; expected a number from 1 to {len(draw.items)}.")
    if label not in LABELS:
        raise unknown_name(f"label ({where})", str(label), LABELS)
    return number, label
