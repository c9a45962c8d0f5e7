"""Figures of a run, each a function of plain numbers. Rates come in as 0..1 and are drawn in percent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from holdfast.reports import theme

Matrix = Sequence[Sequence[float | None]]
Interval = tuple[float, float, float]  # value, low, high

# Inches. A picture of this width fits a phone, and two stand side by side on a desk.
WIDTH = 4.7

_BLUES = LinearSegmentedColormap.from_list("holdfast", ["#f3f6fb", "#9cc3ea", "#2f7fd1", "#0b2f66"])


def accuracy_matrices(matrices: Mapping[str, Matrix], tasks: Sequence[str]) -> Figure:
    """One heat map per method: rows = after learning task t, columns = score on task j."""
    columns = min(3, max(1, len(matrices)))
    rows = math.ceil(len(matrices) / columns)
    side = 1.3 + 0.46 * len(tasks)
    matrices, tasks = theme.labelled(matrices), theme.labels(tasks)
    with theme.drawing():
        fig = theme.figure(max(3.6, columns * (side + 0.7)), rows * (side + 0.5))
        axes = fig.subplots(rows, columns, squeeze=False)
        for ax in axes.flat[len(matrices) :]:
            ax.axis("off")
        for ax, (name, matrix) in zip(axes.flat, matrices.items(), strict=False):
            _heat(ax, matrix, tasks, tasks[: len(matrix)], name)
            ax.set_xlabel("score on")
            ax.set_ylabel("after learning")
    return fig


def _heat(ax: Axes, matrix: Matrix, columns: Sequence[str], rows: Sequence[str], title: str, top: float = 1.0) -> None:
    values = np.full((len(rows), len(columns)), np.nan)
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            values[i, j] = np.nan if value is None else value
    image = np.ma.masked_invalid(values)
    ax.grid(visible=False)
    # A mesh, not an image: it stays sharp at any zoom.
    ax.pcolormesh(
        np.arange(len(columns) + 1) - 0.5, np.arange(len(rows) + 1) - 0.5, image, cmap=_BLUES, vmin=0.0, vmax=top
    )
    ax.invert_yaxis()
    for i, j in np.argwhere(~np.isnan(values)):
        text = f"{100 * values[i, j]:.0f}"
        ax.text(j, i, text, ha="center", va="center", fontsize=8, color=theme.text_on(_BLUES(values[i, j] / top)))
    ax.set_xticks(range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(rows)), rows)
    ax.set_title(title)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


def along_stream(
    series: Mapping[str, Sequence[float | None]], steps: Sequence[str], ylabel: str, *, reference: float | None = None
) -> Figure:
    """A line per method over the steps of the stream; `reference` is theta_0's value, before any task."""
    series, steps = theme.labelled(series), theme.labels(steps)
    with theme.drawing():
        fig = theme.figure(max(WIDTH, 1.6 + 0.42 * len(steps)), 3.0 + _legend_inches(len(series) + 1))
        ax = fig.subplots()
        x = np.arange(1, len(steps) + 1)
        shown = [v for values in series.values() for v in values if v is not None]
        if reference is not None:
            shown.append(reference)
            ax.axhline(reference, color=theme.INK, linewidth=1.0, linestyle=(0, (2, 3)))
            ax.plot(
                [0], [reference], color=theme.INK, marker="o", markersize=4, linestyle="none", label="before any task"
            )
        for index, (name, values) in enumerate(series.items()):
            y = np.array([np.nan if v is None else v for v in values], dtype=float)
            ax.plot(
                x[: len(y)],
                y,
                color=theme.colour(index),
                marker=theme.marker(index),
                markersize=4.5,
                linewidth=1.8,
                label=name,
            )
        first = 0 if reference is not None else 1
        ax.set_xlim(first - 0.3, len(steps) + 0.3)
        labels = ["start", *steps] if reference is not None else list(steps)
        ax.set_xticks(range(first, len(steps) + 1), labels, rotation=25, ha="right", rotation_mode="anchor")
        _percent_axis(ax, max(shown, default=0.0))
        ax.set_ylabel(ylabel)
        ax.set_xlabel("after task")
        fig.legend(loc="outside lower center", ncols=2)
    return fig


def top_of(largest: float) -> float:
    """Upper end of an axis of rates whose largest is `largest` (0..1): 2 % is drawn on an axis of a few percent."""
    return next((top for top in (0.02, 0.05, 0.1, 0.2, 0.5) if largest <= 0.92 * top), 1.0)


def _percent_axis(ax: Axes, largest: float) -> None:
    top = top_of(largest)
    # A little room on both sides, so that a marker at 0 or at the top is whole.
    ax.set_ylim(-0.02 * top, 1.02 * top)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if top >= 0.1 else 1))


def _legend_inches(entries: int, columns: int = 2) -> float:
    """Height that a legend below the axes takes."""
    return 0.2 * math.ceil(entries / columns)


