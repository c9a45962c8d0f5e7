"""One table, four faces: HTML cells, Markdown, LaTeX, console text. Percent appears here and nowhere before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """text: what stands in the cell; note: its interval or split, smaller. tone: good or bad, for the note's colour."""

    text: str
    note: str = ""
    tone: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""

    def markdown(self) -> str:
        """A GitHub table; the first column is left-aligned, the others right-aligned."""
        lines = [
            "| " + " | ".join(_pipe(h) for h in self.heads) + " |",
            "|" + "|".join(["---", *["---:"] * (len(self.heads) - 1)]) + "|",
        ]
        for row in self.rows:
            lines.append("| " + " | ".join(_pipe(c.text + (f" ({c.note})" if c.note else "")) for c in row) + " |")
        return "\n".join(lines) + "\n"

    def latex(self) -> str:
        """A booktabs table, ready to `\\input`."""
        columns = "l" + "r" * (len(self.heads) - 1)
        body = [" & ".join(_tex(h) for h in self.heads) + r" \\", r"\midrule"]
        for row in self.rows:
            cells = [_tex(c.text) + (rf" {{\scriptsize ({_tex(c.note)})}}" if c.note else "") for c in row]
            body.append(" & ".join(cells) + r" \\")
        caption = [rf"\caption{{{_tex(self.caption)}}}"] if self.caption else []
        return "\n".join(
            [
                "% needs \\usepackage{booktabs}",
                r"\begin{table}",
                r"\centering",
                *caption,
                rf"\begin{{tabular}}{{{columns}}}",
                r"\toprule",
                *body,
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )


def percent(rate: float | None, digits: int = 1) -> str:
    """`0.123 -> "12.3"`; an absent figure is a dash, never a zero."""
    if rate is None or math.isnan(rate):
        return "–"
    text = f"{100 * rate:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.removeprefix("-")


def interval(low: float | None, high: float | None, digits: int = 1) -> str:
    """`"10.1 … 14.5"`, or nothing where there is no interval."""
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return ""
    return f"{percent(low, digits)} … {percent(high, digits)}"


def cells(texts: Sequence[str | Cell]) -> tuple[Cell, ...]:
    """Texts as cells; what is a cell already stays."""
    return tuple(t if isinstance(t, Cell) else Cell(text=t) for t in texts)


def _pipe(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _tex(text: str) -> str:
    text = "".join(_LATEX.get(c, c) for c in text)
    return text.replace("−", "$-$").replace("±", r"$\pm$").replace("…", r"\ldots{}").replace("–", "--")
