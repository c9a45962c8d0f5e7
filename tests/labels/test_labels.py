"""People's labels beside a run: what is drawn, what is stored, what a form gives away, and the rates that follow."""

from __future__ import annotations

import html.parser
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import fake_run
from holdfast.errors import ConfigError, HoldfastError, RunError, UnknownNameError
from holdfast.labels import (
    LABELS,
    Draw,
    Labels,
    correct,
    import_labels,
    make_draw,
    read_draw,
    read_labels,
    write_draw,
    write_form,
    write_label,
)
from holdfast.labels.draw import draw_from, shown_rows
from holdfast.labels.estimate import estimate
from holdfast.labels.form import visible
from holdfast.labels.store import DECIDED, write_labels

SAYS = {"refusal": "refused", "compliance": "complied", "collapse": "damaged"}
METHODS = {"seqft": 0.6, "hpa": 0.9}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return fake_run.write_run(tmp_path / "run", methods=METHODS, n=40)


def _labelled(run: Path, draw: Draw, annotator: str = "ann") -> None:
    """Labels that agree with the judge."""
    rows = shown_rows(run, draw)
    write_labels(run, draw, annotator, {i.number: SAYS[r["behaviour"]] for i, r in zip(draw.items, rows, strict=True)})


def test_every_verdict_of_every_method_and_side_is_drawn_from(run: Path) -> None:
    draw = make_draw(run, number=80)
    assert len(draw.items) == 80 and draw.methods == ["seqft", "hpa"]
    seen = {(s.method, s.side, s.behaviour, name) for s in draw.strata for name in s.sizes}
    for method in METHODS:
        for name in fake_run.SETS:
            path = run / "methods" / method / "3-caption" / "predictions" / f"safety-{name.replace(' + ', '-')}.jsonl"
            for row in map(json.loads, path.read_text().splitlines()):
                assert (method, row["side"], row["behaviour"], name) in seen
    assert all(0 < s.inclusion <= 1 for s in draw.strata)
    drawn, sizes = Counter(), Counter()
    for s in draw.strata:
        drawn[s.method, s.side, s.behaviour] += s.drawn
        sizes[s.method, s.side, s.behaviour] += s.size
    assert all(drawn[key] >= min(2, size) for key, size in sizes.items())
    per_cell = Counter((draw.strata[i.stratum].method, draw.strata[i.stratum].side) for i in draw.items)
    assert set(per_cell.values()) == {20}


def test_a_beginning_of_the_order_holds_a_part_of_every_method(run: Path) -> None:
    draw = make_draw(run, number=80)
    per_cell = Counter((draw.strata[i.stratum].method, draw.strata[i.stratum].side) for i in draw.items[:40])
    assert len(per_cell) == 4 and min(per_cell.values()) >= 5


def test_a_draw_reads_back_and_belongs_to_its_seed(run: Path) -> None:
    draw = make_draw(run, number=60, seed=3)
    path = write_draw(run, draw)
    assert read_draw(run) == draw == make_draw(run, number=60, seed=3) != make_draw(run, number=60, seed=4)
    stored = json.loads(path.read_text())
    assert all(s["inclusion"] == s["drawn"] / s["size"] for s in stored["strata"])
    with pytest.raises(RunError, match="holds another draw"):
        write_draw(run, make_draw(run, number=61))
    for change in ({"seed": 9}, {"items": stored["items"][1:]}, {"strata": [{}]}, {"format": "x"}):
        path.write_text(json.dumps({**stored, **change}))
        with pytest.raises(RunError, match=r"changed after it was drawn|is damaged|not written by"):
            read_draw(run)


def test_too_few_labels_for_the_methods_say_how_many_are_needed(run: Path) -> None:
    with pytest.raises(ConfigError, match="at least --number") as caught:
        make_draw(run, number=5)
    needed = int(str(caught.value).split("--number ")[1].split(",")[0])
    assert len(make_draw(run, number=needed).items) == needed
    with pytest.raises(ConfigError, match="at least --number"):
        make_draw(run, number=needed - 1)
    with pytest.raises(ConfigError, match="--number is 0"):
        make_draw(run, number=0)
    with pytest.raises(UnknownNameError, match="hpa"):
        make_draw(run, number=50, methods=["hpaa"])
    assert len(make_draw(run, number=10_000).items) == 2 * 2 * 2 * 40
    assert make_draw(run, number=50, methods=["theta_0"]).steps == {"theta_0": 0}


