"""Which runs are seeds of one thing, and so may be averaged; what tells the others apart.

Seeds of one thing have one recorded configuration, but for the seed, what is drawn by it (digests of data) and where
files lie. A method that only one of two runs has is no difference between them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from holdfast.reports.compare import Group
from holdfast.reports.read_runs import RunView

# Of a stream: where it lies, and sentences for people.
_NO_SETTINGS = ("root", "description", "obtain", "license")
# Of a method: how it learns, whatever it does besides.
_TUNING = ("training", "train_dtype")
# A title names so many settings, and so much of each.
_SHOWN, _LETTERS = 3, 40


def group_runs(runs: Sequence[RunView]) -> list[Group]:
    """Groups in the order of their first run; a run that repeats a seed of a group stands alone, with a note.

    Folders that differ in their methods alone are one run: a grid may have a cell for each.
    """
    runs = _joined(runs)
    names = _names(runs)
    together: list[list[int]] = []
    alone: dict[int, str] = {}
    for i, run in enumerate(runs):
        alike = [group for group in together if all(_alike(run, runs[j]) for j in group)]
        home = next((group for group in alike if run.seed not in [runs[j].seed for j in group]), None)
        if home is not None:
            home.append(i)
        elif not alike:
            together.append([i])
        else:
            other = next(j for j in alike[0] if runs[j].seed == run.seed)
            alone[i] = (
                f"{names[i]} has the configuration and the seed ({run.seed}) of {names[other]}. It is shown by itself: "
                "averaging a seed with itself would fake a smaller interval."
            )
    members = sorted([*together, *([i] for i in alone)])
    groups = [
        Group(
            stream=runs[one[0]].stream,
            condition=runs[one[0]].condition,
            runs=tuple(runs[i] for i in one),
            note=alone.get(one[0], ""),
        )
        for one in members
    ]
    folders = [", ".join(names[i] for i in one) for one in members]
    details: dict[int, str] = {}
    for title in dict.fromkeys(group.title for group in groups):
        same = [i for i, group in enumerate(groups) if group.title == title]
        if len(same) > 1:
            details |= dict(zip(same, _details([groups[i] for i in same], [folders[i] for i in same]), strict=True))
    return [replace(group, detail=details.get(i, "")) for i, group in enumerate(groups)]


def _joined(runs: Sequence[RunView]) -> list[RunView]:
    found: list[RunView] = []
    for run in runs:
        place = next((i for i, other in enumerate(found) if _parts_of_one(other, run)), None)
        if place is None:
            found.append(run)
            continue
        first = found[place]
        methods = {**first.config["methods"], **run.config["methods"]}
        found[place] = replace(
            first,
            methods={**first.methods, **run.methods},
            config={**first.config, "methods": methods},
            others=(*first.others, run.path, *run.others),
        )
    return found


def _parts_of_one(a: RunView, b: RunView) -> bool:
    """Whether two folders have one configuration, seed and data, and no method in common.

    What was tuned in two ways is not compared.
    """
    if (a.tasks, a.config["config"]) != (b.tasks, b.config["config"]):
        return False
    return not set(a.config["methods"]) & set(b.config["methods"]) and _tuned_alike(a, b)


def _tuned_alike(a: RunView, b: RunView) -> bool:
    """Whether two runs without a common method tune alike.

    Cells of a grid say what all of their methods were asked for. Of other folders the options of tuning must agree; a
    calibration may well be each method's own. What only one of two says is an option of another version.
    """
    if a.cell is not None and b.cell is not None:
        return _agree(*({k: v for k, v in cell.items() if k not in ("methods", "seed")} for cell in (a.cell, b.cell)))
    tuned = [
        [{key: method.get(key) for key in _TUNING if key in method} for method in run.config["methods"].values()]
        for run in (a, b)
    ]
    return all(_agree(x, y) for x in tuned[0] for y in tuned[1])


def _agree(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return all(_agree(a[key], b[key]) for key in a.keys() & b.keys())
    return bool(a == b)


def _alike(a: RunView, b: RunView) -> bool:
    if (a.stream, a.condition, a.tasks, _shared(a)) != (b.stream, b.condition, b.tasks, _shared(b)):
        return False
    common = [name for name in a.methods if name in b.methods]
    return all(_method(a, name) == _method(b, name) for name in common) if common else _tuned_alike(a, b)


def _shared(run: RunView) -> dict[str, Any]:
    """The settings that all methods of a run share, without what two seeds of one thing need not have in common."""
    config = {k: v for k, v in run.config["config"].items() if k != "seed" and not k.endswith("_sha256")}
    if config.get("model_fingerprint"):
        del config["model"]  # only where it lies
    if isinstance(config.get("stream"), Mapping):
        config["stream"] = {k: v for k, v in config["stream"].items() if k not in _NO_SETTINGS}
    return config


def _method(run: RunView, name: str) -> Any:
    return run.config["methods"][name]


def _details(groups: Sequence[Group], folders: Sequence[str]) -> list[str]:
    """Per group the settings in which these groups differ; its folders where that does not tell it from another."""
    runs = [run for group in groups for run in group.runs]
    common = [name for name in runs[0].methods if all(name in run.methods for run in runs)]
    flats = [_settings(group, common) for group in groups]
    keys = [key for key in dict.fromkeys(k for flat in flats for k in flat) if len({f.get(key) for f in flats}) > 1]
    more = [f"{len(keys) - _SHOWN} more settings"] if len(keys) > _SHOWN else []
    found = [", ".join([*(f"{key} {flat.get(key, 'absent')}" for key in keys[:_SHOWN]), *more]) for flat in flats]
    times = Counter(found)
    return [
        text if times[text] == 1 else ", ".join(part for part in (text, folder) if part)
        for text, folder in zip(found, folders, strict=True)
    ]


def _settings(group: Group, methods: Sequence[str]) -> dict[str, str]:
    """Dotted key -> value as text; one that the methods do not agree on has every value."""
    values: dict[str, list[str]] = {}
    for part in (_shared(group.runs[0]), *(_method(group.runs[0], name) for name in methods)):
        for key, value in _flat(part):
            if value not in (seen := values.setdefault(key, [])):
                seen.append(value)
    return {key: "/".join(seen) for key, seen in values.items()}


def _flat(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    items = value if isinstance(value, Mapping) else dict(enumerate(value)) if isinstance(value, list) else {}
    for key, item in items.items():
        yield from _flat(item, f"{where}.{key}" if where else str(key))
    if not items:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        yield where, text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…"


def _names(runs: Sequence[RunView]) -> list[str]:
    """Folder names, or paths where those are not enough."""
    times = Counter(run.path.name for run in runs)
    return [run.path.name if run.path.name and times[run.path.name] == 1 else str(run.path) for run in runs]
