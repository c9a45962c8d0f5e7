"""What a report claims must be in the records; what a model said must stay text."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import fake_run
from holdfast.data.names import slug
from holdfast.errors import RunError, UnknownNameError
from holdfast.metrics.continual import summarize
from holdfast.metrics.intervals import bootstrap_mean, over_seeds
from holdfast.reports import theme, write_report
from holdfast.reports.card import write_card
from holdfast.reports.compare import Entry, Group, difference, in_words
from holdfast.reports.read_runs import load_run, read_rows
from holdfast.reports.seeds import group_runs
from holdfast.reports.titles import TITLES, title_of
from holdfast.reports.verdict import COMPARED, pairs, verdict
from holdfast.reports.write import ReportFiles
from holdfast.stream.summary import summarize_run

METHODS = {"seqft": 0.6, "hpa": 0.9, "largest_change": 0.8}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run.write_run(tmp_path_factory.mktemp("runs") / "one", methods=METHODS)


@pytest.fixture(scope="module")
def written(run: Path) -> ReportFiles:
    return write_report([run])


@pytest.fixture(scope="module")
def page(written: ReportFiles) -> str:
    return written.html.read_text(encoding="utf-8")


@pytest.fixture
def unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are made and not painted, which is most of a report's time: for tests that read its words alone."""
    monkeypatch.setattr(theme, "png", lambda figure: b"")
    monkeypatch.setattr(theme, "svg", lambda figure, *words: "<svg></svg>")


def configure(run: Path, *, methods: dict[str, Any] | None = None, **config: Any) -> Path:
    """Record other settings in a run's config.json: of the methods, and those they share."""
    path = run / "config.json"
    data = json.loads(path.read_text())
    data["config"] |= config
    data["methods"] |= methods or {}
    path.write_text(json.dumps(data))
    return run


def cut(run: Path, method: str, *, after: int) -> Path:
    """As if the run had been killed while `method` learned task `after` + 1."""
    for step in range(after, len(fake_run.TASKS)):
        (run / f"methods/{method}/{step + 1}-{fake_run.TASKS[step]}/record.json").unlink()
    return run


def entries_of(group: Group) -> dict[str, Entry]:
    return {entry.label: entry for entry in group.entries}


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_model_output_stays_text_and_the_page_asks_for_nothing_outside(page: str) -> None:
    parsed = _Tags()
    parsed.feed(page)
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"script", "iframe", "object", "embed", "link", "form"}
    for tag, attributes in parsed.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/png", "#")), (tag, value)
    assert fake_run.HOSTILE in html.unescape("".join(parsed.text))


def test_every_figure_of_the_table_is_in_the_records(run: Path, page: str) -> None:
    view = load_run(run)
    for name, found in view.methods.items():
        matrix = [[r.scores[t]["value"] if t in r.scores else float("nan") for t in view.tasks] for r in found.records]
        expected = summarize(matrix)
        assert found.figure("ap") == pytest.approx(expected.ap)
        row = re.search(rf'<th scope="row"[^>]*>{title_of(name)}</th>(.*?)</tr>', page, flags=re.S)
        assert row is not None
        assert f"{100 * expected.ap:.1f}" in row.group(1)
        last = found.records[-1].safety
        assert f"{100 * sum(s['asr'] for s in last.values()) / len(last):.1f}" in row.group(1)


def test_shares_of_behaviour_sum_to_one(run: Path) -> None:
    for view in load_run(run).methods.values():
        assert sum(view.behaviour.values()) == pytest.approx(1.0)
        assert view.behaviour["compliance"] + view.behaviour["collapse"] == pytest.approx(view.figure("masr"))


@pytest.mark.usefixtures("unpainted")
def test_what_was_asked_after_the_last_task_alone_is_no_curve(tmp_path: Path) -> None:
    run = fake_run.write_run(tmp_path / "run", methods=METHODS)
    curves = {"attack-success", "over-refusal"}
    assert curves <= {path.stem for path in write_report([run]).pngs}
    for path in run.glob("methods/*/*/record.json"):
        if not path.parent.name.startswith(f"{len(fake_run.TASKS)}-"):
            # As `limit_between: 0` leaves it: the sets are there, and nothing of them was asked.
            record = json.loads(path.read_text())
            for found in record["safety"].values():
                for side in (found, found.get("benign", {})):
                    side |= {key: None for key, value in side.items() if isinstance(value, float)}
            path.write_text(json.dumps(record))
    drawn = {path.stem for path in write_report([run]).pngs}
    assert "behaviour" in drawn and not curves & drawn