def bars(groups: Mapping[str, Mapping[str, Interval]]) -> Figure:
    """Horizontal bars with intervals: one panel per metric, one bar per method, each panel with its own scale."""
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    shown = dict(zip(names, theme.labels(names), strict=True))
    groups = {metric: {shown[name]: v for name, v in values.items()} for metric, values in groups.items()}
    methods = list(shown.values())
    columns = min(2, len(groups))
    lines = math.ceil(len(groups) / columns)
    with theme.drawing():
        fig = theme.figure(WIDTH, lines * (0.75 + 0.27 * len(methods)))
        axes = fig.subplots(lines, columns, squeeze=False, sharey=True)
        y = np.arange(len(methods))
        for ax in axes.flat[len(groups) :]:
            ax.axis("off")
        for ax, (metric, values) in zip(axes.flat, groups.items(), strict=False):
            for index, name in enumerate(methods):
                if name not in values:
                    continue
                value, low, high = (100 * v for v in values[name])
                ax.barh(index, value, color=theme.colour(index), height=0.66)
                if not (math.isnan(low) or math.isnan(high)):
                    ax.plot([low, high], [index, index], color=theme.INK, linewidth=1.3)
                    ax.plot([low, high], [index, index], color=theme.INK, marker="|", markersize=6, linestyle="none")
            ax.axvline(0, color=theme.INK, linewidth=0.8)
            ax.set_title(f"{metric}, %", fontsize=9)
            ax.grid(visible=False, axis="y")
            ax.margins(x=0.08)
            ax.tick_params(axis="y", length=0)
        first = next(axes.flat)
        first.set_yticks(y, methods)
        first.invert_yaxis()
    return fig


def price(points: Mapping[str, tuple[float, float]], *, xlabel: str, ylabel: str) -> Figure:
    """Two rates (0..1) of every method against each other, named beside the point: what safety costs in skill."""
    with theme.drawing():
        fig = theme.figure(WIDTH, 3.1 + _legend_inches(len(points)))
        ax = fig.subplots()
        for index, (name, (x, y)) in enumerate(points.items()):
            mark = theme.marker(index)
            ax.plot([x], [y], color=theme.colour(index), marker=mark, markersize=8, linestyle="none", label=name)
        top = top_of(max((x for x, _ in points.values()), default=0.0))
        ax.set_xlim(-0.03 * top, 1.03 * top)
        ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if top >= 0.1 else 1))
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.margins(y=0.12)
        ax.set_xlabel(xlabel)
        ax.set_ylabel(ylabel)
        fig.legend(loc="outside lower center", ncols=2)
    return fig


def behaviour(shares: Mapping[str, Mapping[str, float]]) -> Figure:
    """What replies to forbidden requests did: one stacked bar per row name, parts as `theme.BEHAVIOUR`."""
    shares = theme.labelled(shares)
    with theme.drawing():
        fig = theme.figure(WIDTH, 1.25 + 0.3 * len(shares))
        ax = fig.subplots()
        for index, parts in enumerate(shares.values()):
            left = 0.0
            for kind, shade in theme.BEHAVIOUR.items():
                width = float(parts.get(kind) or 0.0)
                ax.barh(
                    index,
                    width,
                    left=left,
                    color=shade,
                    height=0.68,
                    label=kind.replace("_", " ") if index == 0 else None,
                )
                if width >= 0.07:
                    rgb = tuple(int(shade[i : i + 2], 16) / 255 for i in (1, 3, 5))
                    ax.text(
                        left + width / 2,
                        index,
                        f"{100 * width:.0f}",
                        ha="center",
                        va="center",
                        fontsize=8,
                        color=theme.text_on(rgb),
                    )
                left += width
        ax.set_yticks(range(len(shares)), list(shares))
        ax.invert_yaxis()
        ax.set_xlim(0, 1)
        ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", length=0)
        fig.legend(loc="outside upper center", ncols=3)
    return fig


# Figures of one edited layer that are worth a map, with how they are read.
EDIT_PANELS = {
    "overlap": "overlap of safety and task columns",
    "safety_share": "share of columns kept for safety alone",
    "alpha": "alpha",
    "coefficient": "coefficient of the projection",
    "share_reverted": "share of the update taken back",
}
# One sentence for each.
EDIT_WORDS = {
    "overlap": "How many of the columns that matter most for refusals matter most for the task too: where it is high, "
    "the two cannot be told apart by columns.",
    "safety_share": "Which part of the columns returned to their old values because refusals alone rest on them.",
    "alpha": "How much the task's say counts against safety's where both claim a column: high means that the task "
    "counts more.",
    "coefficient": "How much of the change lay along the old weights and was taken away; near zero for LoRA.",
    "share_reverted": "Which part of the squared change was taken back: 0 leaves the tuned layer, 1 brings the old one "
    "back.",
}


