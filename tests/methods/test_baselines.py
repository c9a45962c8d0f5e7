"""What the plain baselines learn from and what they tune: sample lists and adapters, and two tiny steps."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast.data.types import Sample
from holdfast.editing.account import EditReport
from holdfast.errors import CalibrationError, CheckpointError, ConfigError
from holdfast.functional.guardspace import guarded_start
from holdfast.methods import get, safe_anchor, seqft
from holdfast.methods._glue import repair
from holdfast.methods._glue.lora_layers import live_factors, read_adapter
from holdfast.methods._glue.refusals import refusals
from holdfast.methods.guardspace import GuardedLora
from holdfast.methods.safe_anchor import anchored_adapter, mean_loss, top_directions
from holdfast.methods.seqft import draw
from holdfast.models.encode import encode_training
from holdfast.models.families import decoder_blocks, editable_linears
from holdfast.models.load import load
from holdfast.stream.protocol import Checkpoint, TaskContext
from holdfast.training.training_config import TrainingConfig

TRAINING = {"rank": 2, "alpha": 4, "dropout": 0.0, "learning_rate": 5e-3, "max_steps": 2, "batch_size": 4}


@pytest.fixture
def ctx(tmp_path, pico_stream, pico_folder) -> TaskContext:
    """The second task."""
    start = Checkpoint(base=str(pico_folder))
    answers = [Sample.single(f"no-{i}", "How?", "No.") for i in range(6)]
    return TaskContext(
        stream=dataclasses.replace(pico_stream, safety_calibration=answers),
        step=1,
        task_names=("colour", "name"),
        theta_0=start,
        previous=start,
        work_dir=tmp_path / "2",
        previous_work_dir=tmp_path / "1",
        seed=0,
    )


def without_answers(ctx: TaskContext) -> TaskContext:
    return dataclasses.replace(ctx, stream=dataclasses.replace(ctx.stream, safety_calibration=[]))


def test_joint_learns_every_task_so_far_in_as_many_steps_as_they_have(ctx):
    method = get("joint", training={"max_steps": 7})
    assert [s.id for s in method.samples(ctx)] == [s.id for task in ctx.stream.tasks[:2] for s in task.train]
    assert method.training_config(ctx).max_steps == 14
    assert method.training_config(dataclasses.replace(ctx, step=0)).max_steps == 7
    assert get("joint").training_config(ctx).max_steps is None, "epochs grow with the samples by themselves"


def test_frozen_is_theta_0(ctx):
    method = get("frozen")
    assert method.end_task(ctx, method.train_task(ctx)) == ctx.theta_0


@pytest.mark.parametrize("asked, repeat, mixed", [(2, 1, 2), (2, 3, 6), (100, 1, 6)])
def test_safety_replay_mixes_the_same_refusals_into_every_task(ctx, asked, repeat, mixed):
    method = get("safety_replay", refusals=asked, repeat=repeat)
    own = [s.id for s in ctx.stream.tasks[1].train]
    learned = [s.id for s in method.learned(ctx)]
    assert learned[: len(own)] == own and len(learned) == len(own) + mixed
    first = [s.id for s in method.learned(dataclasses.replace(ctx, step=0))]
    assert first[-mixed:] == learned[-mixed:] and all(i.startswith("no-") for i in learned[-mixed:])


@pytest.mark.parametrize("name", ["safety_replay", "one_shot", "safe_anchor"])
def test_what_learns_refusals_says_that_there_are_none(ctx, name):
    with pytest.raises(CalibrationError, match=rf"{name} needs safety calibration samples, and stream 'pico'"):
        get(name).check_stream(without_answers(ctx).stream)


@pytest.mark.parametrize(
    "count, shares, tuned",
    [
        (32, (6 / 32, 15 / 32), [*range(6), *range(15, 32)]),
        (2, (6 / 32, 15 / 32), [1]),
        (4, (0.5, 0.51), [0, 1, 3]),
        (3, (0.99, 1.0), [0, 1]),
    ],
)
def test_sppft_tunes_all_blocks_but_the_safety_layers(count, shares, tuned):
    assert get("sppft", safety_layers=list(shares)).tuned_blocks(count) == tuned


def test_sppft_puts_no_lora_on_a_safety_layer(ctx, pico_folder):
    loaded = load(pico_folder, device="cpu")
    blocks = [name for name, _ in decoder_blocks(loaded.model)]
    method = get("sppft", safety_layers=[0.0, 0.4])
    kept = method.tuned_blocks(len(blocks))
    adapter = method.training_options(ctx)["adapter"](loaded, TrainingConfig(rank=2, alpha=4))
    found = {name.rsplit(".", 2)[0].removesuffix(".self_attn").removesuffix(".mlp") for name in _names(adapter)}
    assert found == {blocks[i] for i in kept} and len(kept) < len(blocks)


def _names(adapter) -> list[str]:
    return [f.name for f in live_factors(adapter)]


def test_one_shot_puts_a_repair_on_top_of_the_tuned_adapter(ctx):
    trained = get("one_shot", epochs=2, training=TRAINING).train_task(ctx)
    plain = get("seqft", training=TRAINING).train_task(dataclasses.replace(ctx, work_dir=ctx.work_dir / "plain"))
    assert len(trained.adapters) == 2
    for ours, theirs in zip(read_adapter(trained.adapters[0]), read_adapter(plain.adapters[0]), strict=True):
        assert torch.equal(ours.b, theirs.b), "the task itself is learned as by SeqFT"
    assert any(float(f.b.abs().max()) > 0 for f in read_adapter(trained.adapters[1]))


@pytest.mark.parametrize("micro, largest", [(1, 1), (2, 2), (4, 3), (None, 3)])
def test_a_repair_has_no_larger_forward_passes_than_the_task(ctx, monkeypatch, micro, largest):
    sizes = []

    def seen(loaded, samples, config, **rest):
        sizes.append((len(samples), config.batch_size, config.forward_size))
        return repair_train(loaded, samples, config, **rest)

    repair_train = repair.train
    monkeypatch.setattr(repair, "train", seen)
    training = {**TRAINING, "micro_batch_size": micro}
    get("one_shot", epochs=1, refusals=6, training=training).train_task(ctx)
    ((samples, batch, passes),) = sizes
    assert samples == batch == 6 and batch % passes == 0 and passes <= (micro or TRAINING["batch_size"])
    assert passes == largest


@pytest.mark.parametrize("name", ["seqft", "moelora", "osf", "sppft", "guardspace"])
def test_a_step_called_again_learns_nothing_anew(ctx, monkeypatch, name):
    """Killed between its training and the runner's mark, whatever folder the method publishes in."""
    first = dataclasses.replace(ctx, step=0, previous_work_dir=None)
    method = get(name, training=TRAINING, **({"experts": 2} if name == "moelora" else {}))
    trained = method.train_task(first)
    monkeypatch.setattr(seqft, "train", lambda *args, **options: pytest.fail("the task is learned again"))
    assert method.train_task(first) == trained