def test_pictures_are_pngs_and_svgs_follow_the_theme(written: ReportFiles, page: str) -> None:
    assert {p.stem for p in written.pngs} >= {
        "bars",
        "accuracy",
        "behaviour",
        "attack-success",
        "over-refusal",
        "edit-hpa",
    }
    for path in written.pngs:
        with Image.open(path) as image:
            assert image.format == "PNG" and min(image.size) > 150
    assert "currentColor" in page and "#1c2431" not in page.split("</style>")[1]


def test_the_same_records_give_the_same_bytes(run: Path, written: ReportFiles) -> None:
    first = {p: p.read_bytes() for p in [written.html, *written.pngs, *written.tables]}
    again = write_report([run])
    assert {p: p.read_bytes() for p in [again.html, *again.pngs, *again.tables]} == first


@pytest.mark.usefixtures("unpainted")
def test_seeds_are_averaged_and_conditions_kept_apart(tmp_path: Path) -> None:
    runs = [fake_run.write_run(tmp_path / f"clean{s}", methods=METHODS, seed=s) for s in range(3)]
    runs += [fake_run.write_run(tmp_path / "bad", methods=METHODS, injected=0.01)]
    groups = group_runs([load_run(r) for r in runs])
    assert [len(g.runs) for g in groups] == [3, 1]
    files = write_report(runs, tmp_path / "out")
    text = files.html.read_text(encoding="utf-8")
    assert "1 % harmful samples injected" in text and "3 seeds" in text
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert table.count("###") == 2 and "±" in table


def test_a_clear_difference_is_told_from_noise(tmp_path: Path) -> None:
    runs = [
        load_run(fake_run.write_run(tmp_path / str(s), methods={"a": 0.5, "twin": 0.5, "better": 0.97}, seed=s, n=60))
        for s in range(4)
    ]
    (group,) = group_runs(runs)
    rows = entries_of(group)
    better, twin = (difference(rows[name], rows["a"], "AP") for name in ("better", "twin"))
    assert better is not None and better.low > 0.1
    assert twin is not None and twin.low < 0 < twin.high


@pytest.mark.usefixtures("unpainted")
def test_an_unfinished_run_is_shown_as_far_as_it_got(tmp_path: Path) -> None:
    run = fake_run.write_run(tmp_path / "run", methods=METHODS, steps=1)
    view = load_run(run)
    assert view.methods["hpa"].finished == 1
    assert "seqft 1/3 tasks" in write_report([run]).html.read_text(encoding="utf-8")


@pytest.mark.usefixtures("unpainted")
def test_an_unfinished_run_that_asks_earlier_tasks_at_its_end_alone_is_shown(tmp_path: Path) -> None:
    """As `limit_between: 0` leaves it, and as `holdfast demo` does while it runs."""
    run = fake_run.write_run(tmp_path / "run", methods=METHODS, steps=2)
    for path in run.glob("methods/*/2-*/record.json"):
        record = json.loads(path.read_text())
        earlier = fake_run.TASKS[0]
        record["scores"][earlier] |= {"value": None, "n": 0}
        path.write_text(json.dumps(record))
        (path.parent / f"predictions/task-{slug(earlier)}.jsonl").unlink()
    view = load_run(run).methods["hpa"]
    assert view.finished == 2
    assert "seqft 2/3 tasks" in write_report([run]).html.read_text(encoding="utf-8")
    learned = summarize_run(run)["methods"]["hpa"]
    assert learned["ap"] is learned["intervals"]["ap"] is learned["intervals"]["bwt"] is None


@pytest.mark.usefixtures("unpainted")
def test_an_unfinished_run_that_asks_a_part_of_earlier_tasks_is_shown(tmp_path: Path) -> None:
    """As `limit_between: 2` leaves it, and for ever where a gate stopped the method."""
    run = fake_run.write_run(tmp_path / "run", methods=METHODS, steps=2)
    for path in run.glob(f"methods/*/2-*/predictions/task-{slug(fake_run.TASKS[0])}.jsonl"):
        path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines()[:2]))
    assert load_run(run).methods["hpa"].finished == 2
    assert "seqft 2/3 tasks" in write_report([run]).html.read_text(encoding="utf-8")
    assert summarize_run(run)["methods"]["hpa"]["intervals"]["bwt"] is not None


