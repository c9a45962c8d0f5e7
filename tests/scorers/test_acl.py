"""MLLM-ACL's rules as the published scripts compute them, and the strict ones beside them."""

from __future__ import annotations

from typing import Any

import pytest

from holdfast import scorers
from holdfast.scorers.acl import FORMULA

FORM = {"answer_type": FORMULA}
PICK = {"choices": ["seven", "eight", "eighteen"]}


@pytest.mark.parametrize(
    ("name", "reply", "gold", "meta", "paper", "strict"),
    [
        ("acl_ocr", "It says CENTRE\n.", "centre", {}, 1, 1),
        ("acl_ocr", "cen\ntre", "Centre", {}, 1, 0),
        ("acl_ocr", "decentred", "centre", {}, 1, 0),
        ("acl_ocr", "the edge", "centre", {}, 0, 0),
        ("acl_ocr", "anything", "", {}, 1, 0),
        ("acl_ocr", "so x ^ 2 + 1", "x^2+1", FORM, 1, 1),
        ("acl_ocr", "X^2", "x^2", FORM, 0, 0),  # a formula keeps its case
        ("acl_vp", "There are 12.", "1", {}, 1, 0),
        ("acl_vp", "(A) left", "( a )", {}, 1, 0),
        ("acl_vp", "Three.", "three", {}, 1, 1),
        ("acl_vp", "two", "three", {}, 0, 0),
        ("acl_math", "14", "14", {}, 1, 1),
        ("acl_math", " 14 ", "14", {}, 1, 1),
        ("acl_math", "14.0", "14", {}, 0, 1),
        ("acl_math", "The missing number is 14.", "14", {}, 0, 1),
        ("acl_math", "3 + 4 = 7", "8", {}, 0, 0),
        ("acl_math", "0.60", "0.6", {}, 1, 1),
        ("acl_math", "1,200", "1200", {}, 0, 1),
        ("acl_math", "B", "eight", PICK, 1, 1),
        ("acl_math", "(B) it is", "eight", PICK, 1, 1),
        ("acl_math", "seven of them", "seven", PICK, 1, 0),
        ("acl_math", "A or B", "eight", PICK, 0, 0),
        ("acl_math", "eighteen", "eighteen", PICK, 0, 1),  # "eight" is in it too
        ("acl_math", "C", "C", PICK, 1, 1),
    ],
)
def test_each_reply_is_worth_what_the_script_gives_it(
    name: str, reply: str, gold: str, meta: dict[str, Any], paper: int, strict: int
) -> None:
    assert scorers.get(name, "paper").score(reply, [gold], meta).value == paper
    assert scorers.get(name).score(reply, [gold], meta).value == strict


def test_groups_and_unsettled_replies_are_counted() -> None:
    metas = [{"task": "Count"}, {"task": "Count"}, {"task": "Depth"}]
    value, _, figures = scorers.get("acl_vp", "paper").aggregate(["1", "2", "x"], [["1"], ["3"], ["x"]], metas)
    assert value == pytest.approx(2 / 3)
    assert figures["tasks"] == {"Count": {"n": 2, "value": 0.5}, "Depth": {"n": 1, "value": 1.0}}
    _, _, figures = scorers.get("acl_math", "paper").aggregate(["it is 4", "4", "5"], [["4"]] * 3, [{}] * 3)
    assert figures["unsettled"] == 2
    score = scorers.get("acl_math", "paper").score("A", ["nine"], PICK)
    assert score.value is None and "none of 3 choices" in score.evidence
