"""restore.json -> a page with the trade-off curve. No model, no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.files import atomic_path
from holdfast.reports import figures, theme
from holdfast.reports.templates import template
from holdfast.text import visible
from holdfast.version import __version__

FORBIDDEN, HARMLESS, TASK = "forbidden requests not refused", "harmless requests refused", "task"


def write_restore_page(record: Mapping[str, Any], path: Path, *, samples: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Write the page of a restore record (what `restore.json` holds), and its figure as a PNG beside it.

    samples: {"kind", "ask", "replies": [(model, text), ...]} to show.
    """
    picture = trade_off_figure(record)
    drawn = theme.svg(picture, "Trade-off: refusals, over-refusal and the task against the edit's strength", "restore")
    with atomic_path(path.with_suffix(".png")) as temporary:
        temporary.write_bytes(theme.png(picture))
    measured = record["settings"]["task_measure"]
    page = template("restore.html.j2").render(
        title="Restored: what the edit gave back and what it cost" if record["chosen"] else "No edit met the budget",
        subtitle=f"{record['inputs']['before']} -> {record['inputs']['after']}, rule {record['settings']['rule']}",
        findings=[verdict(record), *record["warnings"]],
        svg=drawn,
        caption=(
            f"Left end: the tuned model. Right end: the model before. {measured} Dashed: the budget. Every point was "
            f"measured on the same {record['probe']['safety']} forbidden, {record['probe']['benign']} harmless and "
            f"{record['probe']['task']} task requests, none of which the edit was made from."
        ),
        table=_table(record),
        samples=samples,
        version=__version__,
        foot="Figures are of the probe requests; intervals (95 %, Wilson) say what another draw might show.",
    )
    with atomic_path(path) as temporary:
        temporary.write_text(visible(page), encoding="utf-8", errors="replace")
    return path


def trade_off_figure(record: Mapping[str, Any]) -> Any:
    """ASR, over-refusal and task against strength, the point taken marked."""
    points = [record["tuned"], *(p for p in record["curve"] if p["strength"] > 0), record["before"]]
    labels = ["tuned", *(f"{p['strength']:g}" for p in points[1:-1]), "before"]
    chosen = record["chosen"]
    where = next((i for i, p in enumerate(points[:-1]) if chosen and p["strength"] == chosen["strength"]), None)
    keys = {FORBIDDEN: "asr", HARMLESS: "over_refusal", TASK: "task"}
    series = {name: [p[key] for p in points] for name, key in keys.items() if any(p[key] is not None for p in points)}
    budget = record["budget"]
    bounds = {FORBIDDEN: budget["max_asr"], HARMLESS: budget["max_over_refusal"]}
    if budget["max_drop"] is not None and record["tuned"]["task"] is not None:
        bounds[TASK] = record["tuned"]["task"] - budget["max_drop"]
    return figures.trade_off(
        labels, series, chosen=where, bounds={name: bound for name, bound in bounds.items() if bound is not None}
    )


def verdict(record: Mapping[str, Any]) -> str:
    """One sentence for a person: what the tuned model answered, what the restored one answers, and the price."""
    before, tuned, probe = record["before"], record["tuned"], record["probe"]
    text = (
        f"Of {probe['safety']} forbidden requests the tuned model did not refuse {_count(tuned, probe)}"
        f" (before the tuning: {_count(before, probe)})"
    )
    if record["chosen"] is None:
        near = record["nearest"]
        return (
            f"{text}. No strength meets the budget; the nearest is {near['strength']:g}: {_count(near, probe)} not "
            f"refused{_price(near, tuned)}. Nothing was published."
        )
    restored = record["restored"] or record["chosen"]
    return f"{text}; after the edit {_count(restored, probe)}{_price(restored, tuned)}."


def card_section(record: Mapping[str, Any]) -> str:
    """Markdown for a model card: the verdict and the three models side by side."""
    table = _table(record)
    heads = table["heads"]
    lines = ["## Restored", "", verdict(record), "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    lines += ["| " + " | ".join(row["cells"]) + " |" for row in table["rows"]]
    lines += ["", table["note"], *(f"\n- {warning}" for warning in record["warnings"])]
    return "\n".join(lines) + "\n"


def _count(point: Mapping[str, Any], probe: Mapping[str, int]) -> str:
    return f"{round(point['asr'] * probe['safety'])}"


def _price(point: Mapping[str, Any], tuned: Mapping[str, Any]) -> str:
    parts = []
    if point["over_refusal"] is not None:
        parts.append(
            f"refuses {_percent(point['over_refusal'])} of the harmless ones ({_percent(tuned['over_refusal'])} tuned)"
        )
    if point["task"] is not None and tuned["task"] is not None:
        parts.append(f"scores {_percent(point['task'])} on the task ({_percent(tuned['task'])} tuned)")
    return f", and it {' and '.join(parts)}" if parts else ""


def _table(record: Mapping[str, Any]) -> dict[str, Any]:
    heads = ["model", "not refused", "of it complied", "harmless refused", "task"]
    named = [("before", record["before"]), ("tuned", record["tuned"]), ("restored", record["restored"])]
    rows = [
        {
            "marked": name == "restored",
            "cells": [
                name,
                _with_interval(point, "asr"),
                _percent(point["complied"]),
                _with_interval(point, "over_refusal"),
                _percent(point["task"]),
            ],
        }
        for name, point in named
        if point is not None
    ]
    note = (
        "Not refused: replies to forbidden requests that are no refusal. Complied: those that answer. Harmless refused "
        "is over-refusal. In brackets: 95 % intervals."
    )
    return {"heads": heads, "rows": rows, "note": note}


def _with_interval(point: Mapping[str, Any], key: str) -> str:
    interval = (point.get("figures") or {}).get(key)
    value = _percent(point[key])
    return value if interval is None else f"{value} [{100 * interval['low']:.0f} to {100 * interval['high']:.0f}]"


def _percent(rate: float | None) -> str:
    return "not measured" if rate is None else f"{100 * rate:.1f} %"
