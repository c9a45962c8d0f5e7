"""A progress bar that follows the `progress(event, done=, total=)` calls of the library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bars(title: str) -> Iterator[Callable[..., None]]:
    """A bar with the time left, on stderr; yields the function to hand on as `progress`."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from holdfast.cli.terminal import Console

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as shown:
        bar = shown.add_task(title, total=None)

        def progress(event: str, *, done: int = 0, total: int | None = None, **_: object) -> None:
            shown.update(bar, completed=done, total=total)

        yield progress


@contextmanager
def phases() -> Iterator[Callable[..., None]]:
    """A bar per phase with the time left, on stderr; a line per phase where stderr is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    from holdfast.cli.terminal import Console

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as shown:
        bars: dict[str, TaskID] = {}

        def progress(event: str, *, done: int = 0, total: int | None = None, **_: object) -> None:
            if event not in bars:
                bars[event] = shown.add_task(event, total=total)
                if not console.is_terminal:
                    console.print(f"{event} ...", highlight=False)
            shown.update(bars[event], completed=done, total=total)

        yield progress