def test_a_task_that_was_learned_whole_is_not_learned_again(ctx, monkeypatch):
    """Killed in the repair after it."""
    method = get("one_shot", epochs=1, training=TRAINING)
    whole = method.train_task(ctx)
    first = {path: path.stat().st_mtime_ns for path in (ctx.scratch_dir / "adapter").iterdir()}
    shutil.rmtree(whole.adapters[1])
    assert method.train_task(ctx) == whole
    assert first == {path: path.stat().st_mtime_ns for path in (ctx.scratch_dir / "adapter").iterdir()}


@pytest.mark.parametrize("name", ["resta", "safe_lora"])
def test_another_model_than_the_unaligned_one_is_refused_before_a_task_is_learned(ctx, tmp_path, name):
    with pytest.raises(CheckpointError, match="nowhere is neither a folder nor a hub id"):
        get(name, unaligned=str(tmp_path / "nowhere")).begin_task(ctx)
    for empty in ("", " "):
        with pytest.raises(CheckpointError, match="named by an empty text"):
            get(name, unaligned=empty).begin_task(ctx)
    source = Path(ctx.theta_0.base)
    narrow = tmp_path / "narrow"
    shutil.copytree(source, narrow)
    tensors = load_file(narrow / "model.safetensors")
    key = next(k for k in tensors if k.endswith("q_proj.weight") and "vision" not in k)
    save_file({**tensors, key: tensors[key][:4].clone()}, narrow / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=rf"{name}: unaligned is .*{key}.* has it with shape \(4, .*before its alig"):
        get(name, unaligned=str(narrow)).begin_task(ctx)
    save_file({k: v for k, v in tensors.items() if k != key}, narrow / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="has none"):
        get(name, unaligned=str(narrow)).begin_task(ctx)
    save_file(tensors, narrow / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="whose weights are those of the model that is tuned"):
        get(name, unaligned=str(narrow)).begin_task(ctx)


