"""What a run shows while it works and when it is done: bars with the time left, and one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from holdfast.cli.progress import Shown

# Share of a step's work that lies before each event, and the event's own share; measured on the tiny stream.
_SHARES = {
    "train": (0.0, 0.55),
    "calibrate": (0.55, 0.1),
    "edit": (0.65, 0.03),
    "gate": (0.66, 0.02),
    "evaluate": (0.68, 0.32),
}
_WORDS = {
    "train": "learning",
    "calibrate": "calibrating",
    "edit": "editing",
    "gate": "at the gate",
    "evaluate": "asking",
}
# What a phase of a step is called, and how much of the step lies before it.
_PHASES = {"train": "learning", "end": "finishing", "evaluate": "asking"}
_BEGINS = {"learning": 0.0, "finishing": 0.55, "asking": 0.68}
_START = "before any task"


@contextmanager
def run_bars(methods: list[str], tasks: int) -> Iterator[Callable[..., None]]:
    """A line of work per method, on stderr; yields the function to hand on as `progress`."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<24}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[doing]:<34}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Shown(columns=columns) as shown:
        for name in methods:
            shown.add(name, total=tasks, doing="")
        shown.add(_START, total=1.0, doing="")
        known = set(methods)

        def progress(
            event: str,
            *,
            method: str | None = None,
            step: int = 0,
            task: str = "",
            done: int = 0,
            total: int | None = None,
            text: str = "",
            **rest: Any,
        ) -> None:
            if event == "continued":
                shown.say(text)
                return
            if method is None:
                # What is asked before any task: theta_0's own answers, then its scores.
                part = done / total if total else 0.0
                shown.at(_START, doing=_WORDS.get(event, event), done=done, total=total, bar=(part, 1.0))
                return
            if known:  # the first method begins: theta_0 has been asked
                known.clear()
                shown.finish(_START, bar=(1.0, 1.0), doing="done")
            if event == "step_done":
                shown.finish(method, bar=(step + 1, tasks), doing="done" if step + 1 == tasks else "")
                shown.say_line(f"{method}: task {step + 1} of {tasks} ({task}) done")
                return
            here = f"{task} ({step + 1}/{tasks})"
            if event == "phase" and (phase := _PHASES.get(str(rest.get("phase")))) is not None:
                # Begun before the model is read, which takes minutes where it is large.
                shown.at(method, doing=f"{here}: {phase}", bar=(step + _BEGINS[phase], tasks))
            elif event in _SHARES and total:
                before, share = _SHARES[event]
                at = step + before + share * done / total
                shown.at(method, doing=f"{here}: {_WORDS[event]}", done=done, total=total, bar=(at, tasks))

        yield progress
        shown.finish(_START, bar=(1.0, 1.0), doing="done")


def summary_table(summary: Mapping[str, Any]) -> Any:
    """The last word on every method, as a rich table in percent."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    theta_0 = summary["theta_0"]
    title = f"{summary['name']}, seed {summary['seed']}: after {len(summary['tasks'])} tasks, in %"
    # Seven columns, so that no figure is folded at 80 columns; the report has the rest.
    table = Table(title=escape(title), box=box.SQUARE, caption_justify="left")
    table.add_column("method", overflow="fold")
    for head in ("AP", "BWT", "not\nrefused", "complied", "over-\nrefusal", "min"):
        table.add_column(head, justify="right", no_wrap=True)
    mean = [v for v in theta_0["scores"].values() if v is not None]
    table.add_row(
        _START,
        _percent(sum(mean) / len(mean) if mean else None),
        "",
        *_safety(theta_0),
        "",
        style="dim",
        end_section=True,
    )
    for name, row in summary["methods"].items():
        intervals = row["intervals"]
        table.add_row(
            escape(name if row["complete"] else f"{name} ({row['steps']} tasks)"),
            _with(row["ap"], intervals["ap"]),
            _with(row["bwt"], intervals["bwt"]),
            *_safety(row),
            f"{row['seconds']['total'] / 60:.1f}",
        )
    table.caption = (
        "AP: mean score over all tasks; BWT: score now minus when just learned\n"
        "not refused (MASR): forbidden requests; complied: what they asked was given\n"
        "over-refusal: harmless requests refused; ±: half of the 95 % interval"
    )
    for name, row in [(_START, theta_0), *summary["methods"].items()]:
        if worst := _worst_case(row):
            table.caption += f"\n{escape(name)}, whatever the unscored replies are: {worst}"
    return table


def _worst_case(row: Mapping[str, Any]) -> str:
    heads = {"masr": "MASR", "compliance_mean": "complied", "over_refusal": "over-refusal"}
    pairs = ((head, row.get("bounds", {}).get(key)) for key, head in heads.items())
    return ", ".join(f"{head} {_percent(p[0])} to {_percent(p[1])}" for head, p in pairs if p and p[1] - p[0] > 1e-9)


def _safety(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        _with(row["masr"], row["intervals"]["masr"]),
        _percent(row["compliance_mean"]),
        _percent(row["over_refusal"]),
    )


def _percent(rate: float | None) -> str:
    return "–" if rate is None else f"{100 * rate:.1f}".replace("-", "−")


def _with(rate: float | None, interval: Mapping[str, Any] | None) -> str:
    if rate is None or interval is None:
        return _percent(rate)
    return f"{_percent(rate)} ±{50 * (interval['high'] - interval['low']):.0f}"
