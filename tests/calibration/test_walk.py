"""Grams against an independent reference, however they are walked: padded, in passes, streamed, by token kind."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from holdfast.calibration import walk
from holdfast.calibration.grams import LayerGram
from holdfast.calibration.walk import walk_grams
from holdfast.data.types import Sample
from holdfast.errors import CalibrationError, ConfigError, StorageError
from holdfast.models.encode import ANSWER, IMAGE, encode_training, token_kinds
from holdfast.models.families import editable_linears
from holdfast.models.load import load
from holdfast.models.loaded import LoadedModel
from holdfast.models.streaming import load_streamed

Q = "model.language_model.layers.0.self_attn.q_proj"
DOWN = "model.language_model.layers.1.mlp.down_proj"


def hessians(loaded: LoadedModel, samples: list[Sample], **options: object) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def consume(layer: LayerGram) -> None:
        for module in layer.modules:
            found[module] = layer.gram.hessian()

    walk_grams(loaded, samples, consume, **options)  # type: ignore[arg-type]
    return found


def reference(loaded: LoadedModel, samples: list[Sample], name: str, kinds: tuple[int, ...] | None = None) -> Tensor:
    """2/n sum X^T X in float64, one sample at a time, by nothing but a hook."""
    total: Tensor | float = 0.0
    seen: list[Tensor] = []
    handle = loaded.model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for sample in samples:
        inputs = encode_training(loaded, [sample])
        kind = token_kinds(loaded, inputs)[0]
        inputs.pop("labels")
        loaded.model(**inputs)
        x = seen.pop()[0].double()
        if kinds is not None:
            x = x[torch.isin(kind, torch.tensor(kinds))]
        total = total + 2 / len(samples) * x.T @ x
    handle.remove()
    assert isinstance(total, Tensor)
    return total


@pytest.fixture(scope="module")
def whole(loaded: LoadedModel, samples: list[Sample]) -> dict[str, Tensor]:
    return hessians(loaded, samples)


@pytest.mark.parametrize("name", [Q, DOWN])
def test_a_padded_batch_gives_the_gram_of_samples_one_by_one(
    loaded: LoadedModel, samples: list[Sample], whole: dict[str, Tensor], name: str
) -> None:
    expected = reference(loaded, samples, name)
    torch.testing.assert_close(whole[name].double(), expected, rtol=1e-5, atol=1e-5 * float(expected.diagonal().mean()))


def test_every_editable_layer_is_reported(loaded: LoadedModel, whole: dict[str, Tensor]) -> None:
    assert set(whole) == set(editable_linears(loaded.model))


def test_shared_inputs_are_seen_at_run_time(loaded: LoadedModel, samples: list[Sample]) -> None:
    groups = []
    walk_grams(loaded, samples, lambda layer: groups.append([m.rpartition(".")[2] for m in layer.modules]))
    assert groups == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2


def test_passes_and_streaming_change_nothing(
    loaded: LoadedModel, samples: list[Sample], whole: dict[str, Tensor], llava_folder: Path
) -> None:
    in_passes = hessians(loaded, samples, blocks_per_pass=1)
    streamed = hessians(load_streamed(llava_folder, device="cpu"), samples, blocks_per_pass=1)
    for name, expected in whole.items():
        assert torch.equal(in_passes[name], expected), name
        assert torch.equal(streamed[name], expected), name


def test_a_spool_on_disk_changes_nothing(
    loaded: LoadedModel, samples: list[Sample], whole: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "_SPOOL_SHARE", 10**18)
    found = hessians(loaded, samples, blocks_per_pass=1)
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_a_full_temporary_disk_is_said_in_a_sentence(
    loaded: LoadedModel, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, path: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(walk, "_SPOOL_SHARE", 10**18)
    monkeypatch.setattr("holdfast.calibration.resume_forward.save_file", full)
    with pytest.raises(StorageError, match=r"No space left to write .*holdfast-calibrate-.*TMPDIR"):
        walk_grams(loaded, samples, lambda layer: None, blocks_per_pass=1)


def test_later_passes_run_neither_the_tower_nor_earlier_blocks(loaded: LoadedModel, samples: list[Sample]) -> None:
    runs = {"model.vision_tower": 0, "model.language_model.layers.0.mlp": 0, "lm_head": 0}
    handles = []
    for name in runs:

        def count(*_: object, name: str = name) -> None:
            runs[name] += 1

        handles.append(loaded.model.get_submodule(name).register_forward_hook(count))
    walk_grams(loaded, samples[1:2], lambda layer: None, blocks_per_pass=1)
    for handle in handles:
        handle.remove()
    assert runs == {"model.vision_tower": 1, "model.language_model.layers.0.mlp": 1, "lm_head": 0}


def test_the_model_is_left_as_it_was(loaded: LoadedModel, samples: list[Sample]) -> None:
    walk_grams(loaded, samples, lambda layer: None, blocks_per_pass=1)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in loaded.model.get_decoder().modules())
    assert not any("forward" in m.__dict__ or "get_image_features" in m.__dict__ for m in loaded.model.modules())


@pytest.mark.parametrize(("tokens", "kinds"), [("answer", (ANSWER,)), ("text", (1, ANSWER)), ("all", None)])
def test_token_kinds_choose_positions(
    loaded: LoadedModel, samples: list[Sample], tokens: str, kinds: tuple[int, ...] | None
) -> None:
    found = hessians(loaded, samples, tokens=tokens)[Q].double()
    expected = reference(loaded, samples, Q, kinds)
    assert IMAGE not in (kinds or ())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.diagonal().mean()))


def test_blocks_can_be_chosen(loaded: LoadedModel, samples: list[Sample], whole: dict[str, Tensor]) -> None:
    found = hessians(loaded, samples, blocks=[1])
    assert set(found) == {name for name in whole if ".layers.1." in name}
    assert torch.equal(found[DOWN], whole[DOWN])


@pytest.fixture
def nothing_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk._Budget, "_held", lambda self: 0)


def test_a_budget_decides_how_many_blocks_are_alive(
    loaded: LoadedModel, samples: list[Sample], nothing_held: None
) -> None:
    # A block: 3 Grams of 32 x 32 and one of 48 x 48 in fp32, counted as 6 and one until sharing has been seen.
    report = walk_grams(loaded, samples, lambda layer: None, memory_bytes=70_000)
    assert report.passes == ((0, 1), (1, 2))
    assert walk_grams(loaded, samples, lambda layer: None, memory_bytes=10**9).passes == ((0, 2),)


def test_a_budget_too_small_for_one_block_is_refused(
    loaded: LoadedModel, samples: list[Sample], nothing_held: None
) -> None:
    with pytest.raises(ConfigError, match=r"budget of 0\.00 GiB is too small: .* block 0 needs .* Raise --memory"):
        walk_grams(loaded, samples, lambda layer: None, memory_bytes=20_000)


def test_the_budget_counts_what_the_process_holds(loaded: LoadedModel, samples: list[Sample]) -> None:
    held = psutil.Process().memory_info().rss
    with pytest.raises(ConfigError, match="are held already"):
        walk_grams(loaded, samples, lambda layer: None, memory_bytes=held // 2)


# Rank 0 has room for one block at a time, rank 1 for the whole model; then rank 0 has room for none.
UNLIKE_BUDGETS = """
import sys
import torch.distributed as dist
from holdfast.data.types import Sample
from holdfast.errors import ConfigError
from holdfast.calibration import walk
from holdfast.models.load import load

