"""Answers are appended batch by batch, and an interrupted collection asks only what is missing, in the same batches."""

from __future__ import annotations

import threading

import pytest

from holdfast.data.types import Sample
from holdfast.errors import StorageError
from holdfast.evaluation.answers import Share, collect
from holdfast.files import append

SAMPLES = [Sample.single(f"s{i}", "x" * (7 * i % 5 + 1)) for i in range(7)]


class Model:
    def __init__(self, dies_at: int | None = None) -> None:
        self.batches: list[list[str]] = []
        self.dies_at = dies_at

    def __call__(self, batch):
        if len(self.batches) == self.dies_at:
            raise KeyboardInterrupt
        self.batches.append([s.id for s in batch])
        return [f"{s.id}\n\u2028 of {len(batch)}" for s in batch]


def test_answers_come_in_the_order_of_the_samples(tmp_path):
    counts: list[int] = []
    answers = collect(SAMPLES, Model(), path=tmp_path / "a", batch_size=3, on_batch=counts.append)
    assert [a.split("\n")[0] for a in answers] == [s.id for s in SAMPLES]
    assert counts == [3, 3, 1]


@pytest.mark.parametrize("torn", [b"", b'{"batch": 2, "te', b'{"batch": 2, "texts": ["s'])
def test_an_interrupted_collection_goes_on_in_the_same_batches(tmp_path, torn):
    whole = Model()
    expected = collect(SAMPLES, whole, path=tmp_path / "whole", batch_size=2)
    first, second = Model(dies_at=2), Model()
    with pytest.raises(KeyboardInterrupt):
        collect(SAMPLES, first, path=tmp_path / "part", batch_size=2)
    with (tmp_path / "part").open("ab") as file:
        file.write(torn)
    assert collect(SAMPLES, second, path=tmp_path / "part", batch_size=2) == expected
    assert first.batches + second.batches == whole.batches
    assert (tmp_path / "part").read_bytes() == (tmp_path / "whole").read_bytes()


def test_no_samples_no_answers(tmp_path):
    assert collect([], Model(), path=tmp_path / "a", batch_size=2) == []


def test_processes_share_the_batches_and_the_chief_sees_all(tmp_path):
    whole = Model()
    expected = collect(SAMPLES, whole, path=tmp_path / "whole.part", batch_size=1)
    barrier = threading.Barrier(3)
    models, answers = [Model() for _ in range(3)], {}

    def work(rank: int) -> None:
        share = Share(rank=rank, world=3, wait=barrier.wait)
        answers[rank] = collect(SAMPLES, models[rank], path=tmp_path / "a.part", batch_size=1, share=share)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers[0] == expected and answers[1] != expected
    assert sorted(b[0] for m in models for b in m.batches) == sorted(s.id for s in SAMPLES)
    assert [len(m.batches) for m in models] == [3, 2, 2]


def test_one_process_goes_on_with_what_several_began(tmp_path):
    expected = collect(SAMPLES, Model(), path=tmp_path / "whole.part", batch_size=1)
    for rank, dies_at in ((0, 2), (1, 1)):
        share = Share(rank=rank, world=2)
        with pytest.raises(KeyboardInterrupt):
            collect(SAMPLES, Model(dies_at=dies_at), path=tmp_path / "a.part", batch_size=1, share=share)
    with (tmp_path / "a.rank1.part").open("ab") as file:
        file.write(b'{"batch": 6, "te')  # another process's torn line
    last = Model()
    assert collect(SAMPLES, last, path=tmp_path / "a.part", batch_size=1) == expected
    assert len(last.batches) == 7 - 3


def test_a_full_disk_is_a_sentence_and_what_was_asked_before_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "answers.part"
    monkeypatch.setattr("holdfast.evaluation.answers.append", once_then_full(append))
    samples = [Sample.single(str(i), f"ask {i}") for i in range(4)]
    with pytest.raises(StorageError, match="No space left to write"):
        collect(samples, lambda batch: [s.id for s in batch], path=path, batch_size=2)
    monkeypatch.undo()
    asked = []
    answers = collect(samples, lambda b: [asked.append(s.id) or s.id for s in b], path=path, batch_size=2)
    assert answers == ["0", "1", "2", "3"] and len(asked) == 2
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="No space left to write"):
        collect(samples, lambda batch: [s.id for s in batch], path=tmp_path / "full", batch_size=2)


def once_then_full(append):
    calls = []

    def write(path, data):
        calls.append(path)
        if len(calls) == 2:
            append(path, data[:5])  # what a disk that fills up leaves
            raise StorageError(f"No space left to write {path}.")
        append(path, data)

    return write
