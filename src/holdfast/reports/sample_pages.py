"""The same question asked before tuning, after it and after each method's edit, with its picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast.data.images import thumbnail_uri
from holdfast.reports.read_runs import MethodView, Rows, RunView, safety_rows, step_folder, task_rows

_SIDE_PIXELS = 288
_TEXT = 600


def samples(run: RunView, *, methods: int = 4) -> list[dict[str, Any]]:
    """One sample per task and one per side of each safety set: the first on which the answers differ, else the first.

    Answers are those of theta_0 and of the first `methods` methods after their last finished task.
    """
    views = list(run.methods.values())[:methods]
    found = []
    tasks = min((v.tasks for v in views), key=len)
    for task in tasks:
        tables = {"before any task": task_rows(run.path / "theta_0", task)}
        tables.update({v.title: task_rows(_last(v), task) for v in views})
        chosen = _choose(tables, "prediction")
        if chosen is not None:
            found.append(_card(chosen, tables, "prediction", f"task {task}"))
    sets = list(dict.fromkeys(name for v in views for name in v.safety_sets))
    for name in sets:
        for side, kind in (("unsafe", "must be refused"), ("benign", "must be answered")):
            tables = {"before any task": safety_rows(run.path / "theta_0", name)}
            tables.update({v.title: safety_rows(_last(v), name) for v in views})
            tables = {who: [r for r in rows if r.get("side") == side] for who, rows in tables.items()}
            chosen = _choose(tables, "reply")
            if chosen is not None:
                found.append(_card(chosen, tables, "reply", f"{name}: {kind}", side=side))
    return found


def _last(view: MethodView) -> Path:
    return step_folder(view, view.finished - 1)


def _choose(tables: Mapping[str, Rows], key: str) -> dict[str, Any] | None:
    columns = [{str(r.get("id")): r for r in rows} for rows in tables.values() if rows]
    if not columns:
        return None
    everywhere = [i for i in columns[-1] if all(i in column for column in columns)]
    if not everywhere:
        return None
    differing = [i for i in everywhere if len({str(column[i].get(key)) for column in columns}) > 1]
    return columns[-1][(differing or everywhere)[0]]


def _card(
    chosen: Mapping[str, Any], tables: Mapping[str, Rows], key: str, kind: str, side: str | None = None
) -> dict[str, Any]:
    answers = []
    for who, rows in tables.items():
        row = next((r for r in rows if str(r.get("id")) == str(chosen.get("id"))), None)
        if row is None:
            continue
        tag, good = "", True
        if side is None:
            value = row.get("value")
            if isinstance(value, int | float):
                good = value >= 0.5
                tag = {1.0: "right", 0.0: "wrong"}.get(float(value), f"score {value:.2f}")
        else:
            tag = str(row.get("behaviour") or "unscored")
            good = tag in (("refusal", "other_safe") if side == "unsafe" else ("compliance",))
        answers.append({"who": who, "text": _short(str(row.get(key, ""))), "tag": tag, "good": good})
    references = chosen.get("references") or []
    return {
        "id": str(chosen.get("id")),
        "prompt": _short(str(chosen.get("prompt", ""))),
        "kind": kind,
        "expected": _short(str(references[0])) if references and side is None else "",
        "image": next((uri for path in chosen.get("images") or [] if (uri := thumbnail_uri(path, _SIDE_PIXELS))), ""),
        "answers": answers,
    }


def _short(text: str) -> str:
    return text if len(text) <= _TEXT else text[: _TEXT - 1] + "…"
