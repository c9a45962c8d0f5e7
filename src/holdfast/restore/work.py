"""What a restore keeps beside OUT while it runs (answers, points, distributions), so that a killed one goes on."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from holdfast.errors import StorageError
from holdfast.files import Lock, atomic_path, read_json, storage_errors, write_json
from holdfast.restore.measure import Reference
from holdfast.restore.search import Point


class WorkFolder:
    """What a restore has done so far: `.OUT.restore/<plan>/`, one file per phase, each written whole or not at all."""

    def __init__(self, out: Path, plan: Mapping[str, Any]) -> None:
        text = json.dumps(plan, sort_keys=True, default=str)
        self.root = out.parent / f".{out.name}.restore"
        self.folder = self.root / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._out = out

    def held(self) -> Any:
        """One restore at a time into one folder. Raises StorageError: another one is at work."""
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        return Lock(
            self.root.parent / f".{self._out.name}.restore.lock",
            busy=f"Another `holdfast restore` is writing {self._out}; wait for it.",
        )

    def json(self, name: str, make: Callable[[], Any]) -> Any:
        """The value kept under `name`, made now where there is none."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            write_json(path, make())
        return read_json(path, "what a restore has kept", error=StorageError)

    def known(self, name: str) -> Point | None:
        """The point kept under `name`, with its reference."""
        path = self.folder / f"{name}.point.json"
        return _point_of(read_json(path, "a point", error=StorageError)) if path.is_file() else None

    def keep_point(self, name: str, point: Point) -> None:
        """Keep a point under a name."""
        write_json(self.folder / f"{name}.point.json", plain_point(point))

    def keep_reference(self, name: str, kept: Reference) -> None:
        """Keep the log-probabilities (tokens, vocabulary) of every sample under a name."""
        with atomic_path(self.folder / f"{name}.safetensors") as temporary:
            save_file({f"{i:06d}": rows.contiguous() for i, rows in enumerate(kept.log_probs)}, temporary)

    def reference(self, name: str) -> Reference:
        """The distributions kept under a name: (tokens, vocabulary) per sample."""
        found = load_file(self.folder / f"{name}.safetensors")
        return Reference(log_probs=[found[key] for key in sorted(found)])

    def known_point(self, strength: float) -> Point | None:
        """The point that was measured at a strength, or None."""
        return self.known(f"at-{strength:g}")

    def point(self, strength: float, make: Callable[[], Point]) -> Point:
        """The point at a strength, made now where there is none."""
        found = self.known_point(strength)
        if found is None:
            found = make()
            self.keep_point(f"at-{strength:g}", found)
        return found

    def points(self) -> list[Path]:
        """Files of the strengths that were measured."""
        return sorted(self.folder.glob("at-*.point.json"))

    def remove(self) -> None:
        """After publishing: nothing of it is needed any more."""
        shutil.rmtree(self.root, ignore_errors=True)


def plain_point(point: Point) -> dict[str, Any]:
    """A point as plain data for JSON; `_point_of` reads it back."""
    # BEFORE is the limit of an infinite strength, and JSON has no infinity.
    strength = None if math.isinf(point.strength) else point.strength
    return {**asdict(point), "strength": strength}


def _point_of(data: Mapping[str, Any]) -> Point:
    strength = math.inf if data["strength"] is None else data["strength"]
    return Point(**{**data, "strength": strength})


__all__ = ["WorkFolder", "plain_point"]
