"""One run file with values varied: a grid of runs, side by side in processes, that goes on where it stopped.

    run: llava-1.5-7b.yaml                 # a run file beside this one; every cell is it with other values
    vary:
      seed: [0, 1, 2]
      injection: {clean: null, injected: {fraction: 0.01}}     # names for values that are no plain word
      methods: [hpa, anchor]               # a name alone is a list of one
      defaults.training.learning_rate: [1.0e-4, 2.0e-4]        # dots lead into mappings

A cell is a run directory OUT/<its name>, such as `seed=0,injection=clean`. What is finished is not computed again; a
cell whose process died is started again and resumes, as any run does; a cell with a mistake in it fails alone.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
import threading
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast import registry
from holdfast.config import encode, with_defaults
from holdfast.data.streams import read_yaml
from holdfast.errors import ConfigError, RunError
from holdfast.experiment.cell_process import LOOK, MISTAKE, HereProcesses, Places
from holdfast.experiment.run_config import RunConfig, decode_run
from holdfast.files import read_json, write_json
from holdfast.stream.protocol import silent
from holdfast.stream.record import RunDirectory

Progress = Callable[..., None]
_LONGEST = 255  # bytes of a cell's name, as file systems take them


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a grid. values: axis -> label, for tables."""

    name: str
    values: Mapping[str, str]
    config: RunConfig

    @property
    def digest(self) -> str:
        """Of everything that it asks for; what the data hold is looked at by its run."""
        return hashlib.sha256(json.dumps(encode(self.config), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """How a cell ended. state: "finished" now, "kept" from an earlier call, or "failed" with `error` saying why.

    attempts: processes that were started for it now. seconds: that they took. mistake: it failed by what it was asked
    for, so that the same again fails again.
    """

    name: str
    state: str
    attempts: int = 0
    seconds: float = 0.0
    error: str = ""
    mistake: bool = False


def read_grid(path: Path | str) -> list[Cell]:
    """The cells of the grid file `path`, in its order; paths in it and in its run file start from their folders.

    Raises: ConfigError, DataError, UnknownNameError: what is wrong, and in which cell.
    """
    path = Path(path)
    data = read_yaml(path)
    if not isinstance(data, Mapping) or set(data) != {"run", "vary"} or not isinstance(data["vary"], Mapping):
        raise ConfigError(f"{path} is no grid: expected `run`, a run file, and `vary`, a mapping of keys to values.")
    file = path.parent / str(data["run"])
    axes = [(str(key), _labelled(str(key), values, path)) for key, values in data["vary"].items()]
    _refuse_nested([key for key, _ in axes], path)
    plain = read_yaml(file)
    if not isinstance(plain, Mapping):
        raise ConfigError(f"{file} is no run file; `run` of {path} must name one.")
    cells = []
    for chosen in itertools.product(*(values.items() for _, values in axes)):
        labels = {key: label for (key, _), (label, _) in zip(axes, chosen, strict=True)}
        name = ",".join(f"{key}={_as_file(label)}" for key, label in labels.items()) or "all"
        changed = copy.deepcopy(dict(plain))
        for (key, _), (_, value) in zip(axes, chosen, strict=True):
            _put(changed, key, value, where=f"{path}, cell {name}")
        config = decode_run(changed, base=file.parent, where=f"cell {name}")
        cells.append(Cell(name=_as_folder(name), values=labels, config=config))
    names = [cell.name for cell in cells]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(
            f"{path}: two cells are called {twice}; name the values: `key: {{one: ..., other: ...}}`, in letters, "
            "digits and the signs . _ + -, for a cell is a folder."
        )
    first: dict[str, str] = {}
    for cell in cells:
        other = first.setdefault(cell.digest, cell.name)
        if other != cell.name:
            raise ConfigError(
                f"{path}: the cells {other} and {cell.name} ask for the same run, which would be computed twice and "
                "shown as two. Leave one of the values out."
            )
    return cells


def sweep(
    cells: Sequence[Cell],
    out: Path | str,
    *,
    jobs: int = 1,
    retries: int = 2,
    progress: Progress = silent,
    places: Places | None = None,
) -> list[CellResult]:
    """Run the cells that are not finished, at most `jobs` at once; one that died is started again `retries` times.

    progress: called as progress("cell", name=, state=, done=, total=). places: where the cells' processes run; None: on
        this machine.

    Raises: RunError: `out` is a file, or has a cell of this name with other settings or of other data. Nothing is run
        then. Whatever else ends this call, Ctrl-C too, ends the cells' processes with it.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; the cells of a grid need a folder. Choose another --out.")
    kept = {cell.name for cell in cells if _is_kept(cell, out / cell.name)}
    for cell in cells:
        if cell.name in kept:
            progress("cell", name=cell.name, state="checking", done=None, total=len(cells))
    _refuse_changed([cell for cell in cells if cell.name in kept], out)
    lock, done = threading.Lock(), itertools.count(1)
    places = places or HereProcesses()

    def one(cell: Cell) -> CellResult:
        progress("cell", name=cell.name, state="running", done=None, total=len(cells))
        if cell.name in kept:
            result = CellResult(name=cell.name, state="kept")
        else:
            result = _run_cell(cell, out / cell.name, retries, places)
        with lock:
            progress("cell", name=cell.name, state=result.state, done=next(done), total=len(cells))
        return result

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        waiting = [pool.submit(one, cell) for cell in cells]
        try:
            finished, _ = wait(waiting, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()  # what one raised ends the others
            return [future.result() for future in waiting]
        except BaseException:
            for future in waiting:
                future.cancel()
            places.stop()
            raise


def _run_cell(cell: Cell, folder: Path, retries: int, places: Places) -> CellResult:
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A process may start in another folder, or on another machine that sees this one.
    job = {"names": encode(registry.export()), "config": encode(cell.config), "out": str(folder.absolute())}
    job["cwd"] = str(Path.cwd())
    began, said = time.monotonic(), ""
    for attempt in range(1, retries + 2):
        status, said = places.run(job)
        seconds = time.monotonic() - began
        if status == 0:
            mark = {"cell": cell.name, "digest": cell.digest, "values": dict(cell.values), "config": job["config"]}
            write_json(RunDirectory(folder).mark_path, mark)
            return CellResult(name=cell.name, state="finished", attempts=attempt, seconds=seconds)
        if status == MISTAKE:
            break
    error = said.strip().splitlines()[-1] if said.strip() else f"its process ended with status {status}"
    mistake = status == MISTAKE
    return CellResult(name=cell.name, state="failed", attempts=attempt, seconds=seconds, error=error, mistake=mistake)


def _is_kept(cell: Cell, folder: Path) -> bool:
    """Whether the cell is finished. One that lacks a method that the grid has now goes on, as any run does.

    Raises: RunError: a finished cell of this name had other settings. An unfinished one is told by its own run.
    """
    path = RunDirectory(folder).mark_path
    if not path.is_file():
        return False
    mark = read_json(path, "a cell's mark", error=RunError)
    if mark.get("digest") == cell.digest:
        return True
    # An option that is new since then changes the digest of all cells, and what it means by default of none.
    before, now = with_defaults(RunConfig, mark.get("config")), encode(cell.config)
    if before == now:
        return True
    if isinstance(before, Mapping) and isinstance(before.get("methods"), Mapping):
        known = {name: now["methods"].get(name) for name in before["methods"]}
        if {**now, "methods": known} == before:
            return False
    raise RunError(
        f"{folder} is finished with other settings than the grid has now. Choose another --out, or remove it."
    )


def _refuse_changed(finished: Sequence[Cell], out: Path) -> None:
    """Raises RunError: a finished cell is of other options, data, code or weights than there are now.

    Data are read again for it, once a cell, but nothing is loaded or computed.
    """
    runs = [(cell, (out / cell.name).absolute()) for cell in finished]
    asked = [{"config": encode(cell.config), "out": str(run)} for cell, run in runs if (run / "config.json").is_file()]
    if not asked:
        return
    # In a process of its own, as a cell is: plug-ins are imported, and another sweep may have others.
    job = {"names": encode(registry.export()), "cells": asked, "cwd": str(Path.cwd())}
    process = HereProcesses(LOOK)
    try:
        status, said = process.run(job)
    except BaseException:
        process.stop()
        raise
    if status != 0:
        last = said.strip().splitlines()[-1] if said.strip() else f"status {status}"
        raise RunError(last if status == MISTAKE else f"The finished cells could not be looked at: {last}")


def _refuse_nested(keys: Sequence[str], path: Path) -> None:
    """Raises ConfigError: one axis lies inside another, so that one of them would lay its values over the other's."""
    for outer in keys:
        inner = next((key for key in keys if key.startswith(f"{outer}.")), None)
        if inner is not None:
            raise ConfigError(
                f"{path}: vary.{inner} lies inside vary.{outer}, and one would overwrite the other. Say both in the "
                f"values of {outer}, with a name for each: `{outer}: {{one: ..., other: ...}}`."
            )


def _labelled(key: str, values: object, path: Path) -> dict[str, Any]:
    """Label -> value of one axis."""
    if isinstance(values, Mapping) and values:
        return {str(label): value for label, value in values.items()}
    if isinstance(values, Sequence) and not isinstance(values, str) and values:
        labels = [
            json.dumps(v, sort_keys=True, default=str) if isinstance(v, Mapping | list) else str(v) for v in values
        ]
        if len(set(labels)) < len(labels):
            twice = next(label for label in labels if labels.count(label) > 1)
            raise ConfigError(f"{path}: vary.{key} has {twice} twice; every value makes a cell of its own.")
        return dict(zip(labels, values, strict=True))
    raise ConfigError(f"{path}: vary.{key} is {values!r}; expected a list of values, or a mapping of names to values.")


def _as_file(label: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", unicodedata.normalize("NFC", label)).strip("-") or "value"


def _as_folder(name: str) -> str:
    """`name`, or its beginning and a digest of the whole where it is too long for a folder."""
    if len(name.encode()) <= _LONGEST:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{name.encode()[:180].decode(errors='ignore')}-{digest}"


def _put(data: dict[str, Any], key: str, value: object, *, where: str) -> None:
    """Lay `value` at the dotted `key`. Raises ConfigError: the way leads through something that is no mapping."""
    *way, last = key.split(".")
    place = data
    for part in way:
        found = place.get(part)
        if found is None:
            found = {}
        if not isinstance(found, Mapping):
            raise ConfigError(f"{where}: {key} leads through {part}, which is {found!r}; expected a mapping.")
        place[part] = dict(found)
        place = place[part]
    place[last] = [value] if last == "methods" and not way and isinstance(value, str) else value


__all__ = ["Cell", "CellResult", "read_grid", "sweep"]
