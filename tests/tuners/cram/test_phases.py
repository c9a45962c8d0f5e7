"""A task from survey to expert, with the real training loop: killed and resumed anywhere, it gives the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import cram_kit
from holdfast.errors import AdapterError, ConfigError
from holdfast.functional.cram import RankRule
from holdfast.tuners.cram.folder import from_pretrained, load_expert
from holdfast.tuners.cram.objective import CENTROID, BatchFeatures, CramTraining
from holdfast.tuners.cram.phases import Phase, Steps, TaskLearning, consolidate, read_ranks
from holdfast.tuners.cram.router import Router
from holdfast.tuners.cram.stored_router import read_router

STEPS = Steps(total=5, warmup=2)


class KilledError(RuntimeError):
    """Stands for kill -9: nothing after it runs."""


def loop(
    phase: Phase, *, steps: Steps, adapter: Callable[[], CramTraining], extras: BatchFeatures, out: Path, samples
) -> None:
    """A few steps of SGD, deterministic; the real loop is asked by the method's tests."""
    from holdfast.models.encode import encode_training

    training = adapter()
    training.train()
    optimizer = torch.optim.SGD([p for p in training.parameters() if p.requires_grad], lr=0.3)
    for step in range(steps.warmup if phase is Phase.WARMUP else steps.stable):
        batch = [samples[(2 * step + i) % len(samples)] for i in range(3)]
        inputs = {**encode_training(training.cram.loaded, batch), **extras(batch)}
        outputs = training(**inputs)
        (outputs.loss + training.penalty(training, inputs, outputs)).backward()
        optimizer.step()
        optimizer.zero_grad()
    training.eval()
    training.save_pretrained(str(out))
    training.unload()


class Task:
    """One task to be learned in `folder`, and a count of what its loop trained."""

    def __init__(self, base, requests, folder: Path, *, name="cold", previous=None, **changes) -> None:
        self.samples, self.trained = requests[name], []
        self.config = cram_kit.config(**{"sigma_scale": 2.0, "held_out": 0.25, **changes})
        self.learning = TaskLearning(
            base, name, self.samples, self.config, steps=STEPS, previous=previous, work_dir=folder, seed=3
        )

    def loop(self, phase: Phase, **kwargs) -> None:
        self.trained.append(phase)
        loop(phase, samples=self.samples, **kwargs)


