"""A router without its model decides as the one inside it, holds no decoder, and knows when it is not that base's."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cram_kit
import model_zoo
from holdfast.cli import app
from holdfast.errors import AdapterError, DataError, StorageError
from holdfast.models.load import load
from holdfast.tuners.cram.folder import save_pretrained
from holdfast.tuners.cram.standalone import export_router, open_exported, open_on_base
from holdfast.tuners.cram.stored_router import read_router


def exported(family, tmp_path):
    folder = model_zoo.save(family, tmp_path / "model")
    samples = cram_kit.requests(tmp_path)
    if family == "paligemma":  # answers only requests that show a picture
        samples.pop("maths")
    loaded = load(folder, device="cpu")
    cram = cram_kit.with_experts(loaded, {name: rows[:4] for name, rows in samples.items()})
    save_pretrained(cram, tmp_path / "cram")
    export_router(tmp_path / "cram", tmp_path / "router")
    return cram, [row for rows in samples.values() for row in rows[4:7]]


@pytest.mark.parametrize("family", sorted(model_zoo.BUILDERS))
def test_it_decides_as_inside_the_model(family, tmp_path):
    cram, asked = exported(family, tmp_path)
    router = open_exported(tmp_path / "router")
    for decision, row in zip(router.decide(asked), cram.explain(asked), strict=True):
        assert dict(decision.weights) == row["weights"] and decision.group == row["group"]
        assert dict(decision.similarity) == row["similarity"]
        assert (decision.reason == "abstained") == row["abstained"]
    # Nothing of the decoder's blocks is on disk or in memory.
    blocks = [p for _, block in _blocks(router.encoder.loaded.model) for p in block.parameters()]
    assert blocks and all(p.device.type == "meta" for p in blocks)
    with safe_open(tmp_path / "router" / "encoder.safetensors", framework="pt") as file:
        assert not [key for key in file.keys() if "layers.0.self_attn" in key and "language_model" in key]  # noqa: SIM118
    whole = sum(p.numel() * p.element_size() for p in cram.loaded.model.parameters())
    assert 0 < router.bytes_held < whole and math.isfinite(router.load_seconds)


def _blocks(model):
    from holdfast.models.families import decoder_blocks

    return decoder_blocks(model)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("router")
    exported("llava", folder)
    return folder


def test_the_base_gives_the_same_router_and_the_command_says_what_it_costs(made, tmp_path):
    from typer.testing import CliRunner

    direct = open_on_base(made / "cram")
    asked = cram_kit.requests(tmp_path)["warm"][:3]
    assert [d.to_json() for d in direct.decide(asked)] == [
        d.to_json() for d in open_exported(made / "router").decide(asked)
    ]
    result = CliRunner().invoke(app, ["export-router", str(made / "cram"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0 and "3 experts" in result.output and "MB in" in result.output
    argv = ["export-router", str(made / "cram"), "--out", str(tmp_path / "again"), "--json"]
    told = json.loads(CliRunner().invoke(app, argv).stdout)
    assert told["experts"] == 3 and told["out"] == str(tmp_path / "again")


def test_a_router_that_goes_by_pictures_asks_for_one(made, tmp_path):
    folder = shutil.copytree(made / "cram", tmp_path / "cram")
    data = json.loads((folder / "router.json").read_text())
    (folder / "router.json").write_text(json.dumps(data | {"config": data["config"] | {"route_by": "image"}}))
    router = open_exported(made / "router").with_router(read_router(folder), folder)
    with pytest.raises(DataError, match="has no image, and this router goes by images only"):
        router.decide(cram_kit.requests(tmp_path)["maths"][:1])


def test_what_does_not_fit_is_refused(made, tmp_path):
    with pytest.raises(AdapterError, match="no exported router; make one with `holdfast export-router"):
        open_exported(made / "cram")
    with pytest.raises(StorageError, match="exists; choose another folder"):
        export_router(made / "cram", made / "router")
    changed = shutil.copytree(made / "router", tmp_path / "changed")
    tensors = load_file(changed / "encoder.safetensors")
    name = next(key for key in tensors if "embed_tokens" in key)
    save_file({**tensors, name: torch.randn_like(tensors[name])}, changed / "encoder.safetensors")
    with pytest.raises(AdapterError, match="not those that the router was made with"):
        open_exported(changed)
    router = json.loads((made / "router" / "router.json").read_text())
    other = shutil.copytree(made / "router", tmp_path / "other")
    (other / "router.json").write_text(json.dumps(router) + "\n")
    with pytest.raises(AdapterError, match=r"router\.json is not the file that was exported"):
        open_exported(other)
    marker = json.loads((made / "router" / "holdfast_router.json").read_text())
    for part in ("sha256", "dtype", "experts"):
        damaged = shutil.copytree(made / "router", tmp_path / part)
        (damaged / "holdfast_router.json").write_text(json.dumps({k: v for k, v in marker.items() if k != part}))
        with pytest.raises(AdapterError, match=r"is not whole .*export the router again"):
            open_exported(damaged)
    (damaged / "holdfast_router.json").write_text(json.dumps(marker))
    (damaged / "router.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"is not whole .*export the router again"):
        open_exported(damaged)
    cut = shutil.copytree(made / "router", tmp_path / "cut")
    (cut / "encoder.safetensors").write_bytes(b"")
    with pytest.raises(AdapterError, match="cannot be read"):
        open_exported(cut)