@pytest.mark.usefixtures("unpainted")
def test_an_unfinished_method_is_marked_wherever_it_stands_beside_finished_ones(tmp_path: Path) -> None:
    run = cut(fake_run.write_run(tmp_path / "run", methods=METHODS), "hpa", after=2)
    files = write_report([run])
    page, table = files.html.read_text(encoding="utf-8"), (run / "table.md").read_text(encoding="utf-8")
    assert ">HPA (2 of 3 tasks)</th>" in page and ">HPA</th>" not in page and "<dt>HPA<span" not in page
    assert "| hpa (2 of 3 tasks) |" in table and "| seqft |" in table
    assert "hpa (2 of 3 tasks) is not compared with seqft: they finished different numbers of tasks." in files.lines
    assert any(line.startswith("largest_change against seqft: AP") for line in files.lines)
    drawn = [svg for svg in page.split("<svg")[1:] if ">HPA" in svg]
    assert drawn and all("HPA (2 of 3 tasks)" in svg for svg in drawn)
    assert "| hpa (2 of 3 tasks) |" in write_card(run, "hpa").read_text(encoding="utf-8")


@pytest.mark.usefixtures("unpainted")
def test_runs_that_finished_different_numbers_of_tasks_are_not_averaged(tmp_path: Path) -> None:
    runs = [fake_run.write_run(tmp_path / str(s), methods=METHODS, seed=s) for s in range(3)]
    cut(runs[2], "hpa", after=2)
    (group,) = group_runs([load_run(run) for run in runs])
    rows = entries_of(group)
    assert list(rows) == [
        "seqft",
        "hpa (2 of 3 seeds)",
        "hpa (2 of 3 tasks, 1 of 3 seeds)",
        "largest_change",
    ]
    assert list(rows["hpa (2 of 3 seeds)"].views) == [0, 1]
    files = write_report(runs, tmp_path / "out")
    table = (tmp_path / "out/table.md").read_text(encoding="utf-8")
    lines = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("|")}
    assert "±" in lines["seqft"] and "±" in lines["hpa (2 of 3 seeds)"]
    assert "±" not in lines["hpa (2 of 3 tasks, 1 of 3 seeds)"]
    assert any(line.startswith("hpa (2 of 3 seeds) against seqft: AP") for line in files.lines)
    assert difference(rows["hpa (2 of 3 tasks, 1 of 3 seeds)"], rows["seqft"], "AP") is None


@pytest.mark.usefixtures("unpainted")
def test_runs_of_other_settings_stand_side_by_side_and_are_named_by_them(tmp_path: Path) -> None:
    runs = []
    for seed, rate in ((0, 1e-4), (1, 1e-4), (0, 3e-4)):
        run = fake_run.write_run(tmp_path / f"{seed}-{rate}", methods=METHODS, seed=seed)
        runs.append(configure(run, methods={name: {"training": {"learning_rate": rate}} for name in METHODS}))
    groups = group_runs([load_run(run) for run in runs])
    assert [len(group.runs) for group in groups] == [2, 1]
    assert [group.title for group in groups] == [
        "fake, clean data, training.learning_rate 0.0001",
        "fake, clean data, training.learning_rate 0.0003",
    ]
    files = write_report([runs[0], runs[2]], tmp_path / "out")
    page = files.html.read_text(encoding="utf-8")
    assert "seeds" not in page.split("How this was run")[0] and "training.learning_rate 0.0003" in page
    assert len(set(files.pngs)) == len(files.pngs) == 2 * len(write_report([runs[0]], tmp_path / "one").pngs)


