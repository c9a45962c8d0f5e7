"""Which replies people are asked about: a random draw from every verdict of the judge, method by method.

Cells are (method, side of the safety sets); a cell's replies are split by the judge's verdict and, where the labels
reach, by set. What was drawn is stored with the size of what it was drawn from, so that rates can be estimated by
design: no assumption about the judge enters.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from holdfast.errors import ConfigError, DataError, RunError, unknown_name
from holdfast.files import write_json
from holdfast.metrics.corrected import allocate, share_equally
from holdfast.stream.record import RunDirectory, read_json
from holdfast.stream.summary import predictions

FORMAT = "holdfast.labels/1"
THETA_0 = "theta_0"
SIDES = ("unsafe", "benign")
DEFAULT_NUMBER = 100
# The judge's verdict -> set -> the lines of its replies.
Verdicts = Mapping[str, Mapping[str, Sequence[int]]]


@dataclass(frozen=True, kw_only=True)
class LabelStratum:
    """What was drawn from: replies of one method and side with one verdict, of one set or of several.

    sizes: set -> replies there were; drawn: how many of them all. Each had the chance drawn / size to be asked about.
    """

    method: str
    side: str
    behaviour: str
    sizes: Mapping[str, int]
    drawn: int

    @property
    def size(self) -> int:
        """Replies that it was drawn from."""
        return sum(self.sizes.values())

    @property
    def inclusion(self) -> float:
        """Share of its replies that was drawn, 0..1."""
        return self.drawn / self.size


@dataclass(frozen=True, kw_only=True)
class Item:
    """One drawn reply. number: 1.., the order in which it is shown; row: its line in the set's predictions."""

    number: int
    stratum: int
    set: str
    row: int


