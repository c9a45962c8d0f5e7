"""A rewrite writes exactly what was planned, publishes it whole, and takes up where it was killed."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fork_server import ForkServer
from holdfast.checkpoints.reader import CheckpointReader
from holdfast.checkpoints.rewrite import Compute, Copy, Input, copy_side_files, rewrite
from holdfast.checkpoints.writer import Staging, plan_shards
from holdfast.errors import CheckpointError, NumericalError, StorageError
from rewrite_steps import PLAN, outputs, recipe, run_rewrite


def folder_bytes(folder: Path):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_copies_are_bits_and_computed_tensors_are_computed(sharded, tensors, tmp_path):
    result = run_rewrite(sharded, tmp_path / "out")
    with CheckpointReader(tmp_path / "out") as reader:
        assert set(reader) == set(tensors)
        for key, tensor in tensors.items():
            assert torch.equal(reader.read(key), tensor * 2 if ".mlp." in key else tensor), key
    assert set(result.rows) == {key for key in tensors if ".mlp." in key}
    assert not (tmp_path / ".out.partial").exists()


def test_the_safetensors_library_reads_every_shard_and_each_is_bounded(single, tmp_path):
    run_rewrite(single, tmp_path / "out", shard_bytes=1500)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    for shard in shards:
        loaded = load_file(shard)
        total = sum(t.numel() * t.element_size() for t in loaded.values())
        assert total <= 1500 or len(loaded) == 1


def test_one_shard_needs_no_number(single, tmp_path):
    run_rewrite(single, tmp_path / "out", shard_bytes=1 << 20)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_tensors_larger_than_a_copy_piece_are_whole(write, tmp_path):
    big = {"big.weight": torch.randint(0, 255, (9_000_001,), dtype=torch.uint8), "mid.mlp.weight": torch.ones(5)}
    big["huge.weight"] = torch.arange(5_000_000, dtype=torch.int64)
    run_rewrite(write(tmp_path / "in", big), tmp_path / "out", shard_bytes=1 << 30)
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(loaded["big.weight"], big["big.weight"])
    assert torch.equal(loaded["huge.weight"], big["huge.weight"])


def test_a_copy_that_differs_from_its_comparison_is_reported(write, make_tensors, tmp_path):
    old, new = make_tensors(), make_tensors()
    new["multi_modal_projector.linear_1.weight"][3, 3] += 1
    with (
        CheckpointReader(write(tmp_path / "old", old)) as before,
        CheckpointReader(write(tmp_path / "new", new)) as after,
        Staging(tmp_path / "out", PLAN) as staging,
    ):
        plan = {k: Copy(Input(after, e), compare=Input(before, before.entry(k))) for k, e in after.entries.items()}
        result = rewrite(staging, plan_shards(outputs(after), shard_bytes=2000), plan)
    assert result.changed == ["multi_modal_projector.linear_1.weight"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_or_inf_is_not_written(value, write, make_tensors, tmp_path):
    copied = make_tensors()
    copied["logit_scale"] = torch.tensor(value)
    with pytest.raises(NumericalError, match=r"logit_scale holds NaN or inf in .*copied/model\.safetensors"):
        run_rewrite(write(tmp_path / "copied", copied), tmp_path / "out")
    computed = make_tensors()
    key = next(key for key in computed if ".mlp." in key)
    computed[key][1, 2] = value
    with pytest.raises(NumericalError, match=rf"{key} would be written with NaN or inf"):
        run_rewrite(write(tmp_path / "computed", computed), tmp_path / "out2")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out2").exists()


def test_a_second_call_finds_the_work_done(single, tmp_path):
    run_rewrite(single, tmp_path / "out")
    before = folder_bytes(tmp_path / "out")
    assert run_rewrite(single, tmp_path / "out") is None
    assert folder_bytes(tmp_path / "out") == before


def test_an_existing_out_is_refused_and_untouched(single, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(StorageError, match="exists and is not this edit's result"):
        run_rewrite(single, tmp_path / "out")
    run_rewrite(single, tmp_path / "other")
    with pytest.raises(StorageError, match="exists and is not this edit's result"):
        run_rewrite(single, tmp_path / "other", plan={"kind": "another"})
    assert (tmp_path / "out" / "precious").read_text() == "mine"


class StopError(Exception):
    pass


def test_an_interrupted_rewrite_keeps_its_finished_shards(single, tmp_path):
    run_rewrite(single, tmp_path / "whole")

    def stop(event, *, name, done, total):
        if done == total - 2:
            raise StopError

    with pytest.raises(StopError):
        run_rewrite(single, tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / ".out.partial").rglob("*.tmp"))
    assert run_rewrite(single, tmp_path / "out").resumed_shards > 0
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_a_partial_of_another_plan_is_refused_and_says_what_differs(single, tmp_path):
    def stop(event, **values):
        raise StopError

    with pytest.raises(StopError):
        run_rewrite(single, tmp_path / "out", progress=stop)
    with pytest.raises(StorageError, match=r"unfinished result of other inputs or options \(differs in number\)"):
        run_rewrite(single, tmp_path / "out", plan={"kind": "test", "number": 2})


def test_what_a_kill_left_of_a_small_file_is_not_published(single, tmp_path):
    partial = tmp_path / ".out.partial"
    for folder in (partial / "folder", partial / "marks"):
        folder.mkdir(parents=True)
        (folder / ".edit.json.x7a_.tmp").write_text("{")
    run_rewrite(single, tmp_path / "out")
    assert not list(tmp_path.rglob("*.tmp"))


def test_two_processes_cannot_write_one_result(single, tmp_path):
    with (
        Staging(tmp_path / "out", PLAN),
        pytest.raises(StorageError, match="Another process is writing"),
    ):
        run_rewrite(single, tmp_path / "out")


def test_an_error_in_a_function_comes_through_and_publishes_nothing(single, tmp_path):
    with CheckpointReader(single) as reader, Staging(tmp_path / "out", PLAN) as staging:
        bad = recipe(reader)
        key = next(k for k in bad if ".mlp." in k)
        bad[key] = Compute(bad[key].inputs, lambda tensor: (tensor[:1], None))
        with pytest.raises(CheckpointError, match=f"The edit of {key} returned"):
            rewrite(staging, plan_shards(outputs(reader), shard_bytes=1500), bad)
    assert not (tmp_path / "out").exists()


def test_too_small_a_disk_is_noticed_before_the_first_byte(single, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 100})())
    with pytest.raises(StorageError, match=r"needs .* GB more and its disk has"):
        run_rewrite(single, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_side_files_are_copied_and_weights_are_not(single, tmp_path):
    for name in ("pytorch_model.bin", "README.md", ".gitattributes", "model.safetensors.index.json", "optimizer.pt"):
        (single / name).write_text("x")
    (single / "additional_chat_templates").mkdir()
    (single / "additional_chat_templates" / "tools.jinja").write_text("t")
    (tmp_path / "to").mkdir()
    assert copy_side_files(single, tmp_path / "to") == ["additional_chat_templates/", "config.json", "tokenizer.json"]
    assert (tmp_path / "to" / "additional_chat_templates" / "tools.jinja").read_text() == "t"


# A real process that is really killed.
PROGRAM = """
import resource, signal
from pathlib import Path
from rewrite_steps import run_rewrite

