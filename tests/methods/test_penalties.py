"""What each penalty adds to the loss, against its formula on live LoRA factors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from holdfast.errors import ConfigError
from holdfast.methods import get
from holdfast.methods._glue.lora_layers import carried, carry, live_factors, read_adapter
from holdfast.models.encode import encode_training
from holdfast.models.families import editable_linears
from holdfast.models.load import load
from holdfast.stream.protocol import Checkpoint, TaskContext
from holdfast.training.supervised import lora_adapter
from holdfast.training.training_config import TrainingConfig

OUTPUTS = SimpleNamespace(logits=torch.zeros(1, 1, 1))


@pytest.fixture
def ctx(tmp_path, pico_stream, pico_folder) -> TaskContext:
    """The second task."""
    start = Checkpoint(base=str(pico_folder))
    return TaskContext(
        stream=pico_stream,
        step=1,
        task_names=("colour", "name"),
        theta_0=start,
        previous=start,
        work_dir=tmp_path / "2",
        previous_work_dir=tmp_path / "1",
        seed=0,
    )


@pytest.fixture
def tuned(pico_folder):
    """A model under a LoRA that is not zero."""
    torch.manual_seed(0)
    loaded = load(pico_folder, device="cpu")
    model = lora_adapter(loaded, TrainingConfig(rank=2, alpha=4, dropout=0.5))
    for factors in live_factors(model):
        factors.b.data.normal_(std=0.1)
    return model


def before(ctx: TaskContext, file: str, tensors: dict[str, torch.Tensor]) -> None:
    """Pretend that the step before left `tensors`."""
    import dataclasses

    carry(dataclasses.replace(ctx, work_dir=ctx.previous_work_dir), file, lambda: tensors)


def test_live_factors_are_those_of_every_linear_and_of_the_saved_adapter(tuned, tmp_path):
    tuned.save_pretrained(tmp_path)
    saved = {f.name: f for f in read_adapter(tmp_path)}
    live = {f.name: f for f in live_factors(tuned)}
    assert set(saved) == set(live) == set(editable_linears(tuned.unload()))
    for name, factors in live.items():
        torch.testing.assert_close(saved[name].update(), factors.update().detach())
        assert factors.scaling == 2.0


def test_ewc_is_the_fisher_weighted_square_of_the_change(ctx, tuned):
    names = [f.name for f in live_factors(tuned)]
    fisher = {f.name: torch.rand_like(f.update()) for f in live_factors(tuned)}
    before(ctx, "fisher.safetensors", {k: v.detach() for k, v in fisher.items() if k != names[0]})
    penalty = get("ewc", weight=3.0).training_options(ctx)["penalty"](tuned, {}, OUTPUTS)
    expected = 1.5 * sum((fisher[f.name] * f.update() ** 2).sum() for f in live_factors(tuned) if f.name != names[0])
    assert float(penalty.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    penalty.backward()
    assert all(p.grad is not None for f in live_factors(tuned) for p in (f.a, f.b) if f.name != names[0])


def test_ewc_estimates_and_adds_up_the_fisher(ctx, pico_folder):
    method = get("ewc", fisher_samples=2, decay=0.5)
    found = method._fisher(ctx, Checkpoint(base=str(pico_folder)))
    assert set(found) == set(editable_linears(load(pico_folder, device="cpu").model))
    assert all(bool((v >= 0).all()) for v in found.values()) and any(float(v.sum()) > 0 for v in found.values())
    before(ctx, "fisher.safetensors", found)
    again = method._fisher(ctx, Checkpoint(base=str(pico_folder)))
    for name, value in found.items():
        torch.testing.assert_close(again[name], 1.5 * value)


def test_o_lora_is_the_overlap_of_row_spaces(ctx, tuned):
    rows = {f.name: torch.randn(3, f.a.shape[1]) for f in live_factors(tuned)}
    before(ctx, "rows.safetensors", rows)
    penalty = get("o_lora", weight=0.25).training_options(ctx)["penalty"](tuned, {}, OUTPUTS)
    expected = 0.25 * sum((rows[f.name] @ f.a.T).abs().sum() for f in live_factors(tuned))
    assert float(penalty.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_o_lora_keeps_the_new_factors_small_from_the_first_task(ctx, tuned):
    penalty = get("o_lora", norm_weight=0.3).training_options(ctx)["penalty"]
    sizes = [m.norm() for f in live_factors(tuned) for m in (f.a, f.b)]
    found = penalty(tuned, {}, OUTPUTS)
    assert float(found.detach()) == pytest.approx(0.3 * float(sum(sizes).detach()), rel=1e-5)
    for f in live_factors(tuned):
        f.b.data.zero_()  # as at the first step
    penalty(tuned, {}, OUTPUTS).backward()
    assert all(torch.isfinite(p.grad).all() for f in live_factors(tuned) for p in (f.a, f.b))


def test_reg_lora_charges_marked_entries_only(ctx, tuned):
    marked = {f.name: torch.tensor([0, 5]) for f in live_factors(tuned)}
    before(ctx, "marked.safetensors", marked)
    penalty = get("reg_lora", weight=2.0).training_options(ctx)["penalty"](tuned, {}, OUTPUTS)
    # On B A as the factors stand: alpha / r is 2 here, and would make the same penalty twice as heavy.
    means = [(f.b @ f.a).flatten()[[0, 5]].abs().mean() for f in live_factors(tuned)]
    assert {f.scaling for f in live_factors(tuned)} == {2.0}
    assert float(penalty.detach()) == pytest.approx(2.0 * float(sum(means).detach()) / len(means), rel=1e-5)


@pytest.mark.parametrize("name", ["ewc", "o_lora", "reg_lora"])
def test_the_first_task_pays_nothing(ctx, tuned, name):
    assert float(get(name).training_options(ctx)["penalty"](tuned, {}, OUTPUTS).detach()) == 0


def test_lwf_compares_with_the_model_without_its_adapter(ctx, tuned, pico_folder, pico_stream):
    loaded = load(pico_folder, device="cpu")
    inputs = encode_training(loaded, list(pico_stream.tasks[0].train[:2]))
    tuned.eval()
    penalty = get("lwf", weight=1.0, temperature=1.0).training_options(ctx)["penalty"]
    from holdfast.functional.distill import next_token_kl

    shown = {k: v for k, v in inputs.items() if k != "labels"}
    tuned.train()
    outputs = SimpleNamespace(logits=torch.randn(*inputs["labels"].shape, 320, requires_grad=True))
    found = penalty(tuned, inputs, outputs)
    expected = next_token_kl(outputs.logits, loaded.model(**shown).logits, inputs["labels"])
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert tuned.training
    for scaled, factor in ((False, 1.0), (True, 9.0)):
        at_three = get("lwf", weight=0.5, temperature=3.0, scaled=scaled).training_options(ctx)["penalty"]
        half = next_token_kl(outputs.logits, loaded.model(**shown).logits, inputs["labels"], temperature=3.0) / 2
        assert float(at_three(tuned, inputs, outputs).detach()) == pytest.approx(
            factor * float(half.detach()), rel=1e-4
        )
    found.backward()
    assert outputs.logits.grad is not None


def test_replay_adds_the_same_share_of_every_earlier_task(ctx, pico_stream):
    samples = get("replay", share=0.5).samples(ctx)
    own = len(pico_stream.tasks[1].train)
    assert [s.id for s in samples[:own]] == [s.id for s in pico_stream.tasks[1].train]
    assert len(samples) == own + 4 and all(s.id.startswith("colour-train") for s in samples[own:])
    assert [s.id for s in get("replay", share=0.5).samples(ctx)] == [s.id for s in samples]


def test_what_is_carried_is_made_once(ctx):
    before(ctx, "x.safetensors", {"a": torch.ones(2)})
    before(ctx, "x.safetensors", {"a": torch.zeros(2)})
    assert carried(ctx, "x.safetensors")["a"].tolist() == [1.0, 1.0]
    assert carried(ctx, "other.safetensors") == {}


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("ewc", {"decay": 2.0}, "decay 2.0"),
        ("replay", {"share": 0.0}, r"share is 0\.0"),
        ("dare", {"drop": 1.0}, r"drop is 1\.0"),
        ("o_lora", {"norm_weight": -1.0}, r"norm_weight is -1\.0"),
        ("safe_lora", {"unaligned": "x", "lowest": 0}, r"lowest is 0"),
        ("model_tailor", {"first_block": 1.0}, r"first_block is 1\.0"),
        ("model_tailor", {"change_weight": 2.0}, r"change_weight is 2\.0"),
        ("ties", {"density": 0.0}, r"density is 0\.0"),
        ("interpolation", {"factor": 2.0}, r"factor is 2\.0; expected 0\.\.1"),
        ("safe_lora", {}, r"methods\.safe_lora: missing key\(s\) unaligned"),
        ("safe_lora", {"unaligned": "x", "threshold": 3.0}, r"threshold is 3\.0"),
        ("lwf", {"temperature": 0.0}, "temperature 0.0; expected"),
        ("hpa", {"task_samples": 0}, "task_samples is 0; expected 1 or more"),
    ],
)
def test_a_wrong_option_is_named(name, options, message):
    with pytest.raises(ConfigError, match=message):
        get(name, **options)


@pytest.mark.parametrize(
    "name, option, value",
    [
        ("dare", "drop", 0.9),
        ("safe_lora", "lowest", 10),
        ("safe_lora", "threshold", None),
        ("o_lora", "weight", 0.5),
        ("o_lora", "norm_weight", 0.0),
        ("reg_lora", "share", 0.02),
        ("reg_lora", "weight", 2.5e3),
        ("ties", "density", 0.2),
        ("ties", "weight", 1.0),
        ("ties", "trim", "all"),
        ("model_tailor", "change_weight", 0.8),
        ("model_tailor", "tuned_share", 0.1),
        ("model_tailor", "first_block", 20 / 32),
        ("safe_delta", "strength", 0.1),
        ("safe_delta", "protected_share", 0.15),
    ],
)
def test_defaults_are_those_of_the_released_programs(name, option, value):
    needed = {"unaligned": "x"} if name == "safe_lora" else {}
    assert getattr(get(name, **needed).config, option) == value