def test_safelora_leaves_a_layer_alone_that_alignment_left_alone(ctx, tmp_path):
    """An alignment by a LoRA on two projections says nothing of the others."""
    source = Path(ctx.theta_0.base)
    other = tmp_path / "unaligned"
    shutil.copytree(source, other)
    method = get("safe_lora", unaligned=str(other), training=TRAINING)
    trained = method.train_task(ctx)
    with pytest.raises(ConfigError, match=r"has the weights of the model that is tuned in every layer"):
        method.end_task(ctx, trained)
    tensors = load_file(other / "model.safetensors")
    moved = {k: v + 0.01 * torch.randn(v.shape) for k, v in tensors.items() if k.endswith("q_proj.weight")}
    save_file({**tensors, **moved}, other / "model.safetensors", metadata={"format": "pt"})
    final = method.end_task(ctx, trained)
    rows = EditReport.load(ctx.work_dir / "edit.json").layers
    projected = {row["layer"] for row in rows if row["projected"]}
    assert Path(final.base).is_dir() and projected
    assert all(name.endswith("q_proj") for name in projected)


@pytest.mark.parametrize("keep, changes", [(1.0, False), (0.0, True)])
def test_intruders_are_reduced_by_what_is_not_kept(ctx, keep, changes):
    """With all of them kept the update is what it was; PEFT's text says the opposite of its code."""
    method = get("intruders", keep=keep, threshold=1.0, training=TRAINING)
    trained = method.train_task(ctx)
    folder = ctx.scratch_dir / "reduced"
    method._reduce(ctx, ctx.scratch_dir / "adapter", folder)
    before = {f.name: f.update() for f in read_adapter(trained.adapters[-1])}
    moved = [float((f.update() - before[f.name]).norm() / before[f.name].norm()) for f in read_adapter(folder)]
    assert len(moved) == len(before) and (max(moved) > 0.1) is changes
    assert changes or max(moved) < 1e-3


def test_a_reduced_adapter_wider_than_a_layer_keeps_its_rank(ctx):
    """PEFT writes no more rows than the layer's smaller side has, and a configuration that says more."""
    method = get("intruders", keep=0.0, threshold=1.0, training={**TRAINING, "rank": 64})
    trained = method.train_task(ctx)
    folder = ctx.scratch_dir / "reduced"
    method._reduce(ctx, ctx.scratch_dir / "adapter", folder)
    assert min(min(f.update().shape) for f in read_adapter(folder)) < 64
    shapes = {tensor.shape for name, tensor in load_file(folder / "adapter_model.safetensors").items() if "_A." in name}
    assert {shape[0] for shape in shapes} == {64}
    assert Path(method.end_task(ctx, trained).base).is_dir()


def test_a_share_that_keeps_no_direction_of_a_layer_is_said_with_the_layer(ctx):
    with pytest.raises(ConfigError, match=r"kept is 0\.001, and model\..* has \d+ singular directions"):
        get("osf", kept=0.001, training=TRAINING).train_task(ctx)