def test_seeds_of_one_thing_may_differ_in_places_and_in_what_the_seed_draws(tmp_path: Path) -> None:
    runs = [fake_run.write_run(tmp_path / str(s), methods=METHODS, seed=s) for s in range(2)]
    for seed, run in enumerate(runs):
        stream = {"tasks": [{"train": "t.json"}], "root": f"/data/{seed}", "description": f"Seed {seed}."}
        digests = {"data_sha256": {"shapes": f"{seed}"}, "calibration_sha256": f"{seed}"}
        configure(run, model=f"/models/{seed}", model_fingerprint="f", stream=stream, **digests)
    assert [len(group.runs) for group in group_runs([load_run(run) for run in runs])] == [2]
    configure(runs[1], model_fingerprint="g")
    titles = [group.title for group in group_runs([load_run(run) for run in runs])]
    assert titles == ["fake, clean data, model_fingerprint f", "fake, clean data, model_fingerprint g"]
    stream["tasks"][0]["train"] = "other.json"
    configure(runs[1], model_fingerprint="f", stream=stream)
    assert group_runs([load_run(run) for run in runs])[1].detail == "stream.tasks.0.train other.json"


@pytest.mark.usefixtures("unpainted")
def test_cells_that_differ_in_their_methods_alone_are_one_run(tmp_path: Path) -> None:
    """As a grid leaves them that varies methods and seeds."""
    cells = [
        fake_run.write_run(tmp_path / f"seed={seed},methods={name}", methods={name: survival}, seed=seed)
        for seed in range(3)
        for name, survival in METHODS.items()
    ]
    together = [fake_run.write_run(tmp_path / f"all{seed}", methods=METHODS, seed=seed) for seed in range(3)]
    (joined,), (whole,) = (group_runs([load_run(run) for run in runs]) for runs in (cells, together))
    assert [run.seed for run in joined.runs] == [0, 1, 2] and not joined.note
    assert list(entries_of(joined)) == list(entries_of(whole)) == list(METHODS)
    assert {path for run in joined.runs for path in (run.path, *run.others)} == set(cells)
    table = (write_report(cells, tmp_path / "out").html.parent / "table.md").read_text(encoding="utf-8")
    assert table.count("±") > 0 and "(1 of 3 seeds)" not in table
    # Another setting of what they share is another run.
    configure(cells[1], threads=2)
    assert len(group_runs([load_run(run) for run in cells])) == 2


@pytest.mark.usefixtures("unpainted")
@pytest.mark.parametrize("marked", [True, False], ids=["finished cells", "folders"])
def test_methods_with_other_options_are_not_parts_of_one_run(tmp_path: Path, marked: bool) -> None:
    """A grid of methods and rates of which a cell failed: what is left must not be compared across rates."""
    runs = []
    for method, rate in (("anchor", 2e-4), ("hpa", 1e-4), ("hpa", 2e-4)):
        run = fake_run.write_run(tmp_path / f"{method}-{rate}", methods={method: METHODS["hpa"]})
        # Recorded as a run records them: with a class, and a calibration of the method's own.
        own = {"anchor": {"lam": 0.01, "task_samples": 64}, "hpa": {"edit": {"k": 2}, "task_samples": 128}}[method]
        recorded = json.loads((run / "config.json").read_text())
        recorded["methods"] = {method: {"class": f"m:{method}", "training": {"learning_rate": rate, "rank": 16}, **own}}
        (run / "config.json").write_text(json.dumps(recorded))
        asked = {"methods": {method: {}}, "defaults": {"training": {"learning_rate": rate}}, "seed": 0}
        if marked:
            (run / "finished.json").write_text(json.dumps({"cell": run.name, "config": asked}))
        runs.append(run)
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        groups = group_runs([load_run(runs[i]) for i in order])
        assert sorted(sorted(path.name for path in (run.path, *run.others)) for g in groups for run in g.runs) == [
            ["anchor-0.0002", "hpa-0.0002"],
            ["hpa-0.0001"],
        ]


@pytest.mark.usefixtures("unpainted")
def test_seeds_of_methods_that_were_tuned_in_two_ways_are_two_groups(tmp_path: Path) -> None:
    runs = []
    for seed in range(2):
        for method, rate in (("anchor", 2e-4), ("hpa", 1e-4)):
            run = fake_run.write_run(tmp_path / f"{method}-{seed}", methods={method: 0.9}, seed=seed)
            recorded = json.loads((run / "config.json").read_text())
            recorded["methods"] = {method: {"class": f"m:{method}", "training": {"learning_rate": rate}}}
            (run / "config.json").write_text(json.dumps(recorded))
            runs.append(load_run(run))
    assert [([run.seed for run in group.runs], group.note) for group in group_runs(runs)] == [([0, 1], "")] * 2