@dataclass(frozen=True, kw_only=True)
class Draw:
    """A draw. steps: method -> finished tasks when drawn. replies: "method/set" -> fingerprint of its replies."""

    seed: int
    number: int
    judge: str
    steps: Mapping[str, int]
    replies: Mapping[str, str]
    strata: tuple[LabelStratum, ...]
    items: tuple[Item, ...]

    @property
    def digest(self) -> str:
        """What ties a file of labels to this draw; it says nothing of what is in it."""
        return hashlib.sha256(json.dumps(self._plain(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def methods(self) -> list[str]:
        """Names of the methods that replies were drawn from."""
        return list(self.steps)

    def _plain(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> dict[str, Any]:
        """Plain data, with each stratum's size and inclusion probability written out."""
        strata = [{**asdict(s), "size": s.size, "inclusion": s.inclusion} for s in self.strata]
        return {"format": FORMAT, "digest": self.digest, **self._plain(), "strata": strata}


def draw_path(run: Path) -> Path:
    """Where the draw of a run lies."""
    return run / "labels" / "draw.json"


def read_replies(run: Path, method: str, step: int | None = None) -> dict[str, list[dict[str, Any]]]:
    """Set -> lines of its predictions, of `method` after `step` finished tasks (by default all that are finished).

    Raises: RunError: no run there, or nothing finished. UnknownNameError: the run has no such method.
    """
    return _replies(RunDirectory(run), method, step)[1]


def make_draw(run: Path, *, number: int = DEFAULT_NUMBER, methods: Sequence[str] | None = None, seed: int = 0) -> Draw:
    """Draw `number` replies of a run's last finished steps.

    Labels are split evenly over (method, side), there by verdict (`metrics.corrected.allocate`), and inside a verdict
    over the sets, where each can have one. Few verdicts of a kind are all drawn.

    methods: by default those of the run that have a finished task; "theta_0" is the model before any.
    Raises:
        ConfigError: `number` cannot reach every verdict of every method. RunError: no reply to a safety set.
    """
    directory = RunDirectory(run)
    names = list(dict.fromkeys(methods)) if methods else _finished(directory)
    steps: dict[str, int] = {}
    replies: dict[str, str] = {}
    cells: dict[tuple[str, str], dict[str, dict[str, list[int]]]] = {}
    judges: set[str] = set()
    for name in names:
        steps[name], by_set = _replies(directory, name)
        for set_name, rows in by_set.items():
            replies[f"{name}/{set_name}"] = fingerprint(rows)
            for index, row in enumerate(rows):
                verdicts = cells.setdefault((name, _side(row)), {})
                verdicts.setdefault(str(row.get("behaviour") or "unscored"), {}).setdefault(set_name, []).append(index)
        judges |= _judges(directory, name)
    if not cells:
        raise RunError(
            f"{run} has no reply to a safety set, so there is nothing to label. Add `safety:` sets to the stream."
        )
    strata, items = draw_from(cells, number, seed=seed)
    return Draw(
        seed=seed,
        number=number,
        judge=", ".join(sorted(judges)),
        steps=steps,
        replies=replies,
        strata=strata,
        items=items,
    )


def draw_from(
    cells: Mapping[tuple[str, str], Verdicts], number: int, *, seed: int
) -> tuple[tuple[LabelStratum, ...], tuple[Item, ...]]:
    """Strata and drawn items of cells: (method, side) -> verdict -> set -> rows. Raises ConfigError: as `make_draw`."""
    rng = random.Random(seed)
    strata: list[LabelStratum] = []
    drawn: list[tuple[float, int, str, int]] = []
    for cell, budget in zip(cells, _budgets(cells, number), strict=True):
        for behaviour, sets, count in _strata(cells[cell], budget):
            places = [(set_name, index) for set_name, rows in sets.items() for index in rows]
            sizes = {set_name: len(rows) for set_name, rows in sets.items()}
            stratum = LabelStratum(method=cell[0], side=cell[1], behaviour=behaviour, sizes=sizes, drawn=count)
            for turn, (set_name, index) in enumerate(rng.sample(places, count)):
                # Every beginning of the order holds about the same part of each stratum, and still is a random
                # sample of it: one may stop anywhere.
                drawn.append(((turn + rng.random()) / count, len(strata), set_name, index))
            strata.append(stratum)
    items = tuple(
        Item(number=n, stratum=stratum, set=set_name, row=row)
        for n, (_, stratum, set_name, row) in enumerate(sorted(drawn), 1)
    )
    return tuple(strata), items


def write_draw(run: Path, draw: Draw) -> Path:
    """Store the draw beside the run. Raises RunError: another one is there already."""
    path = draw_path(run)
    if path.exists() and read_draw(run) != draw:
        raise RunError(f"{path} holds another draw. Rename {path.parent} to keep it, then draw again.")
    write_json(path, draw.to_json())
    return path


def read_draw(run: Path) -> Draw | None:
    """The draw beside a run, or None. Raises RunError: the file is damaged or of another format."""
    path = draw_path(run)
    if not path.is_file():
        return None
    data = read_json(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise RunError(f"{path} was not written by this version of holdfast. Rename {path.parent} and draw again.")
    try:
        keys = ("method", "side", "behaviour", "sizes", "drawn")
        draw = Draw(
            seed=data["seed"],
            number=data["number"],
            judge=data["judge"],
            steps=data["steps"],
            replies=data["replies"],
            strata=tuple(LabelStratum(**{k: s[k] for k in keys}) for s in data["strata"]),
            items=tuple(Item(**item) for item in data["items"]),
        )
        whole = draw.digest == data["digest"] and _consistent(draw)
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({error}). Rename {path.parent} and draw again.") from None
    if not whole:
        raise RunError(f"{path} was changed after it was drawn. Put the file back, or rename {path.parent}.")
    return draw


def shown_rows(run: Path, draw: Draw) -> list[dict[str, Any]]:
    """The predictions' line of every item, in order.

    Raises: RunError: the run's replies are no longer those that were drawn from.
    """
    by_method = {name: _replies(RunDirectory(run), name, steps)[1] for name, steps in draw.steps.items()}
    gone = stale(run, draw)
    if gone:
        raise RunError(
            f"{run}: the replies of {', '.join(sorted(gone))} have changed since they were drawn, so their labels "
            f"would be about other texts. Rename {draw_path(run).parent} and draw again."
        )
    return [by_method[draw.strata[item.stratum].method][item.set][item.row] for item in draw.items]


def stale(run: Path, draw: Draw) -> dict[str, str]:
    """Methods whose replies are not the drawn ones any more -> why, as a sentence."""
    found = {}
    for name, steps in draw.steps.items():
        try:
            finished, rows = _replies(RunDirectory(run), name, steps)
        except RunError as error:
            found[name] = f"{name}: {error}"
            continue
        wanted = {k.removeprefix(f"{name}/"): v for k, v in draw.replies.items() if k.startswith(f"{name}/")}
        if {k: fingerprint(v) for k, v in rows.items()} != wanted:
            found[name] = f"{name}: its replies were made again after the labels were drawn."
        elif name != THETA_0 and (now := _replies(RunDirectory(run), name)[0]) != finished:
            found[name] = f"{name}: it was labelled after {finished} tasks and has finished {now} since."
    return found


def fingerprint(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of the texts a label is about; verdicts are not part of it, so judging again keeps the labels."""
    texts = [[row.get("id"), row.get("side"), row.get("prompt"), row.get("reply")] for row in rows]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def _finished(directory: RunDirectory) -> list[str]:
    config = _config(directory)
    theta_0 = _theta_0(directory)
    names = [name for name in config["methods"] if directory.records(name, theta_0.tasks)]
    if not names:
        raise RunError(f"{directory.root}: no task is finished yet. Run it on (the same command resumes), then label.")
    return names


def _config(directory: RunDirectory) -> dict[str, Any]:
    if not directory.config_path.is_file():
        raise RunError(
            f"{directory.root} is no run directory (no config.json). Give the folder that `holdfast run` or "
            "`holdfast demo` wrote with --out."
        )
    return directory.read_config()


def _theta_0(directory: RunDirectory) -> Any:
    theta_0 = directory.read_record(directory.theta_0_dir)
    if theta_0 is None:
        raise RunError(f"{directory.root} has no record of theta_0 yet; repeat the run's command to resume it.")
    return theta_0


def _last(directory: RunDirectory, method: str, step: int | None = None) -> tuple[int, Path, Any]:
    """Finished tasks, folder and record of a method's last (or `step`-th) finished task."""
    config, theta_0 = _config(directory), _theta_0(directory)
    if method == THETA_0:
        return 0, directory.theta_0_dir, theta_0
    if method not in config["methods"]:
        raise unknown_name("method of this run", method, [*config["methods"], THETA_0])
    records = directory.records(method, theta_0.tasks)
    steps = len(records) if step is None else step
    if not records or not 1 <= steps <= len(records):
        raise RunError(f"{directory.root}: {method} has finished {len(records)} tasks; expected at least {step or 1}.")
    return steps, directory.step_dir(method, steps - 1, theta_0.tasks[steps - 1]), records[steps - 1]


def _replies(
    directory: RunDirectory, method: str, step: int | None = None
) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    steps, folder, record = _last(directory, method, step)
    return steps, {name: predictions(folder, "safety", name) for name in record.safety}


def _judges(directory: RunDirectory, method: str) -> set[str]:
    return {str(row.get("judge", "unknown")) for row in _last(directory, method)[2].safety.values()}


def _side(row: Mapping[str, Any]) -> str:
    side = row.get("side")
    if side not in SIDES:
        raise DataError(f"A reply's side is {side!r}; expected one of {', '.join(SIDES)}.")
    return str(side)


def _budgets(cells: Mapping[tuple[str, str], Verdicts], number: int) -> list[int]:
    sizes = [sum(len(rows) for sets in v.values() for rows in sets.values()) for v in cells.values()]
    if number < 1:
        raise ConfigError(f"--number is {number}; expected 50 to 100 labels, or more.")

    def short(some: int) -> bool:
        return any(b < len(v) for b, v in zip(share_equally(sizes, some), cells.values(), strict=True))

    if short(number):
        needed = next(some for some in range(number + 1, sum(sizes) + 1) if not short(some))
        raise ConfigError(
            f"{number} labels do not reach every verdict of every method: {len(cells)} groups of method and "
            f"side hold {sum(map(len, cells.values()))} kinds of verdict. Ask for at least --number {needed}, or name "
            "fewer methods with --method."
        )
    return share_equally(sizes, number)


def _strata(verdicts: Verdicts, budget: int) -> list[tuple[str, dict[str, Sequence[int]], int]]:
    """(verdict, set -> rows, labels) of each stratum of a cell."""
    # Each set weighs the same in a mean over sets; a draw in that proportion makes every label weigh the same.
    of_set = Counter({s: 0 for sets in verdicts.values() for s in sets})
    for sets in verdicts.values():
        of_set.update({s: len(rows) for s, rows in sets.items()})
    counts = allocate([sum(map(len, sets.values())) for sets in verdicts.values()], budget)
    strata: list[tuple[str, dict[str, Sequence[int]], int]] = []
    for (behaviour, sets), count in zip(verdicts.items(), counts, strict=True):
        if count < 2 * len(sets) and count < sum(map(len, sets.values())):
            strata.append((behaviour, dict(sets), count))
            continue
        sizes = [len(rows) for rows in sets.values()]
        shares = [len(rows) / of_set[s] for s, rows in sets.items()]
        for (set_name, rows), some in zip(sets.items(), _by_share(sizes, shares, count), strict=True):
            strata.append((behaviour, {set_name: rows}, some))
    return strata


def _by_share(sizes: Sequence[int], shares: Sequence[float], count: int) -> list[int]:
    """`count` labels over sets in proportion to `shares`, one at least, none more than its size."""
    counts = [1] * len(sizes)
    while sum(counts) < min(count, sum(sizes)):
        open_ = [i for i, c in enumerate(counts) if c < sizes[i]]
        counts[max(open_, key=lambda i: (shares[i] / (2 * counts[i] + 1), -i))] += 1
    return counts


def _consistent(draw: Draw) -> bool:
    found = Counter(item.stratum for item in draw.items)
    return (
        [item.number for item in draw.items] == list(range(1, len(draw.items) + 1))
        and all(found[i] == s.drawn for i, s in enumerate(draw.strata))
        and all(item.set in draw.strata[item.stratum].sizes for item in draw.items)
    )
