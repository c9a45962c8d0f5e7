"""Run directories -> report.html, PNGs and tables. One call, no network, no model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from holdfast.data.names import slug
from holdfast.errors import RunError
from holdfast.files import atomic_path
from holdfast.labels import Correction
from holdfast.reports import corrected, figures, theme
from holdfast.reports.compare import PAGE_HEADS, SAFETY_HEADS, Group, figure_of, findings, result_table, titled_table
from holdfast.reports.read_runs import (
    MethodView,
    NothingFinishedError,
    Rows,
    RunView,
    behaviour,
    load_run,
    read_rows,
    step_folder,
)
from holdfast.reports.sample_pages import samples
from holdfast.reports.seeds import group_runs
from holdfast.reports.tables import Cell, Table
from holdfast.reports.templates import template
from holdfast.reports.verdict import COMPARED, legend, pairs, verdict
from holdfast.text import visible
from holdfast.version import __version__

_Interval = tuple[float, float, float]

# For the end of the page: every word of its tables and pictures, in a sentence.
WORDS = (
    ("AP, average performance:", "mean score over all tasks after the last one; higher is better."),
    (
        "BWT, backward transfer:",
        "what later tasks did to earlier ones: score now minus score when just learned, mean over all tasks but "
        "the last; negative means forgetting.",
    ),
    (
        "Just learned:",
        "mean of each task's score right after it was learned; low means that little was learned to begin with.",
    ),
    (
        "Not refused (MASR, mean attack success rate):",
        "share of forbidden requests that were not refused, mean over the safety sets; complied plus collapsed.",
    ),
    ("Complied:", "share of forbidden requests that got what they asked for: harm done."),
    ("Collapsed:", "share with a damaged reply, such as a loop or another task's format."),
    ("Since the start (DASR):", "not refused now, minus not refused before any task."),
    (
        "Over-refusal:",
        "share of harmless requests that look like the forbidden ones and were refused: safety at too high a price.",
    ),
    ("Helpful:", "share of those harmless requests that were answered."),
    ("Unscored:", "replies that nobody could score; they are in no rate."),
)


@dataclass(frozen=True, kw_only=True)
class ReportFiles:
    """What was written."""

    html: Path
    pngs: tuple[Path, ...] = ()
    tables: tuple[Path, ...] = ()
    lines: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Picture:
    """figure: what the PNG shows. parts: (what it shows, sentence, figure) of what the page shows instead, one by one.

    folded: shown on request.
    """

    slug: str
    title: str
    text: str
    figure: Figure
    caption: str = ""
    parts: tuple[tuple[str, str, Figure], ...] = ()
    folded: bool = False


def write_report(runs: Sequence[Path | str], out: Path | str | None = None, *, title: str | None = None) -> ReportFiles:
    """Write `report.html` (one self-contained file), `figures/*.png`, `table.md` and `table.tex`.

    Args:
        runs: run directories. Those that differ in nothing but the seed are averaged, others shown one by one.
        out: folder to write to; by default the run's own.
        title: heading of the page.

    Raises: RunError: a folder is no run, no folder has a finished task, or one is given twice.
    """
    if not runs:
        raise RunError("No run directory given; name at least one folder written by `holdfast run` or `holdfast demo`.")
    paths = [Path(p) for p in runs]
    if len({p.resolve() for p in paths}) < len(paths):
        raise RunError("A run directory is given twice; averaging a run with itself would fake a smaller interval.")
    views, unfinished = _finished(paths)
    groups = group_runs(views)
    target = Path(out) if out is not None else views[0].path

    pages, pngs, tables, lines = [], [], [], []
    markdown, latex = [], []
    notes = list(unfinished)
    lines += unfinished
    for number, group in enumerate(groups):
        prefix = f"{number + 1}-{_slug(group.condition)}-" if len(groups) > 1 else ""
        shown = []
        for picture in _pictures(group):
            name = f"{prefix}{picture.slug}"
            path = target / "figures" / f"{name}.png"
            _publish(path, theme.png(picture.figure))
            pngs.append(path)
            parts = picture.parts or ((picture.title, "", picture.figure),)
            drawn = [
                {"text": text, "svg": theme.svg(figure, f"{alt}. {picture.text}", f"g{number}-{picture.slug}-{n}")}
                for n, (alt, text, figure) in enumerate(parts)
            ]
            shown.append(
                {"title": picture.title, "text": picture.text, "caption": picture.caption}
                | {"parts": drawn, "folded": picture.folded}
            )
        table = result_table(group)
        markdown.append(f"### {group.title}\n\n{table.markdown()}")
        latex.append(table.latex())
        notes += [group.note] if group.note else []
        lines += [group.note] if group.note else []
        labelled = corrected.corrections(group)
        plain, judged = verdict(group), corrected.findings(group, labelled)
        notes += [f"{group.title}: {line}" if len(groups) > 1 else line for line in judged]
        said = [*plain, *findings(group), *judged]
        lines += [f"{group.title}: {line}" if len(groups) > 1 else line for line in said]
        blocks = [_correction(run, found) for run, found in labelled]
        for block in blocks:
            markdown.append(f"#### {block['title']}\n\n{block['table'].markdown()}")
            latex.append(block["table"].latex())
        pages.append(
            {
                "slug": f"{number}-{_slug(group.title)}",
                "title": group.title,
                "verdict": plain,
                "table": titled_table(group),
                "safety_heads": SAFETY_HEADS,
                "legend": legend(list(dict.fromkeys(entry.method for entry in group.entries))),
                "pairs": _pairs_table(group),
                "table_note": _table_note(group),
                "corrections": blocks,
                "figures": shown,
                "samples": samples(group.runs[0]),
                "samples_note": (
                    "For each task and each safety set: the first test sample on which the answers below differ. "
                    "Answers are those after the last task that each method finished."
                ),
            }
        )
    seeds = max(len(group.runs) for group in groups)
    page = template("report.html.j2").render(
        title=title or f"{groups[0].stream}: what tuning cost and what was kept",
        subtitle=_subtitle(groups),
        notes=list(dict.fromkeys(notes)),
        words=WORDS,
        groups=pages,
        runs=[_run_block(run) for run in views],
        version=__version__,
        interval_note=(
            "Student's t over the seeds (95 %), and 95 % bootstraps over the test samples where one run stands alone."
            if seeds > 1
            else "95 % bootstraps over the test samples of one run."
        ),
    )
    html = target / "report.html"
    # Names and replies are data: what would act in a viewer of the source is written out.
    _publish(html, visible(page).encode("utf-8", "replace"))
    for name, text in (("table.md", "\n".join(markdown)), ("table.tex", "\n".join(latex))):
        _publish(target / name, text.encode("utf-8", "replace"))
        tables.append(target / name)
    return ReportFiles(html=html, pngs=tuple(pngs), tables=tuple(tables), lines=tuple(lines))


def _finished(paths: Sequence[Path]) -> tuple[list[RunView], list[str]]:
    """Runs with a finished task, and a sentence for each of the others. Raises: RunError: there are others only."""
    views, unfinished = [], []
    for path in paths:
        try:
            views.append(load_run(path))
        except NothingFinishedError as error:
            if len(paths) == 1:
                raise
            unfinished.append(f"Left out: {error}")
    if not views:
        raise RunError(f"None of the {len(paths)} folders has a finished task yet. " + " ".join(unfinished[:3]))
    return views, unfinished


def _pictures(group: Group) -> list[_Picture]:
    run = group.runs[0]
    note = "" if len(group.runs) == 1 else f"Seed {run.seed}; the table above averages {len(group.runs)} seeds."
    found = [
        _Picture(
            slug="bars",
            title="Skills and safety after the last task",
            text=(
                "Higher is better for AP (average performance) and BWT (backward transfer, below zero: forgetting), "
                "lower for MASR (forbidden requests not refused) and over-refusal."
            ),
            figure=figures.bars({name: found for name in COMPARED if (found := _bars(group, name))}),
            caption="Thin lines are 95 % intervals.",
        )
    ]
    found += _price(group)
    matrices = {view.title: view.matrix for view in run.methods.values() if view.finished > 1}
    if matrices:
        found.append(
            _Picture(
                slug="accuracy",
                title="What was remembered",
                text=(
                    "Each row is the model after one more task, each column a task, each number its score in percent; "
                    "read a column downwards to see a task forgotten."
                ),
                figure=figures.accuracy_matrices(matrices, run.tasks),
                parts=tuple(
                    (f"Scores of {name} after each task", "", figures.accuracy_matrices({name: matrix}, run.tasks))
                    for name, matrix in matrices.items()
                ),
                caption=note,
            )
        )
    if any(v is not None for view in run.methods.values() for v in view.along("masr")):
        found += _safety_pictures(group, note)
    for name, view in run.methods.items():
        if view.edits and any(key in row for row in view.edits[-1][1] for key in ("overlap", "alpha")):
            task, rows = view.edits[-1]
            found.append(
                _Picture(
                    slug=f"edit-{_slug(name)}",
                    title=f"Where {view.title} edited the model",
                    text=(
                        f"Every edited linear layer of the language model after the last task ({task}): decoder blocks "
                        "from left to right, kinds of layers from top to bottom."
                    ),
                    figure=figures.edit_map(rows),
                    parts=tuple(
                        (figures.EDIT_PANELS[key], figures.EDIT_WORDS[key], figures.edit_map(rows, [key]))
                        for key in figures.edit_panels(rows)
                    ),
                    caption=note,
                    folded=True,
                )
            )
        found += _routing(view, note)
    return found


def _safety_pictures(group: Group, note: str) -> list[_Picture]:
    run = group.runs[0]
    shares = {}
    if run.theta_0.safety:
        shares["before any task"] = _behaviour_mean([behaviour(run.theta_0) for run in group.runs])
    shares |= {e.title: _behaviour_mean([view.behaviour for view in e.views.values()]) for e in group.entries}
    found = [
        _Picture(
            slug="behaviour",
            title="What became of refusals",
            text=(
                "Replies to forbidden requests after the last task. Compliance is harm; other safe is a reply that "
                "corrects or advises instead; collapse is a damaged one, such as another task's format. Published "
                "tables count compliance and collapse as attack success."
            ),
            figure=figures.behaviour(shares),
        ),
    ]
    found += _along(
        run,
        "masr",
        "not refused",
        slug="attack-success",
        title="Attack success along the stream",
        text="Mean over the safety sets of the share of forbidden requests that were not refused.",
        caption=note,
    )
    found += _along(
        run,
        "over_refusal",
        "harmless and refused",
        slug="over-refusal",
        title="Over-refusal along the stream",
        text="Share of harmless twins of the forbidden requests that were refused: safety at too high a price.",
        caption=note,
    )
    return found


def _along(run: RunView, key: str, axis: str, *, slug: str, title: str, text: str, caption: str) -> list[_Picture]:
    """The picture of a figure step by step; none where it was asked after one step alone, as the table has that."""
    lines = {view.title: view.along(key) for view in run.methods.values()}
    if max((sum(value is not None for value in line) for line in lines.values()), default=0) < 2:
        return []
    figure = figures.along_stream(lines, run.tasks, axis, reference=run.start[key])
    return [_Picture(slug=slug, title=title, text=text, figure=figure, caption=caption)]


def _behaviour_mean(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    return {kind: sum(p[kind] for p in parts) / len(parts) for kind in parts[0]}


def _routing(view: MethodView, note: str) -> list[_Picture]:
    """The routing map, where the evaluator wrote down which adapters answered which set of requests."""
    folder = step_folder(view, view.finished - 1) / "predictions"
    mass: dict[str, dict[str, float]] = {}
    for path in sorted(folder.glob("routing-*.jsonl")):
        asked = path.stem.removeprefix("routing-").removeprefix("task-").removeprefix("safety-")
        mass[asked] = _routing_mass(read_rows(path))
    if not mass:
        return []
    order = [name for name in view.tasks if name in mass] + [name for name in mass if name not in view.tasks]
    experts = list(dict.fromkeys(e for name in order for e in mass[name]))
    return [
        _Picture(
            slug=f"routing-{_slug(view.name)}",
            title=f"Which expert of {view.title} answered what",
            text="Mean routing mass over the test requests of each task and safety set; no task id was given.",
            figure=figures.routing_map([[mass[n].get(e, 0.0) for e in experts] for n in order], order, experts),
            caption=note,
        )
    ]


def _routing_mass(rows: Rows) -> dict[str, float]:
    """Mean weight of each expert; a request that the base answered alone counts for `base alone`."""
    total: dict[str, float] = {}
    for row in rows:
        shares = {"base alone": 1.0} if row.get("abstained") else dict(row["weights"])
        for expert, share in shares.items():
            total[expert] = total.get(expert, 0.0) + float(share)
    alone = total.pop("base alone", 0.0)
    ordered = total | ({"base alone": alone} if alone else {})
    return {expert: value / len(rows) for expert, value in ordered.items()}


def _bars(group: Group, name: str) -> dict[str, _Interval]:
    found = {}
    for entry in group.entries:
        figure = figure_of(entry, name)
        if figure is not None:
            found[entry.title] = (figure.value, figure.low, figure.high)
    return found


def _price(group: Group) -> list[_Picture]:
    """Skill against safety, a point per method; where both are known of two methods or more."""
    points = {}
    for entry in group.entries:
        masr, ap = figure_of(entry, "MASR"), figure_of(entry, "AP")
        if masr is not None and ap is not None:
            points[entry.title] = (masr.value, ap.value)
    if len(points) < 2:
        return []
    return [
        _Picture(
            slug="price",
            title="What safety costs in skill",
            text="Up and to the left is better: tasks done well, and forbidden requests refused.",
            figure=figures.price(points, xlabel="forbidden requests not refused", ylabel="AP, score over all tasks"),
        )
    ]


def _pairs_table(group: Group) -> Table | None:
    rows = []
    for pair in pairs(group):
        row = [Cell(text=f"{pair.first} minus {pair.second}")]
        for name in COMPARED:
            found = pair.figures.get(name)
            tone = {"better": "good", "worse": "bad"}.get(found.word, "") if found else ""
            note = (
                " ".join(part for part in (f"[{found.bounds}]" if found.bounds else "", found.word) if part)
                if found
                else ""
            )
            row.append(Cell(text=found.text if found else "–", note=note, tone=tone))
        rows.append(tuple(row))
    heads = ("pair", *(PAGE_HEADS.get(name, name) for name in COMPARED))
    return Table(heads=heads, rows=tuple(rows)) if rows else None


def _table_note(group: Group) -> str:
    how = (
        f"Mean ± standard deviation over {len(group.runs)} seeds; below it the 95 % t interval of the mean. A row of "
        "fewer seeds says so; of a single one it shows the 95 % bootstrap interval over test samples."
        if len(group.runs) > 1
        else "Below each figure its 95 % bootstrap interval over test samples; one seed: training noise is not in it."
    )
    return (
        "All in percent, but for seconds, which are those of the machine that made the run. MASR: share of forbidden "
        "requests not refused, mean over the safety sets; it is the sum of "
        f"complied and collapsed. DASR: its change since before any task. Over-refusal: harmless twins "
        f"refused; helpful: harmless twins answered. {how} Unscored replies are in no rate; where there are some, the "
        "worst case says what the rate could be whatever they are."
    )


def _correction(run: RunView, correction: Correction) -> dict[str, Any]:
    return {
        "title": f"The judge and people: {run.path.name}",
        "note": corrected.NOTE,
        "table": corrected.correction_table(run, correction),
        "about": corrected.about(run, correction),
    }


def _subtitle(groups: Sequence[Group]) -> str:
    run = groups[0].runs[0]
    tasks = " → ".join(run.tasks)
    return f"{len(run.tasks)} tasks, one after another: {tasks}."


def _run_block(run: RunView) -> dict[str, Any]:
    versions = ", ".join(f"{k} {v}" for k, v in run.versions.items())
    done = ", ".join(f"{name} {view.finished}/{len(run.tasks)} tasks" for name, view in run.methods.items())
    return {
        "path": run.path.name,
        "line": f"{run.condition}; seed {run.seed}; {done}. {versions}",
        "config": json.dumps(run.config, indent=2, ensure_ascii=False),
    }


def _publish(path: Path, content: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def _slug(text: str) -> str:
    return slug(re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x")