def main(source, out, pause_s, limit_bytes):
    if limit_bytes:
        # A full disk as the kernel reports it: writing past this size fails (EFBIG), whatever the user's rights.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    run_rewrite(Path(source), Path(out), pause_s=pause_s)
"""


@pytest.fixture(scope="module")
def server():
    with ForkServer(PROGRAM) as running:
        yield running


def test_killed_at_random_moments_it_ends_with_the_same_bytes(server, single, tmp_path):
    run_rewrite(single, tmp_path / "whole")
    chance, killed = random.Random(0), 0
    for number in range(12):
        out = tmp_path / f"out-{number}"
        # Twice in a row before the run that ends well.
        for _ in range(2):
            status, error = server.run(single, out, 0.05, 0, kill_after_s=chance.uniform(0, 0.4))
            assert status in (-signal.SIGKILL, 0), error
            killed += status == -signal.SIGKILL
        run_rewrite(single, out)
        assert folder_bytes(out) == folder_bytes(tmp_path / "whole")
        assert not (tmp_path / f".out-{number}.partial").exists()
    assert killed > 6


def test_a_file_that_cannot_grow_ends_in_a_storage_error_and_resumes(server, single, tmp_path):
    run_rewrite(single, tmp_path / "whole")
    status, error = server.run(single, tmp_path / "out", 0, 1200)
    assert status == 1
    assert error.startswith("StorageError: No space left to write")
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / ".out.partial").rglob("*.tmp"))
    run_rewrite(single, tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")
