"""Prediction files of every shape meet their gold answers; what is odd is counted and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from holdfast import scorers
from holdfast.errors import ConfigError, DataError
from holdfast.scorers.alignment import Outcome, score_file
from holdfast.scorers.predictions import read_predictions, read_references

GOLD = [{"question_id": i, "text": f"Q{i}", "answer": a} for i, a in enumerate("abcd")]


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(tmp_path: Path, rows: list[Any], gold: Any = GOLD, *, mode: Any = "strict", name: str = "exact_match",
        align: Any = "auto", **options: Any) -> Outcome:  # fmt: skip
    predictions = read_predictions(lines(tmp_path / "p.jsonl", rows))
    references = None
    if gold is not None:
        (tmp_path / "gold.json").write_text(json.dumps(gold))
        references = read_references(tmp_path / "gold.json")
    return score_file(predictions, references, scorers.get(name, mode, **options), align=align)


def answer(name: Any, text: Any) -> dict[str, Any]:
    return {"question_id": name, "prompt": "Q", "text": text, "answer_id": "x", "model_id": "m", "metadata": {}}


def test_all_answered_by_mixed_ids_is_a_note_and_no_problem(tmp_path: Path) -> None:
    outcome = run(tmp_path, [answer("3", "d"), answer(0, "a"), answer("1", "x"), answer(2, "c")])
    assert (outcome.value, outcome.n, dict(outcome.problems)) == (0.75, 4, {})
    assert any("ids mix numbers and strings" in note for note in outcome.notes)
    assert [item.id for item in outcome.items] == ["0", "1", "2", "3"]


def test_unknown_repeated_conflicting_missing_and_textless_rows_are_named(tmp_path: Path) -> None:
    rows = [answer(0, "a"), answer(0, "a"), answer(1, "b"), answer(1, "x"), answer(9, "z"), answer(2, None)]
    strict = run(tmp_path, rows)
    assert strict.problems == {
        "without_text": ("row 6 (id 2)",),
        "unknown": ("9",),
        "repeated": ("0",),
        "conflicting": ("1",),
        "missing": ("2", "3"),
    }
    assert [item.score.value for item in strict.items] == [1.0, None, 0.0, 0.0]
    assert (strict.value, strict.n) == (pytest.approx(1 / 3), 3)
    assert "2 missing prediction(s) count as wrong" in strict.notes
    paper = run(tmp_path, rows, mode="paper")
    assert (paper.value, paper.n) == (1.0, 1)
    assert "2 missing prediction(s) count as left out" in paper.notes


@pytest.mark.parametrize(
    ("mode", "rule", "value", "n"),
    [
        ("paper", "coin", 1 / 4, 4),  # over the problems of the split
        ("paper", "prism", 1 / 4, 4),
        ("paper", "sefe", 1 / 3, 3),  # over len(predictions): two of problems, one of none, repeats once
        ("strict", "coin", 1 / 4, 4),
        ("strict", "sefe", 1 / 4, 4),
    ],
)
def test_each_fork_of_scienceqa_divides_by_its_own_number(
    tmp_path: Path, mode: Any, rule: str, value: float, n: int
) -> None:
    gold = {str(i): {"choices": ["x", "y"], "answer": 1} for i in range(4)}
    rows = [answer(0, "B"), answer(1, "A"), answer(9, "B"), answer("9", "B")]
    outcome = run(tmp_path, rows, gold, mode=mode, name="option_letter", rule=rule)
    assert (outcome.value, outcome.n) == (pytest.approx(value), n)
    assert outcome.problems["unknown"] == ("9", "9") and outcome.problems["missing"] == ("2", "3")
    assert any("count as wrong, as in the published" in note for note in outcome.notes) == (n == 3)


def test_all_answered_gives_every_rule_one_denominator(tmp_path: Path) -> None:
    gold = {str(i): {"choices": ["x", "y"], "answer": 1} for i in range(4)}
    rows = [answer(i, letter) for i, letter in enumerate("BBAB")]
    for rule in ("coin", "sefe", "prism"):
        outcome = run(tmp_path, rows, gold, mode="paper", name="option_letter", rule=rule)
        assert (outcome.value, outcome.n, dict(outcome.problems)) == (0.75, 4, {})


def test_scienceqa_problems_are_those_of_the_test_split(tmp_path: Path) -> None:
    (tmp_path / "problems.json").write_text(
        json.dumps({str(i): {"choices": ["x", "y"], "answer": i % 2} for i in range(4)})
    )
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["0"], "test": ["3", "2"]}))
    references = read_references(tmp_path / "problems.json")
    assert [(row.id, row.references) for row in references.rows] == [("3", ("B",)), ("2", ("A",))]


def test_rows_that_carry_their_gold_need_no_reference_file(tmp_path: Path) -> None:
    rows = [
        {"pred": "a", "ground_truth": "A"},
        {"pred": "b", "ground_truth": ["c", "B"]},
        {"pred": "", "ground_truth": "x"},
    ]
    outcome = run(tmp_path, rows, None, mode="paper")
    assert outcome.value == pytest.approx(2 / 3) and "1 answer(s) are empty" in outcome.notes
    with pytest.raises(DataError, match="carries no gold answers; give them with --references"):
        run(tmp_path, [answer(0, "a")], None)


def test_our_own_rows_are_read_back(tmp_path: Path) -> None:
    row = {"id": "7", "prompt": "Q", "prediction": "a", "references": ["A"], "value": 1.0, "evidence": "", "images": []}
    assert run(tmp_path, [row], None).value == 1.0


def test_captions_without_image_ids_follow_the_order_one_to_n(tmp_path: Path) -> None:
    captions = [{"image_id": i, "caption": f"a dog number {i} runs"} for i in (10, 9, 2, 1)]
    gold = {"images": [{"id": i} for i in (10, 9, 2, 1)], "annotations": captions}
    rows = [answer("x", f"a dog number {i} runs") for i in (1, 2, 9, 10)]
    by_order = run(tmp_path, rows, gold, mode="paper", name="captions", java="no-such-java")
    assert by_order.figures["metrics"]["Bleu_1"] == pytest.approx(1.0) and by_order.value is None
    assert any(note.endswith("by order") for note in by_order.notes)
    by_id = [{"image_id": i, "caption": f"a dog number {i} runs"} for i in (10, 1, 2)]
    outcome = run(tmp_path, by_id, gold, mode="paper", name="captions", java="no-such-java")
    assert outcome.problems == {"missing": ("9",)} and outcome.n == 4
    assert any(note.endswith("by id") for note in outcome.notes)
    assert any("count as an empty caption" in note for note in outcome.notes)


def test_imagenet_predictions_align_by_position_on_request(tmp_path: Path) -> None:
    rows = [answer(f"other{i}", a) for i, a in enumerate("abcx")]
    assert run(tmp_path, rows).problems["unknown"] == ("other0", "other1", "other2", "other3")
    outcome = run(tmp_path, [*rows, answer("more", "e")], align="order")
    assert outcome.value == 0.75 and outcome.problems == {"unknown": ("more",)}


def test_textvqa_gqa_and_grounding_annotations_are_understood(tmp_path: Path) -> None:
    data = {"data": [{"question_id": 1, "answers": ["red"] * 10}]}
    assert run(tmp_path, [answer("1", "Red")], data, mode="paper", name="vqa").value == 1.0
    questions = {"1": {"answer": "yes", "isBalanced": True}, "2": {"answer": "no", "isBalanced": False}}
    outcome = run(tmp_path, [answer(1, "Yes."), answer(2, "no")], questions, mode="paper", name="gqa")
    assert (outcome.value, outcome.n) == (1.0, 1)
    predictions = [{"questionId": "1", "prediction": "yes"}, {"questionId": "2", "prediction": "x"}]
    assert run(tmp_path, predictions, questions, mode="paper", name="gqa").value == 1.0
    boxes = [
        {"question_id": 1, "answer_bbox": "[0.1,0.1,0.5,0.5]", "size": [8, 4]},
        {"question_id": 2, "answer_bbox": "[]"},
    ]
    outcome = run(tmp_path, [answer(1, "somewhere"), answer(2, "[0,0,1,1]")], boxes, mode="paper", name="grounding")
    assert outcome.figures["unparsable"] == 1 and outcome.figures["unscored"] == 1


def test_the_prompt_as_asked_reaches_the_scorer(tmp_path: Path) -> None:
    gold = [{"question_id": 1, "image": "MapQA_1.png", "answer": "Ohio,Utah"}]
    row = {**answer(1, "Ohio"), "prompt": "Which states are red?"}
    assert run(tmp_path, [row], gold, mode="paper", name="dcl_sci").value == 0.5


@pytest.mark.parametrize(
    ("rows", "gold", "align", "error", "message"),
    [
        ([{"text": "a"}, answer(1, "b")], GOLD, "auto", ConfigError, "1 of 2 rows have no id; say --align order"),
        ([{"text": "a"}], GOLD, "id", ConfigError, "cannot be aligned by id"),
        ([answer(0, "a")], GOLD, "position", ConfigError, "expected auto, id or order"),
        ([answer(0, "a"), answer(1, None)], GOLD, "order", DataError, "order cannot be trusted"),
        ([{"question_id": 1, "verdict": "x"}], GOLD, "auto", DataError, "no row holds an answer.*'verdict'"),
        ([{"question_id": [1], "text": "x"}], GOLD, "auto", DataError, "id .1. is a list"),
        ([], GOLD, "auto", DataError, "holds no prediction"),
        ([answer(0, "a")], [*GOLD, {"question_id": "0", "answer": "z"}], "auto", DataError, "1 id.s. occur twice: '0'"),
        ([answer(0, "a")], [{"question_id": 0, "text": "Q"}], "auto", DataError, "no item holds a gold answer"),
        ([answer(0, "a")], {"version": 1}, "auto", DataError, "expected gold answers by id, found the keys 'version'"),
        ([answer(0, "a")], 5, "auto", DataError, "expected a list or an object"),
    ],
)
def test_files_that_cannot_be_scored_say_why(
    tmp_path: Path, rows: list[Any], gold: Any, align: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(tmp_path, rows, gold, align=align)


def test_wrong_encodings_and_broken_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes('{"question_id": 0, "text": "café"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_predictions(path)
    path.write_text('{"question_id": 0, "text": "a"}\n{"question_id": 1, "te')
    with pytest.raises(DataError, match=r"p\.jsonl, line 2 is not valid JSON"):
        read_predictions(path)
    (tmp_path / "p.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="not a whole gzip file"):
        read_predictions(tmp_path / "p.jsonl.gz")
