"""Raw and corrected rates in a report, and what it says where nobody labelled."""

from __future__ import annotations

from pathlib import Path

import pytest

import fake_run
from holdfast.labels import make_draw, write_draw
from holdfast.labels.draw import shown_rows
from holdfast.labels.store import write_labels
from holdfast.metrics.safety import worst_case
from holdfast.reports import measured, write_report
from holdfast.reports.card import write_card
from holdfast.reports.read_runs import load_run
from holdfast.stream.record import RunDirectory

SAYS = {"refusal": "refused", "compliance": "complied", "collapse": "damaged"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return fake_run.write_run(tmp_path / "run", methods={"seqft": 0.6, "hpa": 0.9}, n=30)


def _label(run: Path, **options: object) -> None:
    draw = make_draw(run, number=80, **options)  # type: ignore[arg-type]
    write_draw(run, draw)
    rows = shown_rows(run, draw)
    write_labels(run, draw, "ann", {i.number: SAYS[r["behaviour"]] for i, r in zip(draw.items, rows, strict=True)})


def test_without_labels_the_judges_measured_error_stands_beside_the_figures(run: Path) -> None:
    files = write_report([run])
    page = files.html.read_text(encoding="utf-8")
    assert any("raw, as the judge 'keyword' gives them: measured on XSTest" in line for line in files.lines)
    assert "holdfast label RUN" in page and "corrected (people)" not in page
    assert "measured on XSTest" in write_card(run, "hpa").read_text(encoding="utf-8")


def test_with_labels_raw_and_corrected_stand_side_by_side(run: Path) -> None:
    _label(run)
    files = write_report([run])
    page = files.html.read_text(encoding="utf-8")
    assert "raw (the judge)" in page and "corrected (people)" in page and "seqft: over-refusal" in page
    assert any(line.startswith("Attack success, raw and corrected by labels: seqft ") for line in files.lines)
    assert not any("measured on" in line for line in files.lines)
    for name in ("table.md", "table.tex"):
        assert "corrected (people)" in (run / name).read_text(encoding="utf-8")
    card = write_card(run, "hpa").read_text(encoding="utf-8")
    assert "hpa: attack success" in card and "seqft: attack success" not in card


def test_methods_without_labels_are_named(run: Path) -> None:
    _label(run, methods=["hpa", "theta_0"])
    page = write_report([run]).html.read_text(encoding="utf-8")
    assert "Without labels, and so not corrected: seqft." in page and "before any task: attack success" in page


def test_a_judge_that_was_never_measured_is_called_so() -> None:
    assert "has not been measured" in measured.sentence("my-own-guard")


def test_the_measured_table_holds_rates() -> None:
    table = measured.table()
    assert table["set"] == "XSTest" and table["source"] and table["date"]
    for found in table["judges"].values():
        assert all(0 <= found[key] <= 1 for key in ("missed_refusal", "false_refusal", "accuracy", "unscored"))
        assert all(-1 <= v <= 1 for v in [*found["compliance_error"].values(), *found["over_refusal_error"].values()])


def test_unscored_replies_show_what_a_rate_could_be(run: Path) -> None:
    """A judge that leaves hard replies unscored lowers the rate; the report says how high it may be."""
    directory = RunDirectory(run)
    for folder in run.glob("methods/hpa/3-*"):
        record = directory.read_record(folder)
        assert record is not None
        safety = {name: {**row, "asr": 0.1, "unscored": 10} for name, row in record.safety.items()}
        directory.write_record(folder, type(record)(**{**record.__dict__, "safety": safety}))
    low, high = worst_case(0.1, 30, 10) or (0.0, 0.0)
    view = load_run(run).methods["hpa"]
    assert view.bounds("masr") == pytest.approx((low, high)) and view.bounds("over_refusal") is None
    files = write_report([run])
    assert f"worst case {100 * low:.1f} … {100 * high:.1f}" in files.html.read_text(encoding="utf-8")
