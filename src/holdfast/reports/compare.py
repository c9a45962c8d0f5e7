"""Runs of one configuration, side by side: a figure per method with its interval, and differences in words.

One run: intervals are bootstrapped over test samples. Several runs (seeds): mean and Student's t interval over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from holdfast.metrics.intervals import Interval, bootstrap, over_seeds
from holdfast.reports.read_runs import MethodView, RunView, labelled, safety_rows, step_folder, task_rows
from holdfast.reports.tables import Cell, Table, cells, interval, percent
from holdfast.reports.titles import title_of

Figure = Callable[[MethodView], float | None]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What stands in one row: a method after so many tasks, in every seed that got as far. views: seed -> its run's.

    label: its name in the run, with how far it got. title: what readers call it.
    """

    method: str
    label: str
    title: str
    views: dict[int, MethodView]

    @property
    def finished(self) -> int:
        """Number of tasks that were learned; the same for every seed."""
        return next(iter(self.views.values())).finished


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that may be averaged: one configuration, every seed once (`reports.seeds` puts them together).

    detail: what tells it from another group of this stream and condition. note: a sentence on why it stands alone.
    """

    stream: str
    condition: str
    runs: tuple[RunView, ...]
    detail: str = ""
    note: str = ""

    @property
    def title(self) -> str:
        """What its runs have in common, for a heading."""
        return ", ".join(part for part in (self.stream, self.condition, self.detail) if part)

    @property
    def entries(self) -> list[Entry]:
        """Methods in the order of the runs; one that did not get equally far in all seeds has a row for each length."""
        found: dict[str, dict[int, dict[int, MethodView]]] = {}
        for run in self.runs:
            for name, view in run.methods.items():
                found.setdefault(name, {}).setdefault(view.finished, {})[run.seed] = view
        return [
            self._entry(name, views) for name, lengths in found.items() for _, views in sorted(lengths.items())[::-1]
        ]

    def _entry(self, name: str, views: dict[int, MethodView]) -> Entry:
        seeds = f"{len(views)} of {len(self.runs)} seeds" if len(views) < len(self.runs) else ""
        progress = next(iter(views.values())).progress
        label, title = labelled(name, progress, seeds), labelled(title_of(name), progress, seeds)
        return Entry(method=name, label=label, title=title, views=views)


def figure_of(entry: Entry, figure: str) -> Interval | None:
    """A figure of a row, over its seeds; None where any of them lacks it."""
    key, value = FIGURES[figure]
    views = list(entry.views.values())
    numbers = [v for v in (value(view) for view in views) if v is not None]
    if not numbers or len(numbers) < len(views):
        return None
    if len(numbers) > 1:
        return over_seeds(numbers)
    found = views[0].interval(key)
    return found or Interval(value=numbers[0], low=math.nan, high=math.nan, n=1, level=0.95, kind="single")


def _plain(key: str) -> tuple[str, Figure]:
    return key, lambda view: view.figure(key)


# What a table shows -> (key in the summary, its value)
FIGURES: dict[str, tuple[str, Figure]] = {
    "AP": _plain("ap"),
    "BWT": _plain("bwt"),
    "just learned": _plain("mft"),
    "MASR": _plain("masr"),
    "complied": _plain("compliance_mean"),
    "collapsed": _plain("collapse_mean"),
    "DASR": _plain("dasr"),
    "over-refusal": _plain("over_refusal"),
    "helpful": _plain("helpful"),
}
# The same figures of the model before any task, where they are defined for it.
_START = {"MASR": "masr", "complied": "compliance_mean", "collapsed": "collapse_mean"} | {
    "over-refusal": "over_refusal",
    "helpful": "helpful",
}


def result_table(group: Group) -> Table:
    """One row per method; first the model before any task."""
    heads = ["method", *FIGURES, "unscored", "train s", "edit s"]
    rows = [_start_row(group, heads)]
    for entry in group.entries:
        views = entry.views.values()
        row: list[str | Cell] = [entry.label]
        for name in FIGURES:
            found = figure_of(entry, name)
            worst = _worst_case(entry, name)
            if found is None:
                row.append(Cell(text="–", note=worst))
            elif found.kind == "seeds":
                row.append(
                    Cell(
                        text=f"{percent(found.value)} ± {percent(found.std)}",
                        note=_notes(interval(found.low, found.high), worst),
                    )
                )
            else:
                row.append(Cell(text=percent(found.value), note=_notes(interval(found.low, found.high), worst)))
        row.append(str(sum(sum(view.figures["unscored"].values()) for view in views)))
        for phase in ("train", "end"):
            row.append(f"{sum(v.figures['seconds'].get(phase, 0.0) for v in views) / len(views):.0f}")
        rows.append(cells(row))
    return Table(heads=tuple(heads), rows=tuple(rows), caption=f"{group.title}, after the last task, in percent")


def titled_table(group: Group) -> Table:
    """`result_table` as a page shows it: methods by their titles, safety beside skill, and no column of nothing."""
    plain = result_table(group)
    order = [plain.heads[0], *(h for h in _PAGE_ORDER if h in plain.heads)]
    order += [head for head in plain.heads if head not in order]
    places = [plain.heads.index(head) for head in order]
    titles = ["Before any task", *(entry.title for entry in group.entries)]
    rows = []
    for title, row in zip(titles, plain.rows, strict=True):
        rows.append((Cell(text=title), *(row[place] for place in places[1:])))
    return Table(heads=tuple(PAGE_HEADS.get(head, head) for head in order), rows=tuple(rows))


# On a page what is safe stands beside what is skilled, because neither is read alone.
_PAGE_ORDER = ("AP", "BWT", "MASR", "over-refusal", "just learned", "complied", "collapsed", "DASR", "helpful")
PAGE_HEADS = {"train s": "training, s", "edit s": "edit, s", "MASR": "not refused (MASR)", "DASR": "since start (DASR)"}
SAFETY_HEADS = ("MASR", PAGE_HEADS["MASR"], "over-refusal", "complied", "collapsed", PAGE_HEADS["DASR"], "helpful")


def _worst_case(entry: Entry, figure: str) -> str:
    """What a safety figure could be whatever the unscored replies are, mean over the seeds; nothing where none is."""
    found = [view.bounds(FIGURES[figure][0]) for view in entry.views.values()]
    if all(pair is None for pair in found):
        return ""
    values = [FIGURES[figure][1](view) for view in entry.views.values()]
    low = [pair[0] if pair else value for pair, value in zip(found, values, strict=True)]
    high = [pair[1] if pair else value for pair, value in zip(found, values, strict=True)]
    if any(v is None for v in [*low, *high]):
        return ""
    return f"worst case {interval(sum(v or 0.0 for v in low) / len(low), sum(v or 0.0 for v in high) / len(high))}"


def _notes(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _start_row(group: Group, heads: Sequence[str]) -> tuple[Cell, ...]:
    def mean(values: Sequence[float | None]) -> str:
        known = [v for v in values if v is not None]
        return percent(sum(known) / len(known)) if known and len(known) == len(values) else "–"

    row = dict.fromkeys(heads, "–")
    row["method"] = "before any task"
    for head, key in _START.items():
        row[head] = mean([run.start[key] for run in group.runs])
    return cells([row[head] for head in heads])


def difference(entry: Entry, baseline: Entry, figure: str) -> Interval | None:
    """`entry` minus `baseline`, of one group, in AP, BWT, MASR or over-refusal, with a paired interval.

    None where one of them lacks the figure, they have no seed in common or have not finished the same tasks.
    """
    key, value = FIGURES[figure]
    pairs = [(view, baseline.views[seed]) for seed, view in entry.views.items() if seed in baseline.views]
    if not pairs or entry.finished != baseline.finished:
        return None
    deltas = []
    for a, b in pairs:
        left, right = value(a), value(b)
        if left is None or right is None:
            return None
        deltas.append(left - right)
    if len(deltas) > 1:
        return over_seeds(deltas)
    return _paired(*pairs[0], key)


def _paired(a: MethodView, b: MethodView, key: str) -> Interval | None:
    last = a.finished - 1
    groups: list[list[list[float]]] = []
    if key == "masr":
        for name in a.safety_sets:
            left, right = (_labels(v, name, last) for v in (a, b))
            groups.append([[left[i], right[i]] for i in left if i in right])
    elif key == "over_refusal":
        for name in a.safety_sets:
            left, right = (_refused_twins(v, name, last) for v in (a, b))
            if left or right:
                groups.append([[left[i], right[i]] for i in left if i in right])
    elif key in ("ap", "bwt"):
        for j, task in enumerate(a.tasks if key == "ap" else a.tasks[:-1]):
            final = [_values(v, task, last) for v in (a, b)]
            start = [_values(v, task, j) if key == "bwt" else {} for v in (a, b)]
            ids = [i for i in final[0] if i in final[1] and (key == "ap" or all(i in s for s in start))]
            groups.append([[f[i] - s.get(i, 0.0) for f, s in zip(final, start, strict=True)] for i in ids])
    if not groups or not all(groups):
        return None
    return bootstrap(groups, lambda means: np.mean([m[:, 0] - m[:, 1] for m in means], axis=0))


def _values(view: MethodView, task: str, step: int) -> dict[str, float]:
    rows = task_rows(step_folder(view, step), task)
    return {str(r["id"]): float(r["value"]) for r in rows if isinstance(r.get("value"), int | float)}


def _labels(view: MethodView, name: str, step: int) -> dict[str, float]:
    rows = safety_rows(step_folder(view, step), name)
    scored = [r for r in rows if r.get("side") == "unsafe" and r.get("label") in ("safe", "unsafe")]
    return {str(r["id"]): float(r["label"] == "unsafe") for r in scored}


def _refused_twins(view: MethodView, name: str, step: int) -> dict[str, float]:
    rows = [r for r in safety_rows(step_folder(view, step), name) if r.get("side") == "benign"]
    scored = [r for r in rows if r.get("behaviour") not in (None, "unscored")]
    return {str(r["id"]): float(r["behaviour"] == "refusal") for r in scored}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One figure of a pair of methods: first minus second, in points, with its interval. word: better, worse, ..."""

    text: str
    bounds: str
    word: str


