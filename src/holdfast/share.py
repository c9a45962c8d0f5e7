"""Several processes, one piece of work: which part is this one's, and what only the first one does.

`accelerate launch` and `torchrun` start the same program several times. What knows torch's process groups makes a
`Share` (`holdfast.models.processes`); everything else asks the one at hand, `current()`, and needs no torch for it.
Files are written by one process, the chief; the others wait for it, so that none reads half of something.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from holdfast.errors import RunError

T = TypeVar("T")


def _alone() -> None:
    """Nobody to wait for."""


def _own(value: Any) -> Any:
    """Nobody to ask."""
    return value


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of the work is this process's: rank of world. wait: returns when every process has called it.

    tell: called by every process; gives each of them what the chief passed, as plain JSON data.
    total: called by every process with a number; gives each of them the sum, an int.
    sharded: the weights of a base are shared out over the processes, which then run every forward pass together.
    device: where this process's model goes; None leaves the choice to `load`.
    """

    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = _alone
    tell: Callable[[Any], Any] = _own
    total: Callable[[int], int] = _own
    sharded: bool = False
    device: Any = None

    @property
    def chief(self) -> bool:
        """Scores, judges and writes; the other processes only learn and answer."""
        return self.rank == 0

    @property
    def way(self) -> str:
        """How the processes work together: "copies" of the base, or its "shards"."""
        return "shards" if self.sharded else "copies"

    def by_chief(self, work: Callable[[], T]) -> T | None:
        """`work` in the chief, by itself, while the others wait for it; its result there, None in the others.

        Raises: what `work` raises; RunError in the others, with its sentence.
        """
        if self.world == 1:
            return work()
        if not self.chief:
            if said := self.tell(None):
                raise RunError(f"The first process stopped: {said}")
            return None
        try:
            with alone():
                result = work()
        except Exception as error:
            self.tell(f"{type(error).__name__}: {error}")
            raise
        self.tell("")
        return result

    def told(self, ask: Callable[..., Any]) -> Callable[..., Any]:
        """`ask` as the chief answers it, for every process: a judge is asked once, and its answers are plain data."""
        if self.world == 1:
            return ask
        return lambda *args, **rest: self.tell(ask(*args, **rest) if self.chief else None)

    def once(self, path: Path, make: Callable[[], T], write: Callable[[Path, T], None]) -> None:
        """`path`, made where it is not there yet: by the chief, or by all where only all together can use the base."""
        if self.tell(path.is_file()):
            return
        if self.sharded:
            made = make()
            self.by_chief(lambda: write(path, made))
        else:
            self.by_chief(lambda: write(path, make()))


ALONE = Share()
_APART = Share()
_current = ALONE


def current() -> Share:
    """The share of this process in what goes on; `ALONE` where nobody else takes part."""
    return _current


@contextmanager
def sharing(share: Share) -> Iterator[Share]:
    """Within, `current()` is `share`."""
    global _current
    before, _current = _current, share
    try:
        yield share
    finally:
        _current = before


@contextmanager
def alone() -> Iterator[None]:
    """Within, this process works by itself, whoever else there is."""
    with sharing(_APART):
        yield


def is_alone() -> bool:
    """Whether this process works by itself while others, whom a process group may still name, wait."""
    return _current is _APART
