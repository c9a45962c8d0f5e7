"""One look for every figure: drawn once, saved as a PNG for print and as an SVG that follows the page's theme.

Figures draw text and lines in two colours that occur nowhere else. The PNG keeps them; the SVG replaces them by CSS
variables, so that one picture is readable on a light and on a dark page.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import matplotlib as mpl
from matplotlib.figure import Figure

from holdfast.text import one_line

T = TypeVar("T")
_LONGEST_LABEL = 48

INK = "#1c2431"
LINE = "#c9d0db"
_PAGE = {INK: "currentColor", LINE: "var(--line)"}

# Distinct for the common colour-vision deficiencies, legible on white and on near-black.
SERIES = (
    "#7f8794",
    "#1f77d0",
    "#e07b00",
    "#1b9e77",
    "#c23b75",
    "#7a5cd6",
    "#a6761d",
    "#d64a3a",
    "#2aa7c9",
    "#66a61e",
    "#b07aa1",
    "#4e5d78",
)
BEHAVIOUR = {
    "refusal": "#1b9e77",
    "compliance": "#d64a3a",
    "other_safe": "#7fc8b0",
    "collapse": "#e0a100",
    "unscored": "#9aa3ae",
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h", "p")

_RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "svg.hashsalt": "holdfast",  # the same figure gives the same bytes
}


@contextmanager
def drawing() -> Iterator[None]:
    """Draw inside this block; it never touches the caller's matplotlib settings."""
    with mpl.rc_context(_RC):
        yield


def figure(width: float, height: float) -> Figure:
    """An empty figure of `width` x `height` inches that lays its parts out by itself."""
    return Figure(figsize=(width, height), layout="constrained")


def labels(names: Iterable[str]) -> list[str]:
    """Names as figures show them: one line each, not too long, none equal to another, none that a legend leaves out."""
    found: list[str] = []
    for name in names:
        # A leading underscore hides an entry from a legend.
        shown = one_line(name, _LONGEST_LABEL) or "(no name)"
        shown = f" {shown}" if shown.startswith("_") else shown
        plain, number = shown, 1
        while shown in found:
            number += 1
            shown = f"{plain} ({number})"
        found.append(shown)
    return found


def labelled(values: Mapping[str, T]) -> dict[str, T]:
    """A mapping under `labels` of its names."""
    return dict(zip(labels(values), values.values(), strict=True))


@contextmanager
def _whatever_the_names() -> Iterator[None]:
    """No warning about letters that the font does not have, or names too long for their place: the figure is drawn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing|.*constrained_layout not applied|.*Tight layout")
        yield


def colour(index: int) -> str:
    """Colour of the series with this index; they come round again."""
    return SERIES[index % len(SERIES)]


def marker(index: int) -> str:
    """Marker of the series with this index; they come round again."""
    return MARKERS[index % len(MARKERS)]


def text_on(rgb: Sequence[float]) -> str:
    """Black or white, whichever reads better on `rgb` (0..1 each; WCAG relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#ffffff" if luminance < 0.36 else "#14181f"


def svg(fig: Figure, label: str, scope: str) -> str:
    """The figure as an inline `<svg>` for an HTML page; `label` is read aloud, `scope` keeps ids apart on one page."""
    buffer = io.StringIO()
    with drawing(), _whatever_the_names():
        _lay_out(fig)
        fig.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for mark, value in _PAGE.items():
        text = text.replace(mark, value)
    # Two figures on one page must not share clip paths or glyph ids.
    text = re.sub(r'\bid="([^"]+)"', rf'id="{scope}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{scope}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{scope}-\1"', text)
    width = fig.get_size_inches()[0]
    # A picture of many columns is scrolled on a phone rather than made too small to read.
    least = f";min-width:{0.75 * width:.2f}in" if width > 5.2 else ""
    style = f"width:100%;max-width:{width:.2f}in{least};height:auto"
    opening = f'<svg role="img" aria-label="{_attribute(label)}" style="{style}"'
    # A function: in a template, a backslash of the label would mean something.
    text = re.sub(r'<svg\b(.*?)\bwidth="[^"]*"', lambda found: opening + found[1], text, count=1, flags=re.S)
    return re.sub(r'(<svg\b[^>]*?)\bheight="[^"]*"', r"\1", text, count=1, flags=re.S)


def png(fig: Figure, dpi: int = 144) -> bytes:
    """The figure as a PNG on white."""
    out = io.BytesIO()
    with drawing(), _whatever_the_names():
        _lay_out(fig)
        fig.savefig(out, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return out.getvalue()


def _lay_out(fig: Figure) -> None:
    """Place the parts once: saving would do it again, which is most of the time that a report takes."""
    if fig.get_layout_engine() is not None:
        fig.draw_without_rendering()
        fig.set_layout_engine("none")


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