def in_words(delta: Interval, *, more_is_better: bool) -> Difference:
    """A difference as people read it; one whose interval holds 0, or says nothing, is none that is clear."""
    bounds = interval(delta.low, delta.high)
    if not bounds:
        word = "one seed"
    elif not delta.leaves_out_zero:
        word = "no clear difference"
    else:
        word = "better" if (delta.value > 0) == more_is_better else "worse"
    return Difference(text=f"{'+' if delta.value >= 0 else ''}{percent(delta.value)}", bounds=bounds, word=word)


def findings(group: Group) -> list[str]:
    """What the numbers say, method by method against the first one; a difference within its interval is called so."""
    lines = []
    first, *others = group.entries
    begun = [run for run in group.runs if run.seed in first.views]
    start = [run.start["masr"] for run in begun if run.start["masr"] is not None]
    shown = {name: figure_of(first, name) for name in FIGURES}
    parts = []
    if shown["AP"] and shown["BWT"]:
        parts.append(
            f"keeps {percent(shown['AP'].value)} % on its tasks (backward transfer {percent(shown['BWT'].value)})"
        )
    if shown["MASR"] and start:
        split = ""
        if shown["complied"] and shown["collapsed"]:
            split = f" ({percent(shown['complied'].value)} complied, {percent(shown['collapsed'].value)} collapsed)"
        parts.append(
            f"does not refuse {percent(shown['MASR'].value)} % of forbidden requests{split}; "
            f"before any task it was {percent(sum(start) / len(start))} %"
        )
    if parts:
        lines.append(f"{first.label}: after its last task it " + " and ".join(parts) + ".")
    for entry in others:
        if entry.method == first.method:
            continue
        same = [e for e in group.entries if e.method == first.method and e.finished == entry.finished]
        if not same:
            lines.append(f"{entry.label} is not compared with {first.label}: they finished different numbers of tasks.")
            continue
        words = []
        for name, better_is_up in (("AP", True), ("BWT", True), ("MASR", False)):
            delta = difference(entry, same[0], name)
            if delta is None:
                continue
            found = in_words(delta, more_is_better=better_is_up)
            words.append(f"{name} {found.text} points [{found.bounds}] ({found.word})")
        if words:
            lines.append(f"{entry.label} against {same[0].label}: " + ", ".join(words) + ".")
    return lines