@pytest.mark.parametrize("name", ["ewc", "cgm", "hpa", "anchor", "model_tailor"])
def test_what_was_cut_when_it_was_learned_is_cut_when_it_is_measured(ctx, name):
    """An answer longer than the model's context, which `training.max_length` cuts, ends no task after its tuning."""
    change = dataclasses.replace
    task, *others = ctx.stream.tasks
    long = [
        change(s, turns=(*s.turns[:-1], change(s.turns[-1], text=" ".join([s.turns[-1].text] * 3000))))
        for s in task.train
    ]
    stream = change(ctx.stream, tasks=[change(task, train=long), *others])
    ctx = change(ctx, stream=stream, step=0, task_names=ctx.task_names[:1], previous_work_dir=None)
    method = get(name, training={**TRAINING, "max_length": 96, "max_cut_share": 1.0})
    method.begin_task(ctx)
    assert Path(method.end_task(ctx, method.train_task(ctx)).base).is_dir()


@pytest.mark.parametrize("name", ["safe_delta", "hpa", "anchor"])
def test_a_safe_answer_was_not_learned_and_is_not_cut(ctx, name):
    long = Sample.single("no-long", " ".join(["how"] * 50), "No.")
    stream = dataclasses.replace(ctx.stream, safety_calibration=[*ctx.stream.safety_calibration, long])
    ctx = dataclasses.replace(ctx, stream=stream, step=0, task_names=ctx.task_names[:1], previous_work_dir=None)
    method = get(name, safety_samples=None, training={**TRAINING, "max_length": 96})
    method.begin_task(ctx)
    assert Path(method.end_task(ctx, method.train_task(ctx)).base).is_dir()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "option"), [("ewc", "weight"), ("lwf", "weight"), ("lwf", "temperature"), ("reg_lora", "weight")]
)
def test_a_number_that_is_not_finite_is_refused_in_python_too(name, option, wrong):
    kind = type(get(name).config)
    with pytest.raises(ConfigError, match=option):
        kind(**{option: wrong})
    with pytest.raises(ConfigError, match="learning_rate"):
        TrainingConfig(learning_rate=wrong)


def test_safe_anchor_finds_the_directions_of_most_strength():
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=g)).Q
    square = basis @ torch.diag(torch.tensor([9.0, 4.0, 1.0, 0, 0, 0, 0, 0])) @ basis.T
    two = top_directions(square, 2)
    torch.testing.assert_close((two.T @ basis[:, :2]).abs(), torch.eye(2), rtol=1e-3, atol=1e-3)
    assert top_directions(square, 99).shape == (8, 3), "no more than there are"
    assert top_directions(torch.eye(8), 99).shape == (8, 7), "one is left to learn with"
    assert top_directions(torch.zeros(8, 8), 3).shape == (8, 0)


def test_safe_anchor_keeps_gradients_off_what_safety_is_sensitive_to(ctx, pico_folder):
    loaded = load(pico_folder, device="cpu")
    g = torch.Generator().manual_seed(0)
    subspaces = {}
    for name, linear in editable_linears(loaded.model).items():
        for side, width in (("out", linear.out_features), ("in", linear.in_features)):
            subspaces[f"{name}/{side}"] = torch.linalg.qr(torch.randn(width, 3, generator=g)).Q
    adapter = anchored_adapter(loaded, TrainingConfig(rank=2, alpha=4), subspaces)
    layers = list(live_factors(adapter))
    for factors in layers:
        factors.b.data.normal_(std=0.1)
    inputs = encode_training(loaded, list(ctx.stream.tasks[0].train[:2]))
    adapter(**inputs).loss.backward()
    for factors in layers:
        assert float(factors.b.grad.norm()) > 0 and float(factors.a.grad.norm()) > 0
        written = subspaces[f"{factors.name}/out"].T @ factors.b.grad
        read = factors.a.grad @ subspaces[f"{factors.name}/in"]
        assert float(written.abs().max()) < 1e-4 * float(factors.b.grad.abs().max()) + 1e-8
        assert float(read.abs().max()) < 1e-4 * float(factors.a.grad.abs().max()) + 1e-8


