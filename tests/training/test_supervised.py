"""The supervised loop on a microscopic model: it learns, repeats itself byte for byte, resumes, and fails in words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from holdfast.data.types import Sample
from holdfast.errors import ConfigError, DataError, TrainingError
from holdfast.models.load import load
from holdfast.models.loaded import LoadedModel
from holdfast.training.supervised import TrainResult, resolve_precision, train
from holdfast.training.training_config import TrainingConfig

CONFIG = TrainingConfig(rank=4, alpha=8, dropout=0.1, learning_rate=5e-3, max_steps=6, batch_size=4, precision="fp32")


@pytest.fixture(scope="module")
def loaded(pico_folder: Path) -> LoadedModel:
    return load(pico_folder, device="cpu")


@pytest.fixture(scope="module")
def samples(pico_stream) -> list[Sample]:
    return list(pico_stream.tasks[0].train)


def factors(result: TrainResult) -> dict[str, torch.Tensor]:
    return load_file(result.adapter / "adapter_model.safetensors")


def run(loaded: LoadedModel, samples: list[Sample], folder: Path, **changes) -> TrainResult:
    config = TrainingConfig(**{**CONFIG.__dict__, **changes.pop("config", {})})
    return train(loaded, samples, config, **{"work_dir": folder, "seed": 0, **changes})


@pytest.fixture(scope="module")
def reference(loaded, samples, tmp_path_factory) -> TrainResult:
    return run(loaded, samples, tmp_path_factory.mktemp("reference"))


def test_the_task_is_learned_and_the_base_untouched(loaded, samples, tmp_path):
    before = {k: v.clone() for k, v in loaded.model.state_dict().items()}
    result = run(loaded, samples, tmp_path, config={"max_steps": 25})
    assert result.history[-1]["loss"] < 0.6 * result.history[0]["loss"]
    after = loaded.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert not any(p.requires_grad for p in loaded.model.parameters()) and not loaded.model.training
    assert loaded.model.config.use_cache
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_every_linear_of_the_language_model_gets_an_adapter(loaded, reference):
    from holdfast.models.families import editable_linears

    found = {k.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for k in factors(reference)}
    assert found == set(editable_linears(loaded.model))
    assert all(v.dtype == torch.float32 for v in factors(reference).values())


def test_same_seed_same_bytes_and_another_seed_other_bytes(loaded, samples, reference, tmp_path):
    again = run(loaded, samples, tmp_path / "again")
    other = run(loaded, samples, tmp_path / "other", seed=1)
    name = "adapter_model.safetensors"
    assert (again.adapter / name).read_bytes() == (reference.adapter / name).read_bytes()
    assert (other.adapter / name).read_bytes() != (reference.adapter / name).read_bytes()


def test_a_killed_task_resumes_from_its_state_to_the_same_bytes(loaded, samples, reference, tmp_path):
    seen: list[int] = []

    def kill_at_five(event: str, *, done: int, total: int) -> None:
        seen.append(done)
        if done == 5 and seen.count(5) == 1:
            raise KeyboardInterrupt

    saving = {"config": {"save_steps": 2}, "progress": kill_at_five}
    with pytest.raises(KeyboardInterrupt):
        run(loaded, samples, tmp_path, **saving)
    # A state that was being written when the power went: no mark, must not be resumed.
    torn = tmp_path / "trainer" / "checkpoint-5"
    torn.mkdir()
    (torn / "trainer_state.json").write_text("{}")
    result = run(loaded, samples, tmp_path, **saving)
    assert seen == [1, 2, 3, 4, 5, 5, 6]
    name = "adapter_model.safetensors"
    assert (result.adapter / name).read_bytes() == (reference.adapter / name).read_bytes()
    assert not (tmp_path / "trainer").exists()


def test_micro_batches_change_memory_and_not_the_result(loaded, samples, tmp_path):
    # Without dropout, whose noise is drawn per pass.
    whole = run(loaded, samples, tmp_path / "whole", config={"dropout": 0.0})
    split = run(loaded, samples, tmp_path / "split", config={"dropout": 0.0, "micro_batch_size": 2})
    for name, value in factors(whole).items():
        torch.testing.assert_close(factors(split)[name], value, rtol=2e-3, atol=2e-5)


def test_recomputing_activations_changes_nothing(loaded, samples, reference, tmp_path):
    result = run(loaded, samples, tmp_path, config={"gradient_checkpointing": True})
    for name, value in factors(reference).items():
        torch.testing.assert_close(factors(result)[name], value, rtol=1e-4, atol=1e-6)
    assert not loaded.model.is_gradient_checkpointing


def test_penalty_is_part_of_the_loss_whatever_the_micro_batch(loaded, samples, tmp_path):
    calls = []

    def keep_small(model, inputs, outputs):
        calls.append(tuple(outputs.logits.shape[:1]))
        return 1e3 * sum((p**2).sum() for p in model.parameters() if p.requires_grad)

    settings = {"config": {"dropout": 0.0, "max_steps": 3, "max_grad_norm": 0.0}}
    whole = run(loaded, samples, tmp_path / "whole", penalty=keep_small, **settings)
    settings["config"]["micro_batch_size"] = 1
    split = run(loaded, samples, tmp_path / "split", penalty=keep_small, **settings)
    assert calls == [(4,)] * 3 + [(1,)] * 12
    first, second = whole.history[0]["loss"], split.history[0]["loss"]
    assert first > 100 and second == pytest.approx(first, rel=1e-4)


@pytest.mark.parametrize("mean", ["tokens", "samples"])
def test_a_penalty_that_is_a_mean_is_one_over_the_whole_step(loaded, samples, tmp_path, mean):
    said = ["red", "it is the red one", "no", "a square, and a red one at that", "yes"]  # the last batch is smaller
    unlike = [Sample.single(f"s{i}", "<image>\nWhich?", t, images=samples[i].images) for i, t in enumerate(said)]

    def of_tokens(model, inputs, outputs):
        return 3.0 * outputs.loss

    def of_samples(model, inputs, outputs):
        return outputs.logits[:, -1].float().pow(2).mean()

    def of(micro):
        config = {"dropout": 0.0, "epochs": 1.0, "max_steps": None, "micro_batch_size": micro, "max_grad_norm": 0.0}
        penalty = of_tokens if mean == "tokens" else of_samples
        equal = (
            unlike
            if mean == "tokens"
            else [replace(s, turns=(s.turns[0], replace(s.turns[1], text="red"))) for s in unlike]
        )
        return run(loaded, equal, tmp_path / str(micro), config=config, penalty=penalty, penalty_mean=mean)

    whole, split = of(4), of(2 if mean == "samples" else 1)
    assert [row["loss"] for row in split.history] == pytest.approx([row["loss"] for row in whole.history], rel=1e-4)
    for name, value in factors(whole).items():
        torch.testing.assert_close(factors(split)[name], value, rtol=2e-3, atol=2e-5)


def test_epochs_count_the_last_smaller_batch(loaded, samples, tmp_path):
    config = {"max_steps": None, "epochs": 2.0, "batch_size": 3}
    assert len(samples) == 8
    assert run(loaded, samples, tmp_path, config=config).steps == 6


def test_a_long_sample_is_cut_and_counted_never_into_its_images(loaded, samples, tmp_path):
    request = samples[0].prompt
    long = Sample.single("long", f"<image>\n{request}", "red " * 30, images=samples[0].images)
    result = run(loaded, [long], tmp_path, config={"max_length": 100, "max_steps": 2, "batch_size": 1})
    assert result.cut == 2
    short_context = replace(loaded)
    short_context.__dict__["context_length"] = 120  # what the model's configuration would say
    one = {"max_steps": 1, "batch_size": 1}
    assert run(short_context, [long], tmp_path / "cut", config={"max_length": 100, **one}).cut == 1
    for bound in (None, 150):
        with pytest.raises(DataError, match=r"'long' is \d+ tokens long .* has a context of 120"):
            run(short_context, [long], tmp_path / "whole", config={"max_length": bound})
    with pytest.raises(DataError, match=r"'long' is \d+ tokens long and max_length 5 would cut into its images"):
        run(loaded, [long], tmp_path, config={"max_length": 5})


@pytest.mark.parametrize("workers", [0, 2])
def test_cuts_are_counted_in_every_process_and_through_a_kill(loaded, samples, tmp_path, workers):
    long = [
        Sample.single(f"long{i}", "<image>\nWhat?", "red " * (30 if i % 2 else 1), images=samples[0].images)
        for i in range(8)
    ]
    killed = []

    def kill_once(event, *, done, total):
        if done == 3 and not killed:
            killed.append(done)
            raise KeyboardInterrupt

    config = {
        "max_length": 100,
        "max_cut_share": 0.5,
        "max_steps": None,
        "epochs": 2.0,
        "workers": workers,
        "save_steps": 2,
    }
    assert run(loaded, long, tmp_path / "whole", config=config).cut == 8
    with pytest.raises(KeyboardInterrupt):
        run(loaded, long, tmp_path / "killed", config=config, progress=kill_once)
    assert run(loaded, long, tmp_path / "killed", config=config, progress=kill_once).cut == 8


def test_training_stops_before_its_first_step_where_many_samples_would_be_cut(loaded, samples, tmp_path):
    words = [30 if i < 35 else 1 for i in range(40)]
    long = [Sample.single(f"s{i}", "<image>\nWhat?", "red " * n, images=samples[0].images) for i, n in enumerate(words)]
    steps = []
    with pytest.raises(
        DataError, match=r"max_length 100 would cut 35 of 40 samples \(88 %.*allow it with max_cut_share"
    ):
        run(loaded, long, tmp_path, config={"max_length": 100}, progress=lambda event, **_: steps.append(event))
    assert not steps and not (tmp_path / "adapter").exists()
    assert run(loaded, long, tmp_path, config={"max_length": 100, "max_cut_share": 0.9, "max_steps": 1}).cut > 0
    few = [*long[:2], *long[35:], *long[35:], *long[35:], *long[35:]]
    assert run(loaded, few, tmp_path, config={"max_length": 100, "max_steps": 1}).steps == 1
    with pytest.raises(ConfigError, match=r"max_cut_share is 1\.5"):
        TrainingConfig(max_cut_share=1.5)


def test_a_loss_that_is_not_finite_names_step_and_last_good_state(loaded, samples, tmp_path):
    passes = []

    def breaks_at_the_fourth(model, inputs, outputs):
        passes.append(1)
        return torch.tensor(float("nan") if len(passes) == 4 else 0.0)

    with pytest.raises(
        TrainingError, match=r"loss is nan at step 4 of 6.*finite state.* is .*checkpoint-2\..*another --out"
    ):
        run(loaded, samples, tmp_path / "a", penalty=breaks_at_the_fourth, config={"save_steps": 2})
    passes.clear()
    with pytest.raises(TrainingError, match="Last good state: the checkpoint that this task started from"):
        run(loaded, samples, tmp_path / "b", penalty=breaks_at_the_fourth)
    assert not (tmp_path / "b" / "adapter").exists()


def test_a_gradient_that_is_not_finite_stops_before_it_is_applied(loaded, samples, tmp_path):
    def steep(model, inputs, outputs):
        parameter = next(p for p in model.parameters() if p.requires_grad)
        return (parameter - parameter.detach()).abs().sqrt().sum()  # 0, with an infinite slope

    with pytest.raises(TrainingError, match=r"The gradient is (nan|inf) at step 1 of 6"):
        run(loaded, samples, tmp_path, penalty=steep)


def test_an_empty_split_and_a_frozen_adapter_are_refused(loaded, samples, tmp_path):
    from holdfast.training.supervised import lora_adapter

    def frozen(model, config):
        wrapped = lora_adapter(model, config)
        wrapped.requires_grad_(False)
        return wrapped

    with pytest.raises(DataError, match="training split is empty"):
        run(loaded, [], tmp_path)
    with pytest.raises(TrainingError, match="no trainable parameter"):
        run(loaded, samples, tmp_path, adapter=frozen)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rank": 0}, "rank is 0; expected more than 0"),
        ({"batch_size": 6, "micro_batch_size": 4}, "micro_batch_size 4 does not divide batch_size 6"),
        ({"dropout": 1.0}, r"dropout is 1\.0; expected a share"),
        ({"save_steps": 0}, "save_steps is 0; expected 1 or more, or null"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0; expected 0 or more"),
    ],
)
def test_a_wrong_setting_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**change)


def test_the_history_is_plain_data(reference):
    assert len(reference.history) == 6
    assert {"step", "loss", "learning_rate", "grad_norm"} <= set(json.loads(json.dumps(reference.history[0])))


@pytest.mark.parametrize("has_bf16", [True, False])
def test_auto_precision_is_bf16_where_the_cpu_has_instructions_for_it(monkeypatch, has_bf16):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bf16}, raising=False)
    assert resolve_precision(torch.device("cpu"), "auto") == ("bf16" if has_bf16 else "fp32")
    assert resolve_precision(torch.device("cpu"), "fp32") == "fp32"


def test_tuning_in_bf16_learns_like_fp32_and_leaves_the_attention_as_it_was(loaded, samples, reference, tmp_path):
    usual = loaded.model.config._attn_implementation
    result = run(loaded, samples, tmp_path, config={"precision": "bf16"})
    assert result.precision == "bf16" and reference.precision == "fp32"
    assert loaded.model.config._attn_implementation == usual == "sdpa"
    assert result.history[0]["loss"] == pytest.approx(reference.history[0]["loss"], rel=0.02)
    assert all(v.dtype == torch.float32 for v in factors(result).values())