def test_no_run_and_no_safety_sets_are_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(RunError, match="is no run directory"):
        make_draw(tmp_path / "nothing")
    for record in run.glob("**/record.json"):
        record.write_text(json.dumps({**json.loads(record.read_text()), "safety": {}}))
    with pytest.raises(RunError, match="nothing to label"):
        make_draw(run)


def test_replies_that_changed_are_not_corrected_by_old_labels(run: Path) -> None:
    draw = make_draw(run, number=80)
    write_draw(run, draw)
    _labelled(run, draw)
    found = correct(run)
    assert found is not None and set(found.methods) == set(METHODS) and not found.left_out
    path = next((run / "methods" / "hpa" / "3-caption" / "predictions").glob("safety-text.jsonl"))
    path.write_text(path.read_text().replace("I cannot", "I can"))
    found = correct(run)
    assert found is not None and set(found.methods) == {"seqft"} and "made again" in found.left_out[0]
    with pytest.raises(RunError, match="hpa have changed since they were drawn"):
        shown_rows(run, draw)


def test_a_new_verdict_on_the_same_replies_keeps_the_labels(run: Path) -> None:
    draw = make_draw(run, number=80)
    write_draw(run, draw)
    _labelled(run, draw)
    before = correct(run)
    for path in run.glob("methods/*/3-caption/predictions/safety-*.jsonl"):
        path.write_text(path.read_text().replace('"behaviour": "collapse"', '"behaviour": "other_safe"'))
    after = correct(run)
    assert before is not None and after is not None and before.to_json() == after.to_json()


def test_labels_resume_replace_and_are_taken_back(run: Path) -> None:
    draw = make_draw(run, number=60)
    write_draw(run, draw)
    write_label(run, draw, "ann", 1, "refused")
    write_label(run, draw, "ann", 2, "complied")
    write_label(run, draw, "ann", 1, "damaged")
    write_label(run, draw, "bob", 2, "complied")
    write_label(run, draw, "ann", 2, None)
    assert read_labels(run, draw).by_annotator == {"ann": {1: "damaged"}, "bob": {2: "complied"}}
    for number, label in ((0, "refused"), (61, "refused"), (True, "refused"), (1, "safe")):
        with pytest.raises(HoldfastError, match=r"expected a number from 1 to 60|Unknown label"):
            write_label(run, draw, "ann", number, label)
    for name in ("", "../x", "a b", "x" * 41, ".hidden"):
        with pytest.raises(ConfigError, match="annotator is"):
            write_label(run, draw, name, 1, "refused")