@pytest.mark.parametrize(
    "risen, before, adapters", [(1.2, 1.0, 2), (1.05, 1.0, 1), (1.05, 0.9, 2), (1.2, 1.15, 1), (1.2, None, 1)]
)
def test_safe_anchor_repairs_what_drifted_from_theta_0_and_says_so(ctx, tmp_path, monkeypatch, risen, before, adapters):
    """Two steps of a microscopic model may move the loss either way: how far it rose is given here.

    before: theta_0's loss, by the step before, as a share of this step's first; None: of an earlier version, it is
    asked anew (and the same as `risen` here).
    """
    start = load(ctx.previous, dtype="float32", device="cpu")
    monkeypatch.setattr(safe_anchor, "mean_loss", lambda loaded, samples: risen * mean_loss(start, samples))
    safe = draw(refusals(ctx.stream, "safe_anchor"), 2, ctx.seed)
    ctx = dataclasses.replace(ctx, previous_work_dir=tmp_path / "step-before")
    ctx.previous_work_dir.mkdir()
    known = {} if before is None else {"baseline": before * mean_loss(start, safe)}
    (ctx.previous_work_dir / "safety.json").write_text(json.dumps({"after": 1.0, **known}))
    method = get("safe_anchor", tolerance=0.1, samples=2, repair_steps=1, directions=2, training=TRAINING)
    trained = method.train_task(ctx)
    record = json.loads((ctx.work_dir / "safety.json").read_text())
    assert record["after"] == pytest.approx(risen * record["before"], rel=1e-4) and record["before"] > 0
    assert record["repaired"] is (adapters == 2) and len(trained.adapters) == adapters
    assert record["baseline"] == pytest.approx((before or risen) * record["before"], rel=1e-4)


def test_drift_may_be_held_against_the_model_before_the_task(ctx, tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "safety.json").write_text(json.dumps({"baseline": 1e-6}))
    options = {"samples": 2, "repair_steps": 1, "directions": 2, "tolerance": 1e6, "training": TRAINING}
    get("safe_anchor", cumulative=False, **options).train_task(ctx)
    record = json.loads((ctx.work_dir / "safety.json").read_text())
    assert record["baseline"] == record["before"] and not record["repaired"]


def test_drift_is_held_against_the_first_step(ctx):
    """Its own record is where the next step reads theta_0's loss."""
    first = dataclasses.replace(ctx, step=0, previous_work_dir=None)
    get("safe_anchor", samples=2, repair_steps=1, directions=2, training=TRAINING).train_task(first)
    record = json.loads((ctx.work_dir / "safety.json").read_text())
    assert record["baseline"] == record["before"]


@pytest.mark.parametrize("name", ["one_shot", "safe_anchor"])
def test_a_repair_learns_whole_answers_where_the_task_is_cut(ctx, monkeypatch, name):
    configs = []

    def seen(loaded, samples, config, **rest):
        configs.append(config)
        return repair_train(loaded, samples, config, **rest)

    repair_train = repair.train
    monkeypatch.setattr(repair, "train", seen)
    options = {"one_shot": {"epochs": 1}, "safe_anchor": {"tolerance": 0.0, "samples": 2, "repair_steps": 1}}[name]
    monkeypatch.setattr(safe_anchor, "mean_loss", lambda loaded, samples: 1e9)
    first = dataclasses.replace(ctx, step=0, previous_work_dir=None)
    training = {**TRAINING, "max_length": 64}
    get(name, training=training, **options).train_task(first)
    assert [config.max_length for config in configs] == [None]


