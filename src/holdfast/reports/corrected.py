"""The judge's rates beside those that people's labels give, or what is known of the judge's error without labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.labels import Correction, correct
from holdfast.labels.draw import THETA_0
from holdfast.metrics.corrected import CorrectedRate
from holdfast.reports import measured
from holdfast.reports.compare import Group
from holdfast.reports.read_runs import RunView
from holdfast.reports.tables import Cell, Table, cells, interval, percent

# What a row is called -> the judge's key in the summary, and the side and figure of a correction.
_ROWS: dict[str, tuple[str, str, str]] = {
    "attack success": ("masr", "unsafe", "asr"),
    "complied": ("compliance_mean", "unsafe", "compliance"),
    "collapsed": ("collapse_mean", "unsafe", "collapse"),
    "over-refusal": ("over_refusal", "benign", "over_refusal"),
    "helpful": ("helpful", "benign", "helpful"),
}
NOTE = (
    "Raw: what the judge says of every reply. Corrected: what people say, estimated from the labelled replies and the "
    "judge's verdicts on all of them, with the 95 % interval of that draw. For people, attack success is a reply that "
    "complied; the raw figure follows the judge's own rule and may count collapsed replies too. Replies that people "
    "could not tell, or on which they differ, are counted both ways in the interval."
)


def corrections(group: Group) -> list[tuple[RunView, Correction]]:
    """The runs of a group that have labels, with their corrected rates."""
    found = ((run, correct(path)) for run in group.runs for path in (run.path, *run.others))
    return [(run, correction) for run, correction in found if correction is not None]


def correction_table(run: RunView, correction: Correction, *, only: str | None = None) -> Table:
    """Raw and corrected side by side, a row per method (or `only` one) and figure."""
    rows = []
    for name, figures in correction.methods.items():
        if only not in (None, name):
            continue
        raw: Mapping[str, Any] = run.start if name == THETA_0 else run.methods[name].figures
        label = "before any task" if name == THETA_0 else run.methods[name].label
        for head, (key, side, figure) in _ROWS.items():
            rate = figures.get(side, {}).get(figure)
            if rate is None:
                continue
            bounds = raw.get("bounds", {}).get(key)
            worst = f"worst case {interval(*bounds)}" if bounds and bounds[1] - bounds[0] > 1e-9 else ""
            rows.append(
                cells([f"{label}: {head}", Cell(text=percent(raw.get(key)), note=worst), _cell(rate), _count(rate)])
            )
    return Table(
        heads=("method: figure", "raw (the judge)", "corrected (people)", "labels"),
        rows=tuple(rows),
        caption=f"{run.stream}: the judge's rates and the corrected ones, in percent",
    )


def about(run: RunView, correction: Correction) -> list[str]:
    """Sentences on the labels: whose, how many, how far people agree, and what is left out."""
    labels = correction.labels
    people = ", ".join(f"{name} ({len(found)})" for name, found in labels.by_annotator.items())
    lines = [f"{labels.done} of {len(labels.draw.items)} drawn replies are labelled, by {people}."]
    for (a, b), found in labels.agreements().items():
        plain = found.to_json()
        kappa = "not defined" if plain["kappa"] is None else f"{found.kappa:.2f}"
        if found.n:
            lines.append(
                f"{a} and {b} agree on {percent(found.raw, 0)} % of {found.n} replies (Cohen's kappa {kappa})."
            )
    if differ := labels.disagreements():
        lines.append(f"{len(differ)} replies have different labels that nobody settled yet.")
    if missing := [view.label for name, view in run.methods.items() if name not in labels.draw.steps]:
        lines.append(f"Without labels, and so not corrected: {', '.join(missing)}.")
    return [*lines, *correction.left_out]


def findings(group: Group, found: list[tuple[RunView, Correction]]) -> list[str]:
    """For the top of a report: the corrected attack success, or that nothing was corrected and how wrong a judge is."""
    lines = []
    for run, correction in found:
        parts = []
        for name, figures in correction.methods.items():
            rate = figures.get("unsafe", {}).get("asr")
            raw = run.start["masr"] if name == THETA_0 else run.methods[name].figure("masr")
            if rate is not None:
                cell = _cell(rate)
                parts.append(f"{name} {percent(raw)} % by the judge, {cell.text} % by people [{cell.note}]")
        which = f" (seed {run.seed})" if len(group.runs) > 1 else ""
        if parts:
            lines.append(f"Attack success, raw and corrected by labels{which}: " + "; ".join(parts) + ".")
    bare = [run for run in group.runs if run not in [labelled for labelled, _ in found]]
    for judge in dict.fromkeys(judge for run in bare for judge in judges_of(run)):
        lines.append(uncorrected(judge))
    return lines


def uncorrected(judge: str) -> str:
    """The sentence beside figures that are a judge's own."""
    return (
        f"Safety figures are raw, as the judge {judge!r} gives them: {measured.sentence(judge)} "
        "`holdfast label RUN` corrects them by your own labels."
    )


def judges_of(run: RunView) -> list[str]:
    """The judges whose verdicts the run's safety figures are."""
    records = [run.theta_0, *(record for view in run.methods.values() for record in view.records)]
    return sorted({str(row["judge"]) for record in records for row in record.safety.values() if "judge" in row})


def _cell(rate: CorrectedRate) -> Cell:
    bounds = interval(rate.low, rate.high)
    return Cell(text=percent(rate.value), note=bounds) if rate.enough else Cell(text="too few labels", note=bounds)


def _count(rate: CorrectedRate) -> Cell:
    open_ = rate.undecided
    return Cell(text=f"{rate.n} of {rate.population}", note=f"{open_:.0f} open" if round(open_) else "")
