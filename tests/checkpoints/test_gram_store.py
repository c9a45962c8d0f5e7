"""Gram matrices on disk: what comes back, one layer at a time, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from holdfast.calibration.gram_sets import GramSets, collect_grams
from holdfast.calibration.walk import walk_grams
from holdfast.checkpoints import gram_store
from holdfast.checkpoints.gram_store import GramStore, GramWriter, pack, running_mean, unpack
from holdfast.data.types import Sample
from holdfast.errors import CalibrationError, ConfigError
from holdfast.functional.hessian import InputGram
from holdfast.models.loaded import LoadedModel
from zoo_fixtures import *  # noqa: F403

META = {"model": {"fingerprint": "abc"}, "samples_sha256": "def", "normalization": "token"}
Q = "model.language_model.layers.0.self_attn.q_proj"


def gram_of(tokens: int, width: int, *, dual: bool, seed: int = 0) -> InputGram:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    return InputGram(width, "token", dual=dual).update(x)


def written(folder: Path, *, meta: dict = META, seed: int = 0, width: int = 6) -> GramStore:
    writer = GramWriter(folder, meta)
    counts = {"block_count": 2, "width": width, "sequences": 3, "tokens": 40}
    for block in range(2):
        gram = gram_of(40, width, dual=False, seed=seed + block)
        names = [f"layers.{block}.{name}_proj" for name in ("q", "k")]
        writer.write(names, pack(gram), block=block, **counts)
    return writer.finish()


@pytest.mark.parametrize("width", [1, 2, 7, 64, 513])
@pytest.mark.parametrize("dual", [True, False])
def test_a_packed_triangle_is_the_gram(width: int, dual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_store, "_TILE", 100)
    gram = gram_of(max(1, width // 3), width, dual=dual)
    packed = pack(gram)
    assert packed.shape == (width * (width + 1) // 2,) and packed.dtype == torch.float32
    full = unpack(packed, width)
    assert torch.equal(full, full.T)
    torch.testing.assert_close(full, gram.hessian().float(), rtol=1e-5, atol=1e-6)


def test_what_a_walk_wrote_is_what_the_walk_saw(loaded: LoadedModel, samples: list[Sample], tmp_path: Path) -> None:
    expected: dict[str, torch.Tensor] = {}

    def consume(layer) -> None:
        expected.update(dict.fromkeys(layer.modules, layer.gram.hessian()))

    walk_grams(loaded, samples, consume, normalization="token")
    store = collect_grams(loaded, samples, tmp_path / "grams")
    assert set(store.modules) == set(expected) == set(GramStore.open(tmp_path / "grams").modules)
    for name, full in expected.items():
        torch.testing.assert_close(store.gram(name), full.float(), rtol=1e-5, atol=1e-6 * float(full.diagonal().mean()))
    # q, k and v share one file; four distinct inputs a block.
    assert len(store.inputs) == 8 and len(list((tmp_path / "grams").glob("*.safetensors"))) == 8
    assert store.entry(Q) is store.entry(Q.replace("q_proj", "v_proj"))


def test_killed_in_a_walk_it_ends_with_the_same_bytes(
    loaded: LoadedModel, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = collect_grams(loaded, samples, tmp_path / "whole")
    write, done = GramWriter.write, []

    def killed(self, modules, lower, **counts) -> None:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(modules)
        write(self, modules, lower, **counts)

    monkeypatch.setattr(GramWriter, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        collect_grams(loaded, samples, tmp_path / "killed")
    with pytest.raises(CalibrationError, match="unfinished"):
        GramStore.open(tmp_path / "killed")
    walked: list[str] = []
    monkeypatch.setattr(GramWriter, "write", lambda self, m, lower, **c: (walked.extend(m), write(self, m, lower, **c)))
    resumed = collect_grams(loaded, samples, tmp_path / "killed")
    assert not set(walked) & {m for modules in done for m in modules}
    assert resumed.digest() == whole.digest()
    files = [sorted(p.name for p in s.folder.iterdir()) for s in (whole, resumed)]
    assert files[0] == files[1]
    assert all((whole.folder / f).read_bytes() == (resumed.folder / f).read_bytes() for f in files[0])


def test_a_memory_budget_gives_the_same_grams_in_more_passes(
    loaded: LoadedModel, samples: list[Sample], tmp_path: Path
) -> None:
    whole = collect_grams(loaded, samples, tmp_path / "whole", batch_size=2)
    with pytest.raises(ConfigError, match="budget"):
        collect_grams(loaded, samples, tmp_path / "small", batch_size=2, memory_bytes=1000)
    again = collect_grams(loaded, samples, tmp_path / "again", batch_size=2, memory_bytes=2**36)
    assert again.digest() == whole.digest()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": {"fingerprint": "other"}}, "model.fingerprint"),
        ({"samples_sha256": "other"}, "samples_sha256"),
        ({"normalization": "sum"}, "normalization"),
        ({"more": 1}, "more"),
    ],
)
def test_grams_of_something_else_are_refused(tmp_path: Path, change: dict, sentence: str) -> None:
    written(tmp_path / "grams")
    with pytest.raises(CalibrationError, match=sentence):
        GramStore.open(tmp_path / "grams", expected={**META, **change})
    with pytest.raises(CalibrationError, match=sentence):
        GramWriter(tmp_path / "grams", {**META, **change})


def damage(folder: Path, how: str) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    elif how == "changed":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(bytes(data))
    elif how == "gone":
        file.unlink()
    elif how == "another":
        save_file({"lower": torch.zeros(3)}, file)
    elif how == "index":
        (folder / "index.json").write_text("{")
    elif how == "index without rows":
        (folder / "index.json").write_text(json.dumps({"format_version": 1, "meta": {}}))
    elif how == "format":
        (folder / "index.json").write_text(json.dumps({"format_version": 99}))
    elif how == "no layer":
        data = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps({**data, "inputs": []}))
    else:
        data = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps({**data, "inputs": data["inputs"] * 2}))


@pytest.mark.parametrize(
    "how", ["cut", "changed", "gone", "another", "index", "index without rows", "format", "no layer", "twice"]
)
def test_damage_is_named(tmp_path: Path, how: str) -> None:
    store = written(tmp_path / "grams")
    damage(tmp_path / "grams", how)
    first = sorted(store.modules)[0]
    with pytest.raises(CalibrationError, match="calibrate"):
        GramStore.open(tmp_path / "grams").gram(first)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_never_written(tmp_path: Path, value: float) -> None:
    writer = GramWriter(tmp_path, META)
    lower = torch.ones(3)
    lower[1] = value
    with pytest.raises(CalibrationError, match="NaN or infinities"):
        writer.write(["layers.0.q_proj"], lower, block=0, block_count=1, width=2, sequences=1, tokens=1)
    assert not list(tmp_path.glob("*.safetensors"))


def test_nothing_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"no index\.json"):
        GramStore.open(tmp_path / "none")
    with pytest.raises(CalibrationError, match="no Gram matrix"):
        GramWriter(tmp_path / "empty", META).finish()


def test_a_running_mean_is_the_mean_of_the_steps(tmp_path: Path) -> None:
    steps = [written(tmp_path / str(i), seed=10 * i) for i in range(4)]
    past: GramStore | None = None
    for i, step in enumerate(steps):
        past = running_mean(past, step, tmp_path / f"past{i}", {"tasks": list(range(i + 1))})
    assert past is not None and past.meta["steps"] == 4
    for name in past.modules:
        expected = torch.stack([s.gram(name).double() for s in steps]).mean(0)
        torch.testing.assert_close(past.gram(name).double(), expected, rtol=1e-5, atol=1e-6)


def test_a_mean_over_other_layers_or_widths_is_refused(tmp_path: Path) -> None:
    one, wide = written(tmp_path / "one"), written(tmp_path / "wide", width=8)
    with pytest.raises(CalibrationError, match="6 inputs"):
        running_mean(one, wide, tmp_path / "a", {})
    writer = GramWriter(tmp_path / "other", META)
    writer.write(
        ["layers.0.o_proj"], pack(gram_of(9, 6, dual=False)), block=0, block_count=2, width=6, sequences=1, tokens=9
    )
    other = writer.finish()
    with pytest.raises(CalibrationError, match="other layers"):
        running_mean(one, other, tmp_path / "b", {})
    with pytest.raises(CalibrationError, match="no layer"):
        GramSets(task=one, safety=other)


def test_a_folder_with_a_stray_file_is_walked_again(tmp_path: Path) -> None:
    writer = GramWriter(tmp_path, META)
    (tmp_path / "layers.0.q_proj.safetensors").write_bytes(b"half")
    assert GramWriter(tmp_path, META).finished == set() == writer.finished
