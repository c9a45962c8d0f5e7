"""A model as a value: what may be asked for, recorded and compared without opening a file. Knows no tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model as a value: a folder or hub id, and adapters (PEFT folders, or a tuner's own folder) on top of it.

    settings: a folder or hub id whose tokenizer, template and processor serve where `base` has none of its own.
    """

    base: str
    adapters: tuple[str, ...] = ()
    settings: str | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """Everything that must stay on disk for this checkpoint to be read."""
        return (self.base, *self.adapters)

    def under(self, adapter: str | Path) -> Checkpoint:
        """This checkpoint with one more adapter on top."""
        return replace(self, adapters=(*self.adapters, str(adapter)))

    def lent(self, settings: str) -> Checkpoint:
        """This checkpoint with the tokenizer, template and processor of `settings` where it has none."""
        return self if self.base == settings else replace(self, settings=settings)

    def own_adapters(self, below: Checkpoint) -> tuple[str, ...] | None:
        """The adapters on top of `below`, or None where this is not `below` under adapters."""
        count = len(below.adapters)
        if self.base != below.base or self.adapters[:count] != below.adapters:
            return None
        return self.adapters[count:]

    def to_json(self) -> dict[str, Any]:
        """As plain data, for a record."""
        lent = {} if self.settings is None else {"settings": self.settings}
        return {"base": self.base, "adapters": list(self.adapters), **lent}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Checkpoint:
        """Inverse of `to_json`; adapters may be absent."""
        settings = data.get("settings")
        return cls(
            base=str(data["base"]),
            adapters=tuple(data.get("adapters", ())),
            settings=None if settings is None else str(settings),
        )

    def __str__(self) -> str:
        """What a record calls it."""
        return " + ".join(self.paths)


# Where a checkpoint may be named: a folder, a hub id, or the value itself.
Source = str | Path | Checkpoint


def as_checkpoint(source: Source) -> Checkpoint:
    """The value that a source names. An object of another class with `base` and `adapters` is taken as one, too.

    A text may name several folders, `BASE+ADAPTER+ADAPTER`: adapters on top of a base, in order. A folder that is there
    under the whole text is that folder.

    Raises: TypeError: it names no checkpoint.
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, Path):
        return Checkpoint(base=str(source))
    if isinstance(source, str):
        parts = [part.strip() for part in source.split("+")]
        if len(parts) == 1 or not all(parts) or Path(source).exists():
            return Checkpoint(base=source)
        return Checkpoint(base=parts[0], adapters=tuple(parts[1:]))
    base, adapters = getattr(source, "base", None), getattr(source, "adapters", None)
    if base is None or adapters is None:
        raise TypeError(f"found {source!r}; expected a folder, a hub id or a Checkpoint(base=..., adapters=...).")
    return Checkpoint(base=str(base), adapters=tuple(str(adapter) for adapter in adapters))
