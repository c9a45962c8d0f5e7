"""Reading finds every tensor, and every kind of damage before anything is written."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast.checkpoints.fingerprint import fingerprint
from holdfast.checkpoints.reader import CheckpointReader
from holdfast.errors import CheckpointError

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_every_tensor_is_read_bit_for_bit(layout, request, tensors):
    with CheckpointReader(request.getfixturevalue(layout)) as reader:
        assert set(reader) == set(tensors)
        for key, tensor in tensors.items():
            read = reader.read(key)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor)
            assert reader.entry(key).shape == tuple(tensor.shape)


def test_a_read_into_a_buffer_allocates_nothing(single, tensors):
    buffer = torch.empty(4096, dtype=torch.uint8)
    with CheckpointReader(single) as reader:
        for key in tensors:
            read = reader.read(key, buffer)
            assert read.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
            assert torch.equal(read, tensors[key])


def test_a_byte_range_is_that_range(single, tensors):
    key = "multi_modal_projector.linear_1.weight"
    with CheckpointReader(single) as reader:
        piece = reader.read_range(key, torch.empty(64, dtype=torch.uint8), 10, 30)
    assert torch.equal(piece, tensors[key].view(torch.uint8).reshape(-1)[10:30])


def test_an_unknown_tensor_shows_the_nearest(single):
    with (
        CheckpointReader(single) as reader,
        pytest.raises(CheckpointError, match=r"nearest is .*0\.mlp\.up_proj"),
    ):
        reader.entry("language_model.model.layers.0.mlp.up_prj.weight")


def test_other_spellings_of_a_layer_find_it(single):
    with CheckpointReader(single) as reader:
        entry = reader.entry("model.language_model.layers.1.mlp.up_proj.weight")
    assert entry.name == "language_model.model.layers.1.mlp.up_proj.weight"


def test_a_truncated_shard_is_found_at_once(sharded):
    shard = sharded / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is truncated: it has \d+ bytes"):
        CheckpointReader(sharded)


def test_a_shard_cut_within_its_header_is_found(sharded):
    shard = sharded / "model-00001-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="is truncated"):
        CheckpointReader(sharded)


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names the shard model-00003-of-00003.* no such file"):
        CheckpointReader(sharded)


@pytest.mark.parametrize("name", ["../shard.safetensors", "ABSOLUTE", "", 3, None, "sub/../../shard.safetensors"])
def test_a_shard_name_that_leaves_the_folder_or_is_none_is_refused(name, sharded):
    last = "model-00003-of-00003.safetensors"
    outside = sharded.parent / "shard.safetensors"
    (sharded / last).rename(outside)
    index = json.loads((sharded / INDEX).read_text())
    name = str(outside) if name == "ABSOLUTE" else name
    index["weight_map"] = {key: name if file == last else file for key, file in index["weight_map"].items()}
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"expected the name of a file in .*sharded"):
        CheckpointReader(sharded)


def test_a_shard_may_be_a_link(sharded, tensors):
    last = "model-00003-of-00003.safetensors"
    outside = sharded.parent / "blob"
    (sharded / last).rename(outside)
    (sharded / last).symlink_to("../blob")
    with CheckpointReader(sharded) as reader:
        assert set(reader) == set(tensors)


def test_an_index_that_disagrees_with_a_shard_is_refused(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["ghost.weight"] = "model-00001-of-00003.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"holds ghost\.weight, but its header does not"):
        CheckpointReader(sharded)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not a safetensors file"),
        (b"<html>" * 30, "not a safetensors file"),
        (b"\x05" + b"\0" * 7 + b"{nope", "damaged"),
    ],
)
def test_something_else_under_the_name_is_refused(single, content, message):
    (single / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(single)


def test_a_header_that_lies_about_sizes_is_refused(single):
    header = json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}).encode()
    (single / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(CheckpointError, match="damaged safetensors header"):
        CheckpointReader(single)


def test_pickled_weights_are_never_loaded(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickled weights are never loaded"):
        CheckpointReader(tmp_path)
    with pytest.raises(CheckpointError, match="is no folder"):
        CheckpointReader(tmp_path / "nowhere")


def test_the_fingerprint_tells_weights_and_not_layouts(single, sharded, write, tensors, tmp_path):
    with CheckpointReader(single) as a, CheckpointReader(sharded) as b:
        assert fingerprint(a) == fingerprint(b)
    tensors["language_model.model.layers.1.mlp.up_proj.weight"] += 0.01
    with CheckpointReader(single) as a, CheckpointReader(write(tmp_path / "other", tensors)) as b:
        assert fingerprint(a) != fingerprint(b)


def test_tensors_that_the_index_leaves_out_are_read_as_transformers_reads_them(sharded, tensors):
    index = json.loads((sharded / INDEX).read_text())
    left_out = [key for key in index["weight_map"] if "mlp" in key]
    index["weight_map"] = {key: file for key, file in index["weight_map"].items() if key not in left_out}
    (sharded / INDEX).write_text(json.dumps(index))
    with CheckpointReader(sharded) as reader:
        assert set(reader) == set(tensors)
        assert all(torch.equal(reader.read(key), tensors[key]) for key in left_out)


def test_a_tensor_in_two_shards_needs_the_index_to_say_which(sharded, tensors):
    path = sharded / "model-00003-of-00003.safetensors"
    key = next(iter(load_file(sharded / "model-00001-of-00003.safetensors")))
    save_file({**load_file(path), key: torch.zeros(2)}, path)
    with CheckpointReader(sharded) as reader:
        assert torch.equal(reader.read(key), tensors[key])
    index = json.loads((sharded / INDEX).read_text())
    del index["weight_map"][key]
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"both hold .*does not say which"):
        CheckpointReader(sharded)