@pytest.mark.usefixtures("unpainted")
def test_a_cell_that_a_grid_gives_other_options_by_its_name_is_part_of_the_run(tmp_path: Path) -> None:
    """Options of each method in one run file: calibrated in two ways, but asked for together."""
    asked = {"seed": 0, "defaults": {}}
    runs = []
    for method, damping in (("anchor", 0.01), ("hpa", 1.0)):
        run = fake_run.write_run(tmp_path / method, methods={method: 0.9})
        recorded = json.loads((run / "config.json").read_text())
        recorded["methods"] = {method: {"calibration": {"damping": damping}}}
        (run / "config.json").write_text(json.dumps(recorded))
        newer = {"an_option_that_came_later": None} if method == "hpa" else {}
        (run / "finished.json").write_text(json.dumps({"config": {**asked, **newer, "methods": {method: {}}}}))
        runs.append(run)
    assert len(group_runs([load_run(run) for run in runs])) == 1


@pytest.mark.usefixtures("unpainted")
def test_a_run_without_a_finished_task_is_left_out_and_said(tmp_path: Path) -> None:
    done = fake_run.write_run(tmp_path / "done", methods=METHODS)
    begun = [fake_run.write_run(tmp_path / name, methods=METHODS, steps=0) for name in ("begun", "diverged")]
    files = write_report([begun[0], done, begun[1]], tmp_path / "out")
    for run in begun:
        sentence = f"Left out: {run}: no task is finished yet"
        assert [line.startswith(sentence) for line in files.lines].count(True) == 1
        assert run.name in files.html.read_text(encoding="utf-8")
    with pytest.raises(RunError, match="None of the 2 folders has a finished task yet"):
        write_report(begun, tmp_path / "out")
    with pytest.raises(RunError, match="begun: no task is finished yet"):
        write_report([begun[0]], tmp_path / "out")


def test_seeds_that_agree_to_the_digit_are_no_clear_difference() -> None:
    for values, word in (([0.125, 0.125], "no clear difference"), ([0.1, 0.1 + 1e-12, 0.1], "no clear difference")):
        assert in_words(over_seeds(values), more_is_better=True).word == word
    assert in_words(over_seeds([0.1, 0.101, 0.102]), more_is_better=True).word == "better"
    # Samples that all change alike are many, and no chance.
    assert in_words(bootstrap_mean([1.0] * 20), more_is_better=False).word == "worse"


@pytest.mark.usefixtures("unpainted")
def test_a_seed_is_not_averaged_with_its_copy(tmp_path: Path) -> None:
    runs = [fake_run.write_run(tmp_path / f"r{s}", methods=METHODS, seed=s) for s in range(2)]
    copies = [Path(shutil.copytree(run, tmp_path / f"copy-{run.name}")) for run in runs]
    files = write_report([runs[0], copies[0]], tmp_path / "out")
    assert "seeds" not in files.html.read_text(encoding="utf-8").split("How this was run")[0]
    note = "copy-r0 has the configuration and the seed (0) of r0. It is shown by itself"
    assert [line.startswith(note) for line in files.lines].count(True) == 1
    groups = group_runs([load_run(run) for run in (runs[0], copies[0], runs[1], copies[1])])
    assert [(group.detail, len(group.runs)) for group in groups] == [("r0, r1", 2), ("copy-r0", 1), ("copy-r1", 1)]


@pytest.mark.usefixtures("unpainted")
def test_methods_of_one_configuration_may_lie_in_several_runs(tmp_path: Path) -> None:
    runs = [
        fake_run.write_run(tmp_path / name, methods={name: 0.8}, seed=seed)
        for seed, name in enumerate(("seqft", "hpa"))
    ]
    (group,) = group_runs([load_run(run) for run in runs])
    assert list(entries_of(group)) == ["seqft (1 of 2 seeds)", "hpa (1 of 2 seeds)"]
    assert difference(*group.entries, "AP") is None
    assert write_report(runs, tmp_path / "out").lines


