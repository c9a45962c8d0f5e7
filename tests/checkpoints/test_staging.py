"""What a failed write leaves behind: finished parts, or nothing at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.checkpoints.writer import Shard, Staging
from holdfast.errors import NumericalError, StorageError

SHARD = Shard("model.safetensors", (), b"x" * 16)


def finish(staging: Staging) -> None:
    (staging.folder / SHARD.file).write_bytes(b"x" * SHARD.nbytes)
    staging.mark(SHARD, {})


@pytest.mark.parametrize("error", [StorageError("No space left"), NumericalError("NaN")])
def test_nothing_hidden_is_left_where_nothing_is_finished(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)), Staging(tmp_path / "out", {"a": 1}) as staging:  # noqa: PT012
        assert staging.kept == "Nothing was kept."
        raise error
    assert not [*tmp_path.iterdir()]


def test_finished_parts_are_kept_and_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(StorageError), Staging(tmp_path / "out", {"a": 1}) as staging:  # noqa: PT012
        finish(staging)
        assert "1 finished file(s) are kept" in staging.kept
        raise StorageError("No space left")
    with Staging(tmp_path / "out", {"a": 1}) as staging:
        assert staging.finished(SHARD) == {}
        with pytest.raises(StorageError, match="Another process is writing"):
            Staging(tmp_path / "out", {"a": 1})
        assert staging.finished(SHARD) == {}, "who is refused removes nothing of whom it waits for"


def test_a_partial_of_another_plan_is_not_touched(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", {"a": 1}) as staging:
        finish(staging)
    with pytest.raises(StorageError, match="differs in a"):
        Staging(tmp_path / "out", {"a": 2})
    with Staging(tmp_path / "out", {"a": 1}) as staging:
        assert staging.finished(SHARD) == {}