BAD_LINES = {
    "not json": "{",
    "a list": "[1]",
    "a key is missing": '{"draw": "D", "item": 1, "label": "refused"}',
    "another draw": '{"draw": "0000", "item": 1, "label": "refused", "annotator": "ann"}',
    "no such label": '{"draw": "D", "item": 1, "label": "unsafe", "annotator": "ann"}',
    "no such item": '{"draw": "D", "item": 999, "label": "refused", "annotator": "ann"}',
    "item is text": '{"draw": "D", "item": "1", "label": "refused", "annotator": "ann"}',
    "a name that leaves the folder": '{"draw": "D", "item": 1, "label": "refused", "annotator": "../../x"}',
    "annotator is a number": '{"draw": "D", "item": 1, "label": "refused", "annotator": 1}',
    "label is a list": '{"draw": "D", "item": 1, "label": ["refused"], "annotator": "ann"}',
    "two labels": '{"draw": "D", "item": 7, "label": "damaged", "annotator": "ann"}',
    "nothing": "",
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_file_with_one_bad_line_imports_nothing(run: Path, kind: str, tmp_path: Path) -> None:
    draw = make_draw(run, number=60)
    write_draw(run, draw)
    good = {"draw": draw.digest, "item": 7, "label": "refused", "annotator": "ann"}
    bad = BAD_LINES[kind].replace('"D"', f'"{draw.digest}"')
    file = tmp_path / "in.jsonl"
    file.write_text(("" if kind == "nothing" else json.dumps(good) + "\n") + bad + "\n")
    with pytest.raises(HoldfastError):
        import_labels(run, draw, file)
    assert not read_labels(run, draw).by_annotator


def test_import_counts_what_is_new_and_what_is_replaced(run: Path, tmp_path: Path) -> None:
    draw = make_draw(run, number=60)
    write_draw(run, draw)
    write_label(run, draw, "ann", 1, "refused")
    lines = [{"draw": draw.digest, "item": i, "label": "damaged", "annotator": "ann"} for i in (1, 2)]
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert import_labels(run, draw, file) == {"ann": (1, 1)}
    assert import_labels(run, draw, file, annotator="bob") == {"bob": (2, 0)}


def _of(*people: dict[int, str], settled: dict[int, str] | None = None) -> Labels:
    named: dict[str, dict[int, str]] = {f"p{i}": labels for i, labels in enumerate(people)}
    if settled:
        named["settled"] = settled
    return Labels(draw=None, by_annotator=named)  # type: ignore[arg-type]


def test_what_counts_is_what_people_agree_on() -> None:
    labels = _of({1: "refused", 2: "refused", 4: "complied"}, {1: "refused", 2: "complied"})
    assert labels.final() == {
        1: {"refused"},
        2: {"refused", "complied"},
        3: DECIDED,  # passed over
        4: {"complied"},
    }
    assert labels.disagreements() == [2] and labels.done == 3
    assert _of({1: "refused"}, {1: "complied"}, settled={1: "damaged"}).final() == {1: {"damaged"}}
    assert _of({1: "refused"}, {1: "complied"}, settled={1: "damaged"}).disagreements() == []
    assert _of({1: "refused"}, {1: "complied"}, {1: "refused"}).final() == {1: {"refused"}}
    assert _of({1: "refused"}, {1: "cannot_tell"}).final() == {1: DECIDED}
    assert _of({1: "cannot_tell"}).final() == {1: DECIDED}


def test_agreement_is_of_the_replies_that_both_could_tell() -> None:
    a = {1: "refused", 2: "complied", 3: "refused", 4: "cannot_tell", 5: "refused"}
    b = {1: "refused", 2: "complied", 3: "complied", 4: "refused"}
    found = _of(a, b).agreements()["p0", "p1"]
    assert (
        (found.n, found.skipped) == (3, 1) and found.raw == pytest.approx(2 / 3) and found.kappa == pytest.approx(0.4)
    )


def test_a_census_that_agrees_with_the_judge_gives_the_judges_rates(run: Path) -> None:
    draw = make_draw(run, number=10_000)
    write_draw(run, draw)
    _labelled(run, draw)
    found = correct(run)
    assert found is not None
    for method in METHODS:
        record = json.loads((run / "methods" / method / "3-caption" / "record.json").read_text())["safety"]
        for figure in ("compliance", "collapse", "refusal"):
            rate = found.methods[method]["unsafe"][figure]
            wanted = np.mean([row[figure] for row in record.values()])
            assert (rate.low, rate.value, rate.high) == pytest.approx((wanted, wanted, wanted), abs=1e-6)
        for name, row in record.items():
            rate = found.sets[method, name]["benign"]["over_refusal"]
            assert rate.value == pytest.approx(row["benign"]["over_refusal"])


def test_cannot_tell_and_disagreement_widen_only_the_figures_they_touch(run: Path) -> None:
    draw = make_draw(run, number=80)
    write_draw(run, draw)
    _labelled(run, draw)
    plain = estimate(read_labels(run, draw)).methods["seqft"]["unsafe"]
    of_seqft = [i.number for i in draw.items if draw.strata[i.stratum].method == "seqft"]
    said = read_labels(run, draw).by_annotator["ann"]
    write_labels(run, draw, "bob", {n: "other_safe" for n in of_seqft if said[n] == "complied"})
    differ = estimate(read_labels(run, draw)).methods["seqft"]["unsafe"]
    assert differ["compliance"].worst_low == 0 and differ["compliance"].high >= plain["compliance"].high
    assert differ["refusal"] == plain["refusal"] and differ["not_refused"].undecided == 0


def test_an_unfinished_labelling_is_open_about_what_is_missing(run: Path) -> None:
    draw = make_draw(run, number=80)
    write_draw(run, draw)
    assert correct(run) is None
    rows = shown_rows(run, draw)
    for item, row in list(zip(draw.items, rows, strict=True))[:6]:
        write_label(run, draw, "ann", item.number, SAYS[row["behaviour"]])
    found = correct(run)
    assert found is not None
    rates = [rate for figures in found.methods.values() for kinds in figures.values() for rate in kinds.values()]
    assert not any(rate.enough for rate in rates) and all(rate.reason for rate in rates)
    json.dumps(found.to_json(), allow_nan=False)


def test_rates_of_methods_and_sets_of_other_sizes_are_covered() -> None:
    """Two methods with opposite judge errors, two sets of other sizes: the mean over sets, method by method."""
    rng = random.Random(0)
    truth: dict[str, float] = {}
    people: dict[tuple[str, str], list[str]] = {}
    cells: dict[tuple[str, str], dict[str, dict[str, list[int]]]] = {}
    for method, wrong in (("a", 0.35), ("b", 0.05)):
        rates = []
        for name, size, harm in (("small", 60, 0.5), ("large", 240, 0.2)):
            said = ["complied" if rng.random() < harm else "refused" for _ in range(size)]
            people[method, name] = said
            for index, label in enumerate(said):
                verdict = "compliance" if (label == "complied") != (rng.random() < wrong) else "refusal"
                cells.setdefault((method, "unsafe"), {}).setdefault(verdict, {}).setdefault(name, []).append(index)
            rates.append(said.count("complied") / size)
        truth[method] = float(np.mean(rates))
    inside: dict[str, list[bool]] = {"a": [], "b": [], "both": []}
    values: dict[str, list[float]] = {"a": [], "b": [], "both": []}
    for seed in range(30):
        strata, items = draw_from(cells, 100, seed=seed)
        draw = Draw(seed=seed, number=100, judge="j", steps={"a": 1, "b": 1}, replies={}, strata=strata, items=items)
        labels = {i.number: people[strata[i.stratum].method, i.set][i.row] for i in items}
        found = estimate(Labels(draw=draw, by_annotator={"p": labels}))
        for name in inside:
            rate = (found.pooled if name == "both" else found.methods[name])["unsafe"]["asr"]
            wanted = np.mean(list(truth.values())) if name == "both" else truth[name]
            inside[name].append(rate.low <= wanted <= rate.high)
            values[name].append((rate.value or 0.0) - wanted)
    assert all(np.mean(hits) >= 0.9 for hits in inside.values()), {k: np.mean(v) for k, v in inside.items()}
    assert all(abs(np.mean(errors)) < 0.02 for errors in values.values())


class _Scripts(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts.append(data)


HOSTILE = (
    "</script><script>document.title='owned'</script>",
    "<!--<script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "{{ 7*7 }}{% raw %}",
    "\u2028\u2029\ud800 \u202e evil",
    "'; alert(1); //",
    "\\u003c/script\\u003e",
)


def test_a_form_holds_hostile_text_as_data_and_gives_nothing_away(run: Path, tmp_path: Path) -> None:
    draw = make_draw(run, number=60)
    rows = shown_rows(run, draw)
    for row, text in zip(rows, HOSTILE, strict=False):
        row["reply"], row["prompt"] = text, text
    text = write_form(tmp_path / "form.html", draw, rows).read_text(encoding="utf-8")
    page = _Scripts()
    page.feed(text)
    assert [t for t, _ in page.tags].count("script") == 2 and "img" not in [t for t, _ in page.tags]
    assert not any(k.startswith("on") for _, attrs in page.tags for k in attrs)
    data = json.loads(page.scripts[0])
    assert [item["reply"] for item in data["items"]][: len(HOSTILE)] == list(HOSTILE)
    assert {c["label"] for c in data["choices"]} == set(LABELS)
    assert all(set(item) == {"item", "request", "reply", "images"} for item in data["items"])
    for secret in (
        "seqft",
        "hpa",
        "keyword",
        "compliance",
        "collapse",
        "unsafe0",
        "benign0",
        "image + text",
        "picture.png",
    ):
        assert secret not in text
    assert "http" not in text.replace("http-equiv", "") and "default-src 'none'" in text


def test_a_terminal_obeys_nothing_that_a_reply_says() -> None:
    assert visible("a\tb\nc é 中 \u200d") == "a\tb\nc é 中 \u200d"
    for control in ("\x1b[2J", "\x9b2J", "\r", "\x08", "\x7f", "\u202e", "\u2066", "\u2028", "\ud800", "\x00", "\x85"):
        shown = visible(f"x{control}y")
        assert shown.isascii() and shown.startswith("x\\") and shown.endswith("y")
