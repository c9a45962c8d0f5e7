"""Figures show what there is, and no panel of nothing."""

from __future__ import annotations

import pytest

from holdfast.reports.figures import EDIT_PANELS, EDIT_WORDS, along_stream, edit_map, price, top_of, trade_off


def panels(rows) -> set[str]:
    return {ax.get_title() for ax in edit_map(rows).axes} - {""}


def test_an_edit_without_a_projection_has_no_map_of_its_coefficient():
    rows = [{"block": b, "linear": "q_proj", "overlap": 0.5, "alpha": 0.4, "coefficient": 1e-5 * b} for b in range(3)]
    expected = {EDIT_PANELS[key] for key in ("overlap", "alpha")}
    assert panels(rows) == expected | {EDIT_PANELS["coefficient"]}
    assert panels([{**row, "coefficient": 0.0} for row in rows]) == expected


def test_every_panel_has_a_sentence():
    assert set(EDIT_WORDS) == set(EDIT_PANELS)


@pytest.mark.parametrize(
    "largest, top",
    [(0.0, 0.02), (0.015, 0.02), (0.02, 0.05), (0.09, 0.1), (0.095, 0.2), (0.3, 0.5), (0.47, 1.0), (1.0, 1.0)],
)
def test_an_axis_is_as_long_as_its_data(largest, top):
    assert top_of(largest) == top
    drawn = (
        along_stream({"a": [0.0, largest]}, ["t1", "t2"], "y", reference=0.0).axes[0].get_ylim()[1],
        trade_off(["tuned", "1"], {"a": [largest, 0.0]}).axes[0].get_ylim()[1],
        price({"a": (largest, 0.5), "b": (0.0, 0.5)}, xlabel="x", ylabel="y").axes[0].get_xlim()[1],
    )
    for end in drawn:
        assert top <= end <= 1.05 * top


@pytest.mark.parametrize("count", [1, 3, 12])
def test_a_legend_lies_inside_its_picture(count):
    names = [f"CRAM, never the base {n}" for n in range(count)]
    for fig in (
        along_stream({name: [0.1, 0.2] for name in names}, ["t1", "t2"], "y", reference=0.0),
        price(dict.fromkeys(names, (0.1, 0.2)), xlabel="x", ylabel="y"),
        trade_off(["tuned", "1"], {name: [0.1, 0.2] for name in names[:3]}),
    ):
        fig.canvas.draw()
        (legend,) = fig.legends
        box, whole = legend.get_window_extent(), fig.bbox
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1
        assert fig.axes[0].get_window_extent().height > 0.35 * whole.height