def test_a_guarded_lora_is_nothing_at_first_reads_nothing_of_what_was_seen_and_is_saved_as_it_acts(
    ctx, pico_folder, tmp_path
):
    loaded = load(pico_folder, device="cpu")
    g = torch.Generator().manual_seed(0)
    seen = {}
    for name, linear in editable_linears(loaded.model).items():
        start = guarded_start(linear.weight.float(), torch.eye(linear.in_features), rank=2, energy=0.3)
        seen[name] = start.seen
        save_file({"a": start.lora_a, "b": start.lora_b, "seen": start.seen}, tmp_path / f"{name}.safetensors")
    inputs = encode_training(loaded, list(ctx.stream.tasks[0].train[:2]))
    plain = loaded.model(**inputs).logits.detach()
    guarded = GuardedLora(loaded, tmp_path, TrainingConfig(rank=2, alpha=4, dropout=0.0))
    torch.testing.assert_close(guarded(**inputs).logits.detach(), plain, rtol=1e-4, atol=1e-5)
    state = {name: value + torch.randn(value.shape, generator=g) for name, value in guarded.state_dict().items()}
    guarded.load_state_dict(state)
    acts = guarded(**inputs).logits.detach()
    assert float((acts - plain).abs().max()) > 1e-2
    guarded.save_pretrained(str(tmp_path / "lora"))
    assert guarded.unload() is loaded.model
    updates = {f.name: f.update() for f in read_adapter(tmp_path / "lora")}
    assert set(updates) == set(seen)
    for name, linear in editable_linears(loaded.model).items():
        assert float((updates[name] @ seen[name]).abs().max()) < 1e-4 * float(updates[name].abs().max())
        linear.weight.data += updates[name]
    torch.testing.assert_close(loaded.model(**inputs).logits.detach(), acts, rtol=1e-3, atol=1e-3)


def test_osf_as_an_ordinary_lora_is_what_peft_changed(ctx, pico_folder):
    from peft import PeftModel

    trained = get("osf", training=TRAINING).train_task(ctx)
    lora = {f.name: f.update() for f in read_adapter(trained.adapters[-1])}
    loaded = load(pico_folder, device="cpu")
    before = {name: linear.weight.detach().clone() for name, linear in editable_linears(loaded.model).items()}
    tuned = PeftModel.from_pretrained(loaded.model, str(ctx.scratch_dir / "adapter"))
    after = {n: linear.weight for n, linear in editable_linears(tuned.merge_and_unload()).items()}
    assert set(lora) == set(before)
    for name, weight in before.items():
        change = after[name] - weight
        assert float(change.norm()) > 0
        torch.testing.assert_close(lora[name], change, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("osf", {"kept": 1.0}, "kept is 1.0"),
        ("safe_delta", {"protected_share": 15}, "protected_share is 15.0; expected a share"),
        ("safe_delta", {"strength": -1}, "strength is -1.0"),
        ("safe_delta", {"task_samples": 0}, "task_samples is 0"),
        ("ties", {"weight": -3}, "weight is -3.0"),
        ("safety_replay", {"refusals": 0}, "refusals is 0"),
        ("one_shot", {"epochs": 0}, "epochs is 0"),
        ("one_shot", {"learning_rate": 0.0}, "learning_rate is 0.0"),
        ("sppft", {"safety_layers": [0.5, 0.2]}, "safety_layers is"),
        ("resta", {"unaligned": "x", "alpha": -1.0}, "alpha is -1.0"),
        ("cgm", {"alpha": -1.0}, "alpha is -1.0"),
        ("cgm", {"kept": 1.5}, "kept is 1.5"),
        ("cgm", {"importance_samples": 0}, "importance_samples is 0"),
        ("intruders", {"keep": 2.0}, "keep is 2.0"),
        ("safe_anchor", {"directions": 0}, "directions is 0"),
        ("safe_anchor", {"tolerance": -0.1}, "tolerance is -0.1"),
        ("many", {"ridge": 0.0}, "ridge is 0.0"),
        ("guardspace", {"energy": 1.0}, "energy is 1.0"),
        ("guardspace", {"null_below": 0.0}, "null_below is 0.0"),
    ],
)
def test_a_wrong_option_is_named(name, options, message):
    with pytest.raises(ConfigError, match=message):
        get(name, **options)


def test_sppft_must_leave_something_to_tune():
    with pytest.raises(ConfigError, match="nothing is left to tune"):
        get("sppft", safety_layers=[0.0, 1.0]).tuned_blocks(4)
