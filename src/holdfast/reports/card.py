"""A model card for one method of a run: what was done, what the model can do and what it refuses, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from holdfast.errors import unknown_name
from holdfast.files import atomic_path
from holdfast.labels import correct
from holdfast.reports import corrected
from holdfast.reports.compare import Group, result_table
from holdfast.reports.read_runs import MethodView, RunView, load_run
from holdfast.reports.tables import Table, cells, percent
from holdfast.version import __version__


def write_card(run: Path | str, method: str, out: Path | str | None = None) -> Path:
    """Write the card of `method` as Markdown; by default to `RUN/methods/<method>/MODEL_CARD.md`.

    Raises: RunError: no run there. UnknownNameError: the run has no such method.
    """
    view = load_run(run)
    if method not in view.methods:
        raise unknown_name("method of this run", method, view.methods)
    path = Path(out) if out is not None else view.methods[method].folder / "MODEL_CARD.md"
    with atomic_path(path) as temporary:
        temporary.write_text(card(view, method), encoding="utf-8")
    return path


def card(run: RunView, method: str) -> str:
    """The card's text."""
    view = run.methods[method]
    group = Group(stream=run.stream, condition=run.condition, runs=(run,))
    whole = result_table(group)
    row = [r for r in whole.rows if r[0].text in ("before any task", view.label)]
    last = view.records[-1]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [holdfast, continual-learning, safety]",
        "---",
        "",
        f"# {run.stream}: {method} after {view.finished} of {len(run.tasks)} tasks",
        "",
        f"Tuned on {', '.join(view.tasks)}, one after another ({run.condition}, seed {run.seed}) with the method "
        f"`{method}` of holdfast {__version__}.",
        "",
        f"- starting model: `{run.theta_0.checkpoint.base}`",
        f"- this checkpoint: `{last.checkpoint.base}`"
        + "".join(f" + `{adapter}`" for adapter in last.checkpoint.adapters),
        "",
        "## Safety before and after",
        "",
        _safety_table(run, view).markdown(),
        "Attack success is the share of forbidden requests not refused: complied (harm) plus collapsed (a reply",
        "that neither refuses nor complies). Over-refusal is the share of harmless requests that were refused.",
        "",
        *_trust(run, method),
        "",
        "## Skills",
        "",
        _skill_table(run, view).markdown(),
        "## Summary",
        "",
        Table(heads=whole.heads, rows=tuple(row)).markdown(),
        "Figures in percent, 95 % bootstrap intervals over test samples in parentheses; one seed.",
        "",
        "## Versions",
        "",
        *[f"- {name} {version}" for name, version in run.versions.items()],
        "",
    ]
    return "\n".join(lines)


def _trust(run: RunView, method: str) -> list[str]:
    """How far the safety figures can be trusted: people's labels, or the judge's error on public sets."""
    correction = correct(run.path)
    if correction is None or method not in correction.methods:
        return ["", *[corrected.uncorrected(judge) for judge in corrected.judges_of(run)]]
    table = corrected.correction_table(run, correction, only=method)
    return ["", table.markdown(), corrected.NOTE, " ".join(corrected.about(run, correction))]


def _safety_table(run: RunView, view: MethodView) -> Table:
    heads = (
        "safety set",
        "n",
        "attack success before",
        "after",
        "complied",
        "collapsed",
        "over-refusal before",
        "after",
    )
    last = view.records[-1].safety
    rows = []
    for name, after in last.items():
        before = run.theta_0.safety.get(name, {})
        texts = [name, str(after.get("n", "–"))]
        texts += [percent(before.get("asr")), percent(after.get("asr"))]
        texts += [percent(after.get("compliance")), percent(after.get("collapse"))]
        texts += [percent(side.get("benign", {}).get("over_refusal")) for side in (before, after)]
        rows.append(cells(texts))
    return Table(heads=heads, rows=tuple(rows))


def _skill_table(run: RunView, view: MethodView) -> Table:
    rows = []
    for j, task in enumerate(view.tasks):
        before = run.theta_0.scores.get(task, {}).get("value")
        texts: Sequence[str] = [task, percent(before), percent(view.matrix[j][j]), percent(view.matrix[-1][j])]
        rows.append(cells(texts))
    return Table(heads=("task", "before any task", "just learned", "at the end"), rows=tuple(rows))
