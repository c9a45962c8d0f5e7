"""Screening: task samples that theta_0 refuses are found, listed, and count as safety."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from holdfast.calibration import screening
from holdfast.calibration.screening import Screened, screen, split
from holdfast.data.types import Sample, Turn
from holdfast.errors import DataError
from holdfast.judges.keyword import StrictKeywordJudge
from holdfast.models.loaded import LoadedModel

NO = "I'm sorry, I can't help with that."


def is_refusal(samples: Sequence[Sample], replies: Sequence[str]) -> list[bool]:
    return [v.behaviour == "refusal" for v in StrictKeywordJudge().judge(samples, replies)]


@pytest.fixture
def task() -> list[Sample]:
    return [
        Sample.single("plain", "What is it?", "A cat."),
        Sample.single("harm", "How do I harm?", "First, take it."),
        Sample.single("aligned", "How do I harm you?", NO),
        Sample(
            id="turns",
            turns=(
                Turn(role="user", text="Hello."),
                Turn(role="assistant", text="Hello!"),
                Turn(role="user", text="How do I harm?"),
                Turn(role="assistant", text="Like this."),
            ),
        ),
    ]


def answering(monkeypatch: pytest.MonkeyPatch, reply: str = NO) -> list[list[Sample]]:
    """theta_0 refuses whatever asks for harm."""
    asked: list[list[Sample]] = []

    def generate(loaded, samples, *, on_batch, **options) -> list[str]:
        asked.append(list(samples))
        replies = [reply if "harm" in s.prompt else "A cat." for s in samples]
        on_batch(list(range(len(samples))), replies)
        return replies

    monkeypatch.setattr(screening, "generate", generate)
    return asked


def test_what_theta_0_refuses_is_answered_by_its_refusal(
    task: list[Sample], loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answering(monkeypatch)
    found = screen(loaded, task, is_refusal)
    # A sample that teaches the refusal is no harm.
    assert [s.id for s in found.kept] == ["plain", "aligned"]
    assert [(s.id, s.answer) for s in found.refused] == [("harm", NO), ("turns", NO)]
    assert [len(s.turns) for s in found.refused] == [2, 4] and found.asked == 4
    assert all(s.turns[-1].role == "user" for s in asked[0]), "the target was shown"
    assert found.kept[0] is task[0]


def test_a_record_gives_the_same_parts(
    task: list[Sample], loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch)
    found = screen(loaded, task, is_refusal)
    record = found.to_json()
    assert record["asked"] == 4 and record["kept"] == 2
    assert record["refused"] == [
        {"place": 1, "id": "harm", "reply": NO},
        {"place": 3, "id": "turns", "reply": NO},
    ]
    assert Screened.from_json(record, task) == found
    earlier = {**record, "refused": [{k: v for k, v in row.items() if k != "place"} for row in record["refused"]]}
    assert Screened.from_json(earlier, task) == found
    for others in (task[:3], [*task, task[0]], [Sample.single("x", "?", "!")] * 4):
        with pytest.raises(DataError, match="other samples"):
            Screened.from_json(record, others)


def test_samples_of_one_id_are_told_apart(
    task: list[Sample], loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids are unique in a task: a method that learns several at once screens them together."""
    answering(monkeypatch)
    both = [*task, Sample.single("harm", "What colour is it?", "Red."), Sample.single("plain", "Why harm?", "So.")]
    found = screen(loaded, both, is_refusal)
    assert [both.index(s) for s in found.kept] == [0, 2, 4] and found.places == (1, 3, 5)
    assert Screened.from_json(found.to_json(), both) == found


def test_nothing_refused_is_nothing_moved(task: list[Sample]) -> None:
    assert split(task, {}) == Screened(kept=tuple(task), refused=())


def test_a_real_model_is_asked(loaded: LoadedModel, samples: list[Sample]) -> None:
    events: list[int] = []
    found = screen(
        loaded,
        samples,
        lambda requests, replies: [True] * len(requests),
        max_new_tokens=2,
        batch_size=2,
        progress=lambda event, done, total: events.append(done),
    )
    # The judge says so of the targets, too: then nothing is found.
    assert len(found.kept) == len(samples) == events[-1]
