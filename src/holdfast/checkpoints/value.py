"""A model as a value: what may be asked for, recorded and compared without opening a file. Knows no tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model as a value: a folder or hub id, and adapters (PEFT folders, or a tuner's own folder) on top of it."""

    base: str
    adapters: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """Everything that must stay on disk for this checkpoint to be read."""
        return (self.base, *self.adapters)

    def under(self, adapter: str | Path) -> Checkpoint:
        """This checkpoint with one more adapter on top."""
        return Checkpoint(base=self.base, adapters=(*self.adapters, str(adapter)))

    def own_adapters(self, below: Checkpoint) -> tuple[str, ...] | None:
        """The adapters on top of `below`, or None where this is not `below` under adapters."""
        count = len(below.adapters)
        if self.base != below.base or self.adapters[:count] != below.adapters:
            return None
        return self.adapters[count:]

    def to_json(self) -> dict[str, Any]:
        """As plain data, for a record."""
        return {"base": self.base, "adapters": list(self.adapters)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Checkpoint:
        """Inverse of `to_json`; adapters may be absent."""
        return cls(base=str(data["base"]), adapters=tuple(data.get("adapters", ())))

    def __str__(self) -> str:
        """What a record calls it."""
        return " + ".join(self.paths)


# Where a checkpoint may be named: a folder, a hub id, or the value itself.
Source = str | Path | Checkpoint


def as_checkpoint(source: Source) -> Checkpoint:
    """The value that a source names. An object of another class with `base` and `adapters` is taken as one, too.

    Raises: TypeError: it names no checkpoint.
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, str | Path):
        return Checkpoint(base=str(source))
    base, adapters = getattr(source, "base", None), getattr(source, "adapters", None)
    if base is None or adapters is None:
        raise TypeError(f"found {source!r}; expected a folder, a hub id or a Checkpoint(base=..., adapters=...).")
    return Checkpoint(base=str(base), adapters=tuple(str(adapter) for adapter in adapters))
