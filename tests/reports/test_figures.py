"""Figures show what there is, and no panel of nothing."""

from __future__ import annotations

from holdfast.reports.figures import EDIT_PANELS, edit_map


def panels(rows) -> set[str]:
    return {ax.get_title() for ax in edit_map(rows).axes} - {""}


def test_an_edit_without_a_projection_has_no_map_of_its_coefficient():
    rows = [{"block": b, "linear": "q_proj", "overlap": 0.5, "alpha": 0.4, "coefficient": 1e-5 * b} for b in range(3)]
    expected = {EDIT_PANELS[key] for key in ("overlap", "alpha")}
    assert panels(rows) == expected | {EDIT_PANELS["coefficient"]}
    assert panels([{**row, "coefficient": 0.0} for row in rows]) == expected