def edit_panels(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """The figures of EDIT_PANELS that these rows have; the coefficient only where an edit has a projection."""
    panels = [key for key in EDIT_PANELS if any(_number(row.get(key)) is not None for row in rows)]
    if not any(_number(row.get("coefficient")) for row in rows):
        panels = [key for key in panels if key != "coefficient"]
    return panels


def edit_map(rows: Sequence[Mapping[str, object]], only: Sequence[str] | None = None) -> Figure:
    """Per-layer map of an edit: blocks from left to right, linear layers from top to bottom, one panel per figure.

    rows: each with `block` (int), `linear` (last parts of the module's name) and the figures named in EDIT_PANELS.
    only: of these figures; by default all that the rows have.
    """
    panels = list(only) if only is not None else edit_panels(rows)
    linears = list(dict.fromkeys(str(row["linear"]) for row in rows))
    blocks = sorted({int(str(row["block"])) for row in rows})
    with theme.drawing():
        columns = min(len(panels), 2 if len(blocks) <= 12 else 1) or 1
        lines = max(1, math.ceil(len(panels) / columns))
        fig = theme.figure(
            columns * (1.7 + min(7.0, max(1.8, 0.22 * len(blocks)))), lines * (0.85 + 0.24 * len(linears))
        )
        axes = fig.subplots(lines, columns, squeeze=False)
        for ax in axes.flat[len(panels) :]:
            ax.axis("off")
        for ax, key in zip(axes.flat, panels, strict=False):
            grid = np.full((len(linears), len(blocks)), np.nan)
            for row in rows:
                value = _number(row.get(key))
                if value is not None:
                    grid[linears.index(str(row["linear"])), blocks.index(int(str(row["block"])))] = value
            ax.grid(visible=False)
            edges = np.arange(len(blocks) + 1) - 0.5, np.arange(len(linears) + 1) - 0.5
            image = ax.pcolormesh(*edges, np.ma.masked_invalid(grid), cmap="viridis")
            ax.invert_yaxis()
            bar = fig.colorbar(image, ax=ax, pad=0.02)
            bar.ax.tick_params(labelsize=7, labelcolor=theme.INK, color=theme.LINE)
            bar.outline.set_edgecolor(theme.LINE)  # type: ignore[operator]
            ax.set_xticks(*_ticks(blocks))
            ax.set_yticks(range(len(linears)), linears, fontsize=8)
            ax.set_title(EDIT_PANELS[key], fontsize=9)
            ax.set_xlabel("decoder block")
            ax.spines[:].set_visible(False)
            ax.tick_params(length=0)
    return fig


def routing_map(shares: Matrix, tasks: Sequence[str], experts: Sequence[str]) -> Figure:
    """Which expert answered which task: rows = task of the request, columns = expert, mean routing mass."""
    tasks, experts = theme.labels(tasks), theme.labels(experts)
    with theme.drawing():
        fig = theme.figure(2.2 + 0.52 * len(experts), 1.4 + 0.4 * len(tasks))
        ax = fig.subplots()
        _heat(ax, shares, experts, tasks, "routing mass, %")
        ax.set_xlabel("expert")
        ax.set_ylabel("task of the request")
    return fig


def _ticks(blocks: Sequence[int]) -> tuple[list[int], list[str]]:
    step = max(1, math.ceil(len(blocks) / 12))
    return list(range(0, len(blocks), step)), [str(b + 1) for b in blocks[::step]]


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return None
    return float(value)


def trade_off(
    strengths: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    *,
    chosen: int | None = None,
    bounds: Mapping[str, float] | None = None,
) -> Figure:
    """A line per figure over the strengths of an edit, the ends being the tuned model and the one before.

    strengths: tick labels, weakest first. series: rates 0..1, one per strength, None where not measured.
    chosen: index of the strength that was taken. bounds: series -> its bound.
    """
    shown = dict(zip(series, theme.labels(series), strict=True))
    series, bounds = theme.labelled(series), {shown.get(name, name): v for name, v in (bounds or {}).items()}
    strengths = theme.labels(strengths)
    with theme.drawing():
        fig = theme.figure(max(WIDTH, 1.2 + 0.31 * len(strengths)), 3.9)
        ax = fig.subplots()
        x = np.arange(len(strengths))
        if chosen is not None:
            ax.axvspan(chosen - 0.32, chosen + 0.32, color=theme.LINE, alpha=0.55, linewidth=0)
            ax.annotate(
                "taken",
                (chosen, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontweight="bold",
            )
        for index, (name, values) in enumerate(series.items(), 1):
            y = np.array([np.nan if v is None else v for v in values], dtype=float)
            known = ~np.isnan(y)
            shade, mark = theme.colour(index), theme.marker(index)
            ax.plot(
                x[known], y[known], label=name, color=shade, marker=mark, markersize=5, linewidth=2.0, clip_on=False
            )
            if bounds and name in bounds:
                ax.axhline(bounds[name], color=theme.colour(index), linewidth=1.0, linestyle=(0, (4, 3)))
        ax.set_xlim(-0.5, len(strengths) - 0.5)
        known_rates = [v for values in series.values() for v in values if v is not None]
        top = top_of(max([*known_rates, *(bounds or {}).values()], default=0.0))
        ax.set_ylim(0, top)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if top >= 0.1 else 1))
        ax.set_xticks(x, strengths, fontsize=7.5 if len(strengths) > 9 else None)
        ax.set_xlabel("strength of the edit: how firmly the model before holds")
        ax.grid(visible=False, axis="x")
        fig.legend(loc="outside upper left", ncols=1)
    return fig