folder, meeting, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
walk._Budget._held = lambda self: 0
loaded = load(folder, device="cpu")
samples = [Sample.single(str(i), "Say hello.", "Hello there.") for i in range(2)]
report = walk.walk_grams(loaded, samples, lambda layer: None, memory_bytes=(70_000, 10**9)[rank])
print(report.passes)
try:
    walk.walk_grams(loaded, samples, lambda layer: None, memory_bytes=(20_000, 10**9)[rank])
except ConfigError as error:
    print(error)
dist.destroy_process_group()
"""


def test_processes_with_unlike_budgets_walk_the_same_passes_or_refuse_together(
    llava_folder: Path, tmp_path: Path
) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", UNLIKE_BUDGETS, str(llava_folder), str(tmp_path / "meeting"), str(rank)],
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [lines[0] for lines in said] == ["((0, 1), (1, 2))"] * 2
    assert "is too small" in said[0][1]
    assert "Another process has no memory for block 0" in said[1][1]


def test_no_samples_is_an_error(loaded: LoadedModel) -> None:
    with pytest.raises(CalibrationError, match="calibration set is empty"):
        walk_grams(loaded, [], lambda layer: None)


def test_answers_are_needed_where_they_are_asked_for(loaded: LoadedModel) -> None:
    with pytest.raises(CalibrationError, match="'mute' has no answer"):
        walk_grams(loaded, [Sample.single("mute", "Hi")], lambda layer: None, tokens="answer")


def test_requests_alone_can_calibrate(loaded: LoadedModel, pictures: list[Path]) -> None:
    asked = [Sample.single("a", "Hi"), Sample.single("b", "<image>\nWhat is it?", images=pictures[:1])]
    report = walk_grams(loaded, asked, lambda layer: None)
    assert report.sequences == 2
    mixed = [*asked, Sample.single("c", "Hi", "Hello")]
    for batch_size in (1, 16):
        with pytest.raises(CalibrationError, match="with and without an answer are mixed"):
            walk_grams(loaded, mixed, lambda layer: None, batch_size=batch_size)


def test_nan_activations_name_the_layer_and_the_samples(llava_folder: Path, samples: list[Sample]) -> None:
    broken = load(llava_folder, device="cpu")
    with torch.no_grad():
        broken.model.get_submodule("model.language_model.layers.0.mlp.up_proj").weight[3] = float("nan")
    with pytest.raises(CalibrationError, match=r"layers\.0\.mlp\.down_proj, while calibrating on samples .* NaN"):
        walk_grams(broken, samples, lambda layer: None)


def test_a_layer_that_never_runs_is_named(llava_folder: Path, samples: list[Sample]) -> None:
    odd = load(llava_folder, device="cpu")
    block = odd.model.get_submodule("model.language_model.layers.1")
    block.add_module("spare", torch.nn.Linear(4, 4))
    with pytest.raises(CalibrationError, match=r"layers\.1\.spare .* never ran"):
        walk_grams(odd, samples, lambda layer: None)


def test_a_layer_of_routed_tokens_is_refused(llava_folder: Path, samples: list[Sample]) -> None:
    from holdfast.errors import ModelError

    odd = load(llava_folder, device="cpu")
    mlp = odd.model.get_submodule("model.language_model.layers.0.mlp")
    original = mlp.up_proj.forward
    mlp.up_proj.forward = lambda x: original(x)
    mlp.add_module("expert", torch.nn.Linear(32, 32))
    mlp.register_forward_pre_hook(lambda module, args: module.expert(args[0][0, :3]) is None)
    with pytest.raises(ModelError, match="routed experts"):
        walk_grams(odd, samples, lambda layer: None)


def test_a_consumer_may_edit_the_layer_while_its_gram_is_alive(llava_folder: Path, samples: list[Sample]) -> None:
    live = load(llava_folder, device="cpu")

    def consume(layer: LayerGram) -> None:
        for linear in layer.linears:
            linear.weight.mul_(0)

    walk_grams(live, samples, consume)
    assert all(bool((w.weight == 0).all()) for w in editable_linears(live.model).values())


def test_remembered_vision_outputs_keep_undeclared_fields() -> None:
    """Some families hang `pooler_output` on an output class that does not declare it."""
    from transformers.modeling_outputs import BaseModelOutput

    from holdfast.calibration.resume_forward import _pack, _unpack

    output = BaseModelOutput(last_hidden_state=torch.ones(2, 3))
    output.pooler_output = (torch.ones(4, 5), torch.ones(1, 5))
    output.entering_later = [torch.full((2, 2), 7.0)]
    kept: dict[str, Tensor] = {}
    back = _unpack(_pack(output, "", kept, keep=True), kept)
    assert isinstance(back, BaseModelOutput)
    assert [t.shape for t in back.pooler_output] == [(4, 5), (1, 5)]
    assert back.last_hidden_state.shape == (2, 3)
    assert torch.equal(back.entering_later[0], torch.full((2, 2), 7.0))
    assert [t.shape for t in kept.values()] == [(2, 2)]


@pytest.mark.parametrize("blocks", [None, (1,)])
def test_a_block_reads_what_the_edited_blocks_before_it_give(
    loaded: LoadedModel, samples: list[Sample], whole: dict[str, Tensor], blocks: tuple[int, ...] | None
) -> None:
    """Against a plain walk over a model whose first block was edited beforehand; one not asked for stays as it is."""
    edited, found, before = copy.deepcopy(loaded), {}, copy.deepcopy(loaded)

    def halve(model: LoadedModel, block: int) -> None:
        with torch.no_grad():
            for linear in editable_linears(model.model, [block]).values():
                linear.weight.mul_(0.5)

    def consume(layer: LayerGram) -> None:
        found.update({module: layer.gram.hessian() for module in layer.modules})
        with torch.no_grad():
            for linear in layer.linears:
                linear.weight.mul_(0.5)

    report = walk_grams(edited, samples, consume, blocks=blocks, edits=True)
    assert report.passes == ((0, 1), (1, 2))
    if blocks is None:
        halve(before, 0)
    # A block's own Grams are read before its edit, those of the next one behind it.
    expected = {**hessians(before, samples), **{name: whole[name] for name in editable_linears(loaded.model, [0])}}
    assert set(found) == set(editable_linears(loaded.model, blocks))
    for name, gram in found.items():
        torch.testing.assert_close(gram, expected[name], rtol=1e-4, atol=1e-5 * float(expected[name].abs().max()))
    moved = float((found[DOWN] - whole[DOWN]).norm() / whole[DOWN].norm())
    assert moved < 1e-4 if blocks else moved > 1e-2
