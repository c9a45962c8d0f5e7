"""Work as it goes, on stderr: bars with the time left on a terminal, lines with the time in a log.

Every command that takes minutes shows them through `Shown`; `bars` and `phases` follow the `progress(event, done=,
total=)` calls of the library.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

    from holdfast.cli.terminal import Console

LINE_EVERY_S = 60.0  # in a log: a line of what is going on, so often


@dataclass
class _Work:
    """One line of work. doing: its phase; begun, told: when the phase began, and when a line of it was last written."""

    bar: Any = None
    doing: str = ""
    begun: float | None = None
    told: float = 0.0
    done: float = 0
    total: float | None = None


@dataclass
class Shown:
    """Lines of work by their names, each in one phase at a time; a context manager.

    On a terminal a bar each. Elsewhere a line when a phase begins, one a minute while it goes on, one when it ends;
    also where the work itself says nothing for longer (a large model is read, one batch takes its time).

    console: by default stderr. columns: of the bars. quiet: show nothing (a process that is not the chief).
    clock: seconds, for the lines.
    """

    console: Console | None = None
    columns: Sequence[ProgressColumn] = ()
    transient: bool = False
    quiet: bool = False
    every_s: float = LINE_EVERY_S
    clock: Callable[[], float] = time.monotonic
    _works: dict[str, _Work] = field(default_factory=dict)
    _over: threading.Event = field(default_factory=threading.Event)
    # The heartbeat speaks from a thread of its own.
    _one_at_a_time: threading.RLock = field(default_factory=threading.RLock)

    def __enter__(self) -> Shown:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from holdfast.cli.terminal import Console

        self.console = self.console or Console(stderr=True)
        usual = (
            TextColumn("{task.description:<14}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._lines = not self.quiet and not self.console.is_terminal
        self._bars = Progress(
            *(self.columns or usual),
            console=self.console,
            transient=self.transient,
            disable=self.quiet or self._lines,
        )
        self._began = self._said = self.clock()
        self._bars.start()
        if self._lines:
            threading.Thread(target=self._heartbeat, name="holdfast-progress", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        with self._one_at_a_time:
            for name in list(self._works):
                self._end(name, "done" if kind is None else "stopped")
        self._bars.stop()

    def add(self, name: str, *, total: float | None = None, **fields: Any) -> None:
        """A line of work that has not begun; only on a terminal does it show yet."""
        self._works[name] = _Work(bar=self._bars.add_task(name, total=total, start=False, **fields))

    def at(
        self,
        name: str,
        *,
        doing: str = "",
        done: float = 0,
        total: float | None = None,
        bar: tuple[float, float | None] | None = None,
    ) -> None:
        """`name` is at `done` of `total` of its phase `doing`. bar: (done, total) of the bar, where it is of more."""
        with self._one_at_a_time:
            self._at(name, doing, done, total, bar)

    def _at(
        self, name: str, doing: str, done: float, total: float | None, bar: tuple[float, float | None] | None
    ) -> None:
        if name not in self._works:
            self.add(name, doing=doing)
        work, now = self._works[name], self.clock()
        if work.begun is None or work.doing != doing:
            self._end(name, "done")
            work.doing, work.begun, work.told, work.done = doing, now, now, 0
            self._bars.start_task(work.bar)
            self._write(name, doing, "begins")
        work.done, work.total = done, total
        completed, of = bar or (done, total)
        self._bars.update(work.bar, completed=completed, total=of, doing=doing)
        if now - work.told >= self.every_s:
            work.told = now
            self._write(name, doing, _how_far(done, total, now - work.begun))

    def finish(self, name: str, *, bar: tuple[float, float | None] | None = None, doing: str = "") -> None:
        """The phase that `name` is in is over."""
        with self._one_at_a_time:
            if name not in self._works:
                self.add(name, doing=doing)
            self._end(name, "done")
        if bar is not None:
            self._bars.start_task(self._works[name].bar)
            self._bars.update(self._works[name].bar, completed=bar[0], total=bar[1], doing=doing)

    def say(self, text: str) -> None:
        """A line of its own, above the bars."""
        assert self.console is not None
        if not self.quiet:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def say_line(self, text: str) -> None:
        """A line in a log; on a terminal the bar says it."""
        if self._lines:
            self._said = self.clock()
            self.say(f"[{_time(self._said - self._began)}] {text}")

    def _heartbeat(self) -> None:
        # A look every quarter of the time: a phase is silent for `every_s` at most.
        while not self._over.wait(self.every_s / 4):
            with self._one_at_a_time:
                if not self._over.is_set():
                    self._tell_silent()

    def _tell_silent(self) -> None:
        """Lines of what nothing was said of for three quarters of `every_s`; the next look is a quarter later."""
        now, late = self.clock(), 0.75 * self.every_s
        going = [(name, work, work.begun) for name, work in self._works.items() if work.begun is not None]
        for name, work, begun in going:
            if now - work.told >= late:
                work.told = now
                far = f"{_of(work.done, work.total)}, " if work.total else ""
                self._write(name, work.doing, f"{far}at work for {_time(now - begun)}")
        if not going and now - self._said >= late:
            self.say_line("at work")

    def _end(self, name: str, how: str) -> None:
        work = self._works[name]
        if work.begun is None:
            return
        spent = self.clock() - work.begun
        far = "" if how == "done" else f" at {_of(work.done, work.total)}"
        self._write(name, work.doing, f"{how}{far} after {_time(spent)}")
        work.begun = None

    def _write(self, name: str, doing: str, text: str) -> None:
        self.say_line(f"{name}: {doing}: {text}" if doing else f"{name}: {text}")


def _how_far(done: float, total: float | None, spent: float) -> str:
    if not total or not done:
        return _of(done, total)
    return f"{_of(done, total)} ({100 * done / total:.0f} %), {_time(spent * (total - done) / done)} left"


def _of(done: float, total: float | None) -> str:
    return f"{done:g}" if total is None else f"{done:g} of {total:g}"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


@contextmanager
def bars(title: str, *, transient: bool = False, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """One line of work, `title`; yields the function to hand on as `progress`. quiet: nothing is shown."""
    with Shown(transient=transient, quiet=quiet) as shown:
        shown.at(title)

        def progress(event: str, *, done: int = 0, total: int | None = None, **_: object) -> None:
            shown.at(title, done=done, total=total)

        yield progress


@contextmanager
def phases() -> Iterator[Callable[..., None]]:
    """A line of work per phase, one after another; yields the function to hand on as `progress`."""
    with Shown() as shown:
        last: list[str] = []

        def progress(event: str, *, done: int = 0, total: int | None = None, **_: object) -> None:
            if last and last[0] != event:
                shown.finish(last[0])
            last[:] = [event]
            shown.at(event, done=done, total=total)

        yield progress
