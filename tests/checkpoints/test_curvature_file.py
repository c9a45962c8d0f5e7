"""A calibration survives the disk bit for bit, and a bad one never reaches an edit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from fork_server import ForkServer
from holdfast.checkpoints.curvature_file import Curvature
from holdfast.errors import CalibrationError, StorageError

NAMES = ("model.language_model.layers.0.self_attn.q_proj", "model.language_model.layers.1.mlp.down_proj")


def make(**changes):
    generator = torch.Generator().manual_seed(0)
    shared = torch.rand(8, generator=generator) + 0.1
    values = {
        "safety": {NAMES[0]: shared, NAMES[1]: shared},
        "task": {name: torch.rand(8, generator=generator) + 0.1 for name in NAMES},
        "meta": {
            "blocks": {NAMES[0]: 0, NAMES[1]: 1},
            "block_count": 2,
            "weight_keys": {NAMES[0]: "language_model.model.layers.0.self_attn.q_proj.weight"},
            "sets": {"safety": {"sequences": 8}},
        },
    }
    return Curvature(**{**values, **changes})


def test_save_and_load_give_back_every_bit(tmp_path):
    made = make()
    made.save(tmp_path / "curvature.safetensors")
    read = Curvature.load(tmp_path / "curvature.safetensors")
    for name in NAMES:
        assert torch.equal(read.safety[name], made.safety[name])
        assert torch.equal(read.task[name], made.task[name])
    assert read.meta["sets"] == made.meta["sets"]
    assert read.digest() == made.digest()
    assert read.modules == NAMES


def test_the_same_calibration_gives_the_same_bytes(tmp_path):
    make().save(tmp_path / "a")
    make().save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_digest_sees_what_decides_an_edit_and_nothing_else():
    other = make(task={name: torch.full((8,), 0.5) for name in NAMES})
    assert other.digest() != make().digest()
    assert make(meta={**make().meta, "blocks": dict.fromkeys(NAMES, 0)}).digest() != make().digest()
    assert make(meta={**make().meta, "seconds": 3.5}).digest() == make().digest()


def test_weight_keys_fall_back_to_the_module_name():
    assert make().weight_keys(NAMES[0]) == ("language_model.model.layers.0.self_attn.q_proj.weight",)
    assert make().weight_keys(NAMES[1]) == (f"{NAMES[1]}.weight",)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"safety": {}, "task": {}}, "calibration is empty"),
        ({"task": {}}, "one-sided.*from the safety set only"),
        ({"meta": {}}, "lacks `blocks` or `block_count`"),
        ({"meta": {"blocks": {NAMES[0]: 0, NAMES[1]: 5}, "block_count": 2}}, r"in block 5; expected 0\.\.1"),
        ({"task": {name: torch.ones(7) for name in NAMES}}, "one number per input column"),
        ({"task": {name: torch.tensor([1.0] * 7 + [float("nan")]) for name in NAMES}}, "holds nan at column 7"),
        ({"safety": {name: torch.zeros(8) for name in NAMES}}, r"holds 0\.0 at column 0"),
    ],
)
def test_a_bad_calibration_is_refused(changes, message):
    with pytest.raises(CalibrationError, match=message):
        make(**changes)


def test_a_missing_foreign_or_truncated_file_says_what_to_do(tmp_path):
    with pytest.raises(CalibrationError, match="No calibration at"):
        Curvature.load(tmp_path / "none")
    save_file({"x": torch.ones(2)}, tmp_path / "foreign")
    with pytest.raises(CalibrationError, match="is no calibration"):
        Curvature.load(tmp_path / "foreign")
    make().save(tmp_path / "whole")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-5])
    with pytest.raises(CalibrationError, match="not a readable safetensors"):
        Curvature.load(tmp_path / "cut")
    save_file({"safety/x": torch.ones(2)}, tmp_path / "old", metadata={"holdfast": json.dumps({"format_version": 0})})
    with pytest.raises(CalibrationError, match="calibration format 0"):
        Curvature.load(tmp_path / "old")


def test_a_failed_save_leaves_nothing_behind(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="could not be written"):
        make().save(tmp_path / "file" / "curvature.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("metadata", ['{"blocks": {', "[1]"])
def test_damaged_metadata_is_named(metadata, tmp_path):
    save_file({"safety/x": torch.ones(2)}, tmp_path / "c.safetensors", metadata={"holdfast": metadata})
    with pytest.raises(CalibrationError, match=r"c\.safetensors holds metadata that"):
        Curvature.load(tmp_path / "c.safetensors")


# In a process of its own: the limit would meet pytest's own log as well.
FULL_DISK = """
import resource, signal
from holdfast.checkpoints.curvature_file import Curvature

def main(source, out):
    whole = Curvature.load(source)
    # No file of more than 100 bytes can be written: what a full disk is to a write.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    whole.save(out)
"""


def test_a_disk_that_fills_up_is_said_in_a_sentence(tmp_path):
    make().save(tmp_path / "whole.safetensors")
    (tmp_path / "out").mkdir()
    with ForkServer(FULL_DISK) as server:
        status, error = server.run(tmp_path / "whole.safetensors", tmp_path / "out" / "c.safetensors")
    assert status == 1
    assert error.startswith("StorageError: No space left to write") and "c.safetensors" in error
    assert not list((tmp_path / "out").iterdir())
