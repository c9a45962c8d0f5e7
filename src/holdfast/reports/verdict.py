"""What a report says first: in plain words what tuning cost, which method gave most back, and at what price."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from holdfast.reports.compare import Difference, Entry, Group, difference, figure_of, in_words
from holdfast.reports.tables import percent
from holdfast.reports.titles import TITLES, sentence_of, title_of

PLAIN = "seqft"
# A difference of rates below this is not a price that anybody would name.
_NOTICEABLE = 0.005
# What is compared pairwise -> whether more is better.
COMPARED = {"AP": True, "BWT": True, "MASR": False, "over-refusal": False}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two methods of a group, compared. figures: of COMPARED -> the difference, where both have it."""

    first: str
    second: str
    figures: dict[str, Difference]


def verdict(group: Group) -> list[str]:
    """Two or three sentences for a reader who knows no figure's name; fewer where a run has no safety set."""
    entries = [entry for entry in group.entries if entry.finished == max(e.finished for e in group.entries)]
    plain = next((entry for entry in entries if entry.method == PLAIN), None)
    lines = []
    if plain is not None:
        lines.append(f"Tuned plainly, this model {_what_it_does(plain, group)}.")
    others = [entry for entry in entries if entry is not plain]
    best = min(others, key=_shortfall) if others else None
    if best is not None and _shortfall(best) < float("inf"):
        lines.append(f"{best.title}: it {_what_it_does(best, group, start=plain is None)}{_price(best, plain)}.")
        if len(others) > 1:
            beside = "" if plain is None else " beside plain tuning"
            lines.append(
                f"Of the {len(others)} methods{beside}, {best.title} has the least sum of forbidden requests not "
                "refused, harmless ones refused and skill that is missing; the tables below show every method."
            )
    return lines


def _what_it_does(entry: Entry, group: Group, *, start: bool = True) -> str:
    parts = []
    masr, complied, ap = (figure_of(entry, name) for name in ("MASR", "complied", "AP"))
    if masr is not None:
        begun = [run.start["masr"] for run in group.runs if run.start["masr"] is not None]
        before = f" (before any task: {_of_100(sum(begun) / len(begun))})" if begun and start else ""
        text = f"does not refuse {_of_100(masr.value)} of 100 forbidden requests{before}"
        if complied is not None and masr.value - complied.value > _NOTICEABLE:
            text += f", of which {_of_100(complied.value)} get what they ask for"
        parts.append(text)
    if ap is not None:
        parts.append(f"scores {percent(ap.value, 0)} of 100 on its tasks")
    return ", and ".join(parts) if parts else "was not asked anything that has a figure"


def _price(entry: Entry, plain: Entry | None) -> str:
    """What it costs against plain tuning, in points; nothing where there is none to compare with."""
    if plain is None or entry.finished != plain.finished:
        return ""
    costs = []
    for name, words, sign in (
        ("AP", "of the tasks' score", -1),
        ("just learned", "of what a task scores when it is just learned", -1),
        ("over-refusal", "more harmless requests refused", 1),
    ):
        mine, theirs = figure_of(entry, name), figure_of(plain, name)
        if mine is None or theirs is None:
            continue
        cost = sign * (mine.value - theirs.value)
        if cost > _NOTICEABLE:
            costs.append(f"{percent(cost)} points {words}")
    if not costs:
        return ", at no price that these figures show"
    return ", at a price of " + (" and ".join(costs) if len(costs) < 3 else f"{', '.join(costs[:-1])} and {costs[-1]}")


def _shortfall(entry: Entry) -> float:
    """Not refused + harmless refused + skill missing, 0..3; infinite where nothing is known."""
    found = {name: figure_of(entry, name) for name in ("MASR", "over-refusal", "AP")}
    known = [1 - one.value if name == "AP" else one.value for name, one in found.items() if one is not None]
    return sum(known) if known else float("inf")


def _of_100(rate: float) -> str:
    shown = 100 * rate
    return "fewer than 1" if 0 < shown < 0.5 else f"{shown:.0f}"


def pairs(group: Group) -> list[Pair]:
    """Every method against every other that finished as many tasks."""
    found = []
    for second, first in combinations(group.entries, 2):
        if first.finished != second.finished or first.method == second.method:
            continue
        figures = {}
        for name, more_is_better in COMPARED.items():
            delta = difference(first, second, name)
            if delta is not None:
                figures[name] = in_words(delta, more_is_better=more_is_better)
        if figures:
            found.append(Pair(first=first.title, second=second.title, figures=figures))
    return found


def legend(names: Sequence[str]) -> list[tuple[str, str, str]]:
    """(title, code name, what it does) of each method, for a list under the table."""
    return [(title_of(name), name if name in TITLES else "", sentence_of(name)) for name in names]