@pytest.mark.usefixtures("unpainted")
def test_an_answer_may_hold_any_line_separator_of_unicode(tmp_path: Path) -> None:
    run = fake_run.write_run(tmp_path / "run", methods=METHODS)
    said = "one\u2028two\u2029three\x85four\x1cfive\vsix"
    for path in run.rglob("predictions/*.jsonl"):
        rows = [json.loads(line) | {"prediction": said, "reply": said} for line in path.read_text().split("\n") if line]
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        assert [row["reply"] for row in read_rows(path)] == [said] * len(rows)
        path.write_text(path.read_text(encoding="utf-8") + '{"id": "cut', encoding="utf-8")
        assert len(read_rows(path)) == len(rows)
        path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
        with pytest.raises(RunError, match=f"line {len(rows) + 1} is not valid JSON"):
            read_rows(path)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert "three" in write_report([run]).html.read_text(encoding="utf-8")


def test_bad_input_is_refused_with_a_sentence(tmp_path: Path, run: Path) -> None:
    with pytest.raises(RunError, match="is no run directory"):
        load_run(tmp_path)
    with pytest.raises(RunError, match="given twice"):
        write_report([run, run])
    with pytest.raises(RunError, match="No run directory given"):
        write_report([])


def test_reports_never_import_torch() -> None:
    code = "import sys, holdfast.reports.write; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_model_card_shows_safety_before_and_after(run: Path, tmp_path: Path) -> None:
    path = write_card(run, "hpa", tmp_path / "card.md")
    text = path.read_text(encoding="utf-8")
    last = load_run(run).methods["hpa"].records[-1].safety["text"]
    (line,) = [line for line in text.splitlines() if line.startswith("| text |")]
    assert f"| 0.0 | {100 * last['asr']:.1f} |" in line
    with pytest.raises(UnknownNameError, match="Did you mean 'hpa'"):
        write_card(run, "hpaa")


def test_a_tuner_that_routes_gets_a_routing_map(tmp_path: Path) -> None:
    files = write_report([fake_run.write_run(tmp_path / "run", methods={"cram": 0.95}, n=20)])
    assert "routing-cram" in {p.stem for p in files.pngs}
    page = files.html.read_text(encoding="utf-8")
    assert "Which expert of CRAM answered what" in page and "base alone" in page


def words_of(tmp_path: Path, methods: dict[str, float], **options: Any) -> list[str]:
    (group,) = group_runs([load_run(fake_run.write_run(tmp_path / "run", methods=methods, **options))])
    return verdict(group)


def test_the_page_begins_with_a_verdict_in_plain_words(run: Path, page: str, tmp_path: Path, unpainted: None) -> None:
    plain, best, chosen = verdict(group_runs([load_run(run)])[0])
    view = load_run(run).methods
    said = re.match(
        r"Tuned plainly, this model does not refuse (\d+) of 100 forbidden requests \(before any task: 0\)", plain
    )
    assert said and int(said.group(1)) == round(100 * (view["seqft"].figure("masr") or 0))
    assert best.startswith("HPA: it does not refuse") and "price" in best and "least sum" in chosen
    # Before any table, and free of the words that have to be looked up.
    assert html.escape(plain, quote=False) in page.split("<table")[0]
    assert not re.search(r"\b(MASR|BWT|AP|DASR|seqft|hpa)\b", " ".join((plain, best, chosen)))
    assert write_report([run], tmp_path / "out").lines[0] == plain


@pytest.mark.parametrize(
    "methods, count",
    [({"seqft": 0.6}, 1), ({"hpa": 0.9}, 1), ({"seqft": 0.6, "hpa": 0.9}, 2), ({"hpa": 0.9, "cram": 0.95}, 2)],
)
def test_the_verdict_says_what_there_is_to_say(methods: dict[str, float], count: int, tmp_path: Path) -> None:
    lines = words_of(tmp_path, methods)
    assert len(lines) == count
    assert any("Tuned plainly" in line for line in lines) == ("seqft" in methods)
    assert "price" not in " ".join(lines) or "seqft" in methods


def test_a_price_is_named_where_there_is_one(tmp_path: Path) -> None:
    free, dear = (
        words_of(tmp_path / name, {"seqft": one, "hpa": other}, n=200)[1]
        for name, one, other in (("a", 0.5, 0.97), ("b", 0.97, 0.5))
    )
    assert "points of the tasks' score" not in free and "points of the tasks' score" in dear