@pytest.fixture(scope="module")
def first(base, requests, tmp_path_factory) -> Path:
    """A CRAM folder with one learned task."""
    folder = tmp_path_factory.mktemp("first")
    task = Task(base, requests, folder / "work", name="warm")
    task.learning.learn(task.loop)
    task.learning.publish(folder / "cram")
    assert not hasattr(base.model, "holdfast_cram")
    return folder / "cram"


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(base, requests, first, tmp_path_factory) -> dict[str, bytes]:
    """The second task learned without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    task = Task(base, requests, folder / "work", previous=first)
    assert task.learning.phase is Phase.SURVEY
    task.learning.learn(task.loop)
    assert task.trained == [Phase.WARMUP, Phase.STABLE] and task.learning.phase is Phase.DONE
    task.learning.publish(folder / "cram")
    return bytes_of(folder / "cram")


@pytest.mark.parametrize("kill_in", ["survey", "warm-up", "consolidate", "stable", "publish"])
def test_a_killed_task_goes_on_to_the_same_bytes(base, requests, first, whole, tmp_path, monkeypatch, kill_in):
    task = Task(base, requests, tmp_path / "work", previous=first)

    def kill(*args, **kwargs):
        raise KilledError

    with monkeypatch.context() as patch:
        if kill_in in ("warm-up", "stable"):
            broken = lambda phase, **kw: kill() if phase.value == kill_in else task.loop(phase, **kw)  # noqa: E731
        else:
            broken = task.loop
            target = {"survey": "save_file", "consolidate": "save_expert", "publish": "save_cram"}[kill_in]
            patch.setattr(f"holdfast.tuners.cram.phases.{target}", kill)

        def whole_task() -> None:
            task.learning.learn(broken)
            task.learning.publish(tmp_path / "cram")

        with pytest.raises(KilledError):
            whole_task()
    again = Task(base, requests, tmp_path / "work", previous=first)
    reached = {
        "survey": Phase.SURVEY,
        "warm-up": Phase.WARMUP,
        "consolidate": Phase.CONSOLIDATE,
        "stable": Phase.STABLE,
    }
    assert again.learning.phase is reached.get(kill_in, Phase.DONE)
    again.learning.learn(again.loop)
    again.learning.publish(tmp_path / "cram")
    assert len(task.trained) + len(again.trained) == 2, "no finished phase is trained again"
    assert bytes_of(tmp_path / "cram") == whole


def test_older_experts_stay_bit_identical_and_answers_with_them(base, first, whole):  # (e)
    for name, content in bytes_of(first).items():
        if name.startswith("experts/"):
            assert whole[name] == content


def test_the_next_task_continues_from_the_folder(base, requests, first, whole, tmp_path):  # (h)
    task = Task(base, requests, tmp_path / "work", previous=first)
    task.learning.learn(task.loop)
    card = task.learning.publish(tmp_path / "cram")
    cram = from_pretrained(tmp_path / "cram", base)
    try:
        assert [e.name for e in cram.router.experts] == ["warm", "cold"] and card.group == 0
        assert all(2 <= r <= 4 for r in cram.router.experts[1].ranks.values())
        assert [max(r["weights"], key=r["weights"].get) for r in cram.explain(requests["cold"][:2])] == ["cold"] * 2
    finally:
        cram.detach()
    ranks = read_ranks(tmp_path / "work")
    assert {n: row["rank"] for n, row in ranks.items()} == dict(card.ranks)


def test_scatter_and_radius_are_distances_to_the_learned_centroid(base, requests, tmp_path):
    task = Task(base, requests, tmp_path / "work")
    task.learning.learn(task.loop)
    far = task.learning.features().image.mean(0, keepdim=True) + 10
    save_file({"image_centroid": far}, task.learning.expert / CENTROID)
    card = task.learning.publish(tmp_path / "cram")
    torch.testing.assert_close(card.image_centroid, far)
    plain = task.learning.card(Router(task.config))
    assert card.image_scatter > 10 > plain.image_scatter and card.image_radius > 10 > plain.image_radius
    cram = from_pretrained(tmp_path / "cram", base)
    cram.detach()
    assert cram.router.experts[0].image_scatter == pytest.approx(card.image_scatter)
    assert not cram.router.route(task.learning.features()).abstained.any()


def test_the_buffer_learns_and_consolidation_keeps_what_it_learnt(base, requests, tmp_path):
    task = Task(base, requests, tmp_path, rank=RankRule(r_min=1, r_max=12, tau_alloc=0.0, tau_novel=0.0))
    task.learning.survey()
    task.learning._train(task.loop, Phase.WARMUP, tmp_path / "buffer")
    task.learning.consolidate()
    buffer, initial = load_expert(tmp_path / "buffer"), load_expert(tmp_path / "initial")
    assert task.learning.phase is Phase.STABLE
    for name, (a, b) in buffer.items():
        product, kept = b @ a, initial[name][1] @ initial[name][0]
        assert float(product.norm()) > 0
        torch.testing.assert_close(kept, product, rtol=1e-4, atol=1e-5 * float(product.norm()))


def test_an_expert_starts_off_the_history_of_its_group_and_of_no_other(base, requests, first, tmp_path):  # (c)
    """What `initial/` holds after the real survey and warm-up of a second task."""
    old = load_expert(read_router(first).folders[0])
    for name, joins in (("cold", True), ("maths", False)):
        task = Task(base, requests, tmp_path / name, name=name, previous=first)
        task.learning.survey()
        task.learning._train(task.loop, Phase.WARMUP, tmp_path / name / "buffer")
        task.learning.consolidate()
        overlaps = [
            float((torch.nn.functional.normalize(a) @ torch.nn.functional.normalize(old[linear][0]).T).abs().max())
            for linear, (a, _) in load_expert(tmp_path / name / "initial").items()
        ]
        assert max(overlaps) < 1e-4 if joins else min(overlaps) > 1e-2


def test_double_scale_doubles_b_of_what_an_expert_starts_from(base, requests, tmp_path):
    task = Task(base, requests, tmp_path / "once")
    task.learning.survey()
    task.learning._train(task.loop, Phase.WARMUP, tmp_path / "once" / "buffer")
    shutil.copytree(tmp_path / "once", tmp_path / "twice")
    task.learning.consolidate()
    Task(base, requests, tmp_path / "twice", compat_double_scale=True).learning.consolidate()
    once, twice = load_expert(tmp_path / "once" / "initial"), load_expert(tmp_path / "twice" / "initial")
    for name, (a, b) in once.items():
        assert b.any() and torch.equal(twice[name][0], a) and torch.equal(twice[name][1], 2 * b)


def test_consolidation_keeps_rows_off_the_groups_history():  # (c)
    g = torch.Generator().manual_seed(0)
    config = cram_kit.config()
    buffer = {"q": (torch.randn(12, 32, generator=g), torch.randn(32, 12, generator=g))}
    history = {"q": [torch.randn(5, 32, generator=g), torch.randn(4, 32, generator=g)]}
    made = consolidate(buffer, history, config, seed=0)["q"]
    assert float((made.lora_a @ torch.cat(history["q"]).T).abs().max()) < 1e-4
    again = consolidate({"other": buffer["q"], **buffer}, history, config, seed=0)
    assert torch.equal(again["q"].lora_b, made.lora_b)


def test_fresh_rows_of_a_linear_do_not_depend_on_the_others():
    g = torch.Generator().manual_seed(0)
    empty = {name: (torch.randn(12, 32, generator=g), torch.zeros(32, 12)) for name in ("k", "q")}
    made = consolidate(empty, {}, cram_kit.config(), seed=3)
    assert made["q"].fresh == 2 and not torch.equal(made["q"].lora_a, made["k"].lora_a)
    alone = consolidate({"q": empty["q"]}, {}, cram_kit.config(), seed=3)
    assert torch.equal(alone["q"].lora_a, made["q"].lora_a)
    other = consolidate({"q": empty["q"]}, {}, cram_kit.config(), seed=4)
    assert not torch.equal(other["q"].lora_a, made["q"].lora_a)


def test_a_narrow_linear_bounds_its_rank():
    g = torch.Generator().manual_seed(0)
    buffer = {"v": (torch.randn(12, 32, generator=g), torch.randn(3, 12, generator=g))}
    assert consolidate(buffer, {}, cram_kit.config(), seed=0)["v"].rank <= 3


@pytest.mark.parametrize("total,fraction,warmup", [(100, 0.05, 5), (10, 0.05, 1), (3, 0.9, 2), (2, 0.5, 1)])
def test_steps_give_each_phase_at_least_one(total, fraction, warmup):
    steps = Steps.of(total, fraction)
    assert (steps.warmup, steps.stable) == (warmup, total - warmup)


def test_bad_tasks_say_what_was_wrong(base, requests, first, tmp_path):
    with pytest.raises(ConfigError, match=r"A task of 1 optimizer step\(s\) cannot have"):
        Steps.of(1, 0.5)
    with pytest.raises(AdapterError, match=r"already has an expert for task 'warm'"):
        Task(base, requests, tmp_path, name="warm", previous=first)
    task = Task(base, requests, tmp_path)
    task.learning.survey()
    fewer = TaskLearning(
        base, "cold", task.samples[:3], task.config, steps=STEPS, previous=None, work_dir=tmp_path, seed=3
    )
    with pytest.raises(AdapterError, match=r"holds 12 samples, the task has 3"):
        fewer.features()


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"targets": ("q_proj",)}, r"adapts k_proj, o_proj, q_proj, v_proj, but targets is q_proj; all experts"),
        ({"targets": ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj")}, r"targets is .*, up_proj, v_proj; all"),
        ({"encoder": "some/clip"}, r"made with encoder 'backbone', but encoder is 'some/clip'; the centroids"),
    ],
)
def test_a_folder_goes_on_with_its_own_targets_and_encoder(base, requests, first, tmp_path, changes, message):
    """Refused before anything is trained."""
    with pytest.raises(ConfigError, match=message):
        Task(base, requests, tmp_path, previous=first, **changes)
    Task(base, requests, tmp_path, previous=first, targets=("v_proj", "o_proj", "k_proj", "q_proj"), penalty=0.0)
    assert not list(tmp_path.iterdir())


def test_ranks_say_how_they_came_about(base, requests, tmp_path):
    task = Task(base, requests, tmp_path)
    task.learning.learn(task.loop)
    rows = json.loads((tmp_path / "ranks.json").read_text())
    assert len(rows) == 8 and all(0 <= row["energy"] <= 1 and row["strong"] >= 1 for row in rows.values())
