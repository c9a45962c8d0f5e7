"""One checkpoint value everywhere: what names a checkpoint is that value, and so are the old places of the class."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.checkpoints.value import Checkpoint, as_checkpoint


class Alike:
    """Somebody's own value."""

    base = "model"
    adapters = (Path("a"), "b")


@pytest.mark.parametrize(
    "source, expected",
    [
        ("org/model", Checkpoint(base="org/model")),
        (Path("folder"), Checkpoint(base="folder")),
        (Checkpoint(base="m", adapters=("a",)), Checkpoint(base="m", adapters=("a",))),
        (Alike(), Checkpoint(base="model", adapters=("a", "b"))),
    ],
)
def test_whatever_names_a_checkpoint_is_its_value(source, expected):
    assert as_checkpoint(source) == expected
    assert Checkpoint.from_json(as_checkpoint(source).to_json()) == expected


@pytest.mark.parametrize("source", [None, 3, {"base": "m"}, ["m"]])
def test_what_names_none_is_refused_with_its_value(source):
    with pytest.raises(TypeError, match=r"found .*; expected a folder, a hub id or a Checkpoint"):
        as_checkpoint(source)


def test_adapters_lie_on_top_of_what_they_were_trained_on():
    base = Checkpoint(base="m", adapters=("a",))
    tuned = base.under(Path("b"))
    assert str(tuned) == "m + a + b" and tuned.paths == ("m", "a", "b")
    assert tuned.own_adapters(base) == ("b",) and base.own_adapters(base) == ()
    for other in (Checkpoint(base="n"), Checkpoint(base="m", adapters=("b",)), tuned):
        assert base.own_adapters(other) is None


def test_the_value_is_one_class_and_needs_no_torch():
    code = (
        "import sys; from holdfast.stream.protocol import Checkpoint as a; "
        "from holdfast.checkpoints.value import Checkpoint as b; assert a is b; assert 'torch' not in sys.modules; "
        "from holdfast.checkpoints.merged import CheckpointLike as c; assert a is c"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