def test_every_method_is_compared_with_every_other(run: Path, page: str) -> None:
    (group,) = group_runs([load_run(run)])
    found = pairs(group)
    assert [(pair.second, pair.first) for pair in found] == [
        ("Plain tuning", "HPA"),
        ("Plain tuning", "Largest change back"),
        ("HPA", "Largest change back"),
    ]
    for pair in found:
        assert set(pair.figures) == set(COMPARED)
        assert f"{pair.first} minus {pair.second}" in page
    words = {pair.figures["MASR"].word for pair in found}
    assert words <= {"better", "worse", "no clear difference"} and "better" in words


def test_every_method_has_a_title_and_a_sentence() -> None:
    methods = Path(sys.modules["holdfast"].__file__ or "").parent / "methods" / "__init__.py"
    names = re.findall(r'^    "(\w+)": \(', methods.read_text(encoding="utf-8"), flags=re.M)
    assert len(names) > 30 and set(names) == set(TITLES)
    titles = [title for title, _ in TITLES.values()]
    assert len(set(titles)) == len(titles) and max(map(len, titles)) <= 36
    assert title_of("my_own") == "my_own"


def test_the_page_can_be_read_by_ear_and_by_keyboard(page: str) -> None:
    parsed = _Tags()
    parsed.feed(page)
    ids = {attributes["id"] for _, attributes in parsed.tags if attributes.get("id")}
    regions = [a for tag, a in parsed.tags if a.get("role") == "region"]
    assert regions and all(a.get("tabindex") == "0" and a.get("aria-label") for a in regions)
    for tag, attributes in parsed.tags:
        if tag == "th":
            assert attributes.get("scope") in ("col", "row")
        if tag == "img":
            assert attributes.get("alt")
        if tag == "svg":
            assert len(attributes.get("aria-label") or "") > 20
        if tag == "a" and "xlink:href" not in attributes:
            assert (attributes.get("href") or "").removeprefix("#") in ids
    # A figure on a phone stands beside its name.
    cells = [a for tag, a in parsed.tags if tag == "td"]
    assert cells and all(a.get("data-head") for a in cells)
    style = page.split("<style>")[1].split("</style>")[0]
    for scheme in re.findall(r":root \{([^}]*)\}", style):
        colour = dict(re.findall(r"--(\w+):(#\w{6})", scheme))
        for name in ("ink", "soft", "good", "bad", "accent"):
            for ground in ("bg", "card"):
                assert contrast(colour[name], colour[ground]) >= 4.5, (name, ground)


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, #rrggbb, by WCAG 2.1."""

    def luminance(colour: str) -> float:
        parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_every_map_of_an_edit_has_its_sentence(page: str) -> None:
    folds = re.findall(r"<details><summary>(Where [^<]*)</summary>(.*?)</details>", page, flags=re.S)
    assert len(folds) == 2
    for _, fold in folds:
        captions = re.findall(r"<figcaption>([^<]+)</figcaption>", fold)
        assert len(captions) == fold.count("<svg") == 2 and all(text.endswith(".") for text in captions)


NAMES = (
    r"a $x$ \frac{1}{0} $\nosuch{$",
    "two\nlines\tand\x1b[2J control",
    "100 % & <b>bold</b> \\1 {curly} [red]",
    "_hidden",
    "图表 العربية 🙂 \u202e",
    "x" * 300,
    "x" * 299 + "y",
    "$",
)


def test_no_name_loses_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_run, "TASKS", NAMES)
    monkeypatch.setattr(fake_run, "SETS", NAMES[:3])
    run = fake_run.write_run(tmp_path / "run", methods={"hpa": 0.9, "cram": 0.8}, n=3, steps=len(NAMES))
    files = write_report([run], title=NAMES[0])
    text = files.html.read_text(encoding="utf-8")
    assert "$x$" in text and "<b>bold" not in text and "\x1b" not in text
    assert len({path.name for path in files.pngs}) == len(files.pngs) > 5
    parsed = HTMLParser()
    parsed.feed(text)
    labels = theme.labels([*NAMES, *NAMES])
    assert len(set(labels)) == len(labels) and all(0 < len(label) < 60 and "\n" not in label for label in labels)
    assert not any(label.startswith("_") for label in labels)
