"""What reaches the terminal: colours and bars of our own, and of everybody else's text only what does not act on it.

Names, ids, answers and messages come from files that anybody may have written. An escape sequence in them could repaint
the screen, set the window's title or type for the user. All output goes through one of two doors: `Console`, for
tables and bars, and the guarded standard streams, for everything else that prints.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from rich import console as rich_console
from rich.console import RenderableType
from rich.segment import Segment

from holdfast.text import visible

# "Select graphic rendition": colours and weights, which do nothing but colour. Usage errors and help have them.
_COLOURS = re.compile(r"(\x1b\[[0-9;]*m)")


class Console(rich_console.Console):
    """rich's console; what it is given to show cannot act on the terminal."""

    def render(
        self, renderable: RenderableType, options: rich_console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """The segments of a renderable, made visible; what moves bars is none of their text."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(visible(text), style)

    @property
    def file(self) -> IO[str]:
        """The stream itself, below the guard, which would not let bars pass."""
        found = super().file
        return found.below if isinstance(found, GuardedStream) else found  # type: ignore[return-value]

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        """Write to this stream from now on."""
        self._file = new_file


class GuardedStream:
    """A text stream that writes controls out; on a terminal, colours pass."""

    def __init__(self, below: Any) -> None:
        self.below = below
        if getattr(below, "errors", None) == "strict":
            # A character that a terminal of another encoding does not have is no reason to stop.
            with contextlib.suppress(AttributeError, ValueError):
                below.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write `text`, made visible."""
        plain = text.replace("\r\n", "\n").replace("\r", "\n")
        if "\x1b" in plain and self.below.isatty():
            plain = "".join(part if i % 2 else visible(part) for i, part in enumerate(_COLOURS.split(plain)))
        else:
            plain = visible(plain)
        self.below.write(plain)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each of `lines`."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.below, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.below)


@contextmanager
def guarded_output() -> Iterator[None]:
    """Within, whatever prints to the standard streams prints through the guard."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = GuardedStream(before[0]), GuardedStream(before[1])  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
