"""Training one expert: what gets gradient, what the penalty measures, and two processes that agree."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cram_kit
from holdfast.errors import AdapterError, DataError
from holdfast.functional.cram import column_basis, residual
from holdfast.models.encode import encode_training
from holdfast.training.supervised import _checkpointing
from holdfast.tuners.cram.cram_config import ReleasedCode
from holdfast.tuners.cram.objective import BatchFeatures, CramTraining, buffer_factors
from holdfast.tuners.cram.router import card_from_features


def begin(make, requests, *, stable=True, name="cold", old=("warm",), groups=None, factors=None, **changes):
    """A CRAM with experts for `old` (all in group 0, or in `groups`), about to learn task `name` in group 0."""
    cram = make(samples={k: requests[k] for k in old}, groups=groups or (0,) * len(old), **changes)
    features = cram.features(requests[name])
    card, _ = card_from_features(name, 0, features, cram.config, seed=0)
    made = factors or cram_kit.factors(cram.loaded, cram.config, seed=9)
    return CramTraining(cram, made, card, stable=stable), BatchFeatures(requests[name], features)


def step(training, extras, samples):
    inputs = {**encode_training(training.cram.loaded, samples), **extras(samples)}
    loss = training(**inputs).loss
    return loss, training.penalty(training, inputs, None)


def gradients(training):
    return {n: p.grad.clone() for n, p in training.trained().items() if p.grad is not None}


def test_gradient_reaches_every_trained_factor_and_nothing_else(make, requests):  # (e), (f)
    training, extras = begin(make, requests)
    frozen = {n: t.clone() for n, t in training.model.state_dict().items()}
    loss, penalty = step(training, extras, requests["cold"][:3])
    (loss + penalty).backward()
    grads = gradients(training)
    assert len(grads) == 2 * len(training.cram.layers) and all(g.any() for g in grads.values())
    trained = {id(p) for p in training.trained().values()}
    assert all(p.grad is None for p in training.model.parameters() if id(p) not in trained)
    assert {id(p) for p in training.parameters() if p.requires_grad} == trained
    for name, tensor in training.model.state_dict().items():
        assert torch.equal(tensor, frozen[name])
    training.unload()


def test_the_factor_of_every_forward_pass_scales_what_a_step_learns_and_not_what_is_there(make, requests, tmp_path):
    """alpha / r of the released adapter: the same expert answers the same, and learns twice as much from one step."""
    from holdfast.tuners.cram.folder import load_expert

    learned, losses = {}, {}
    for factor in (1.0, 2.0):
        released = {"forward_factor": factor}
        training, extras = begin(make, requests, sigma_scale=50.0, released=ReleasedCode(**released))
        start = training.factors()
        loss, penalty = step(training, extras, requests["cold"][:3])
        losses[factor] = (float(loss.detach()), float(penalty.detach()))
        optimizer = torch.optim.Adam([p.trained_b for p in training.cram.layers], lr=1e-3)
        loss.backward()
        optimizer.step()
        training.save_pretrained(str(tmp_path / str(factor)))
        found = load_expert(tmp_path / str(factor))
        learned[factor] = {n: found[n][1] - b for n, (_, b) in start.items()}
        training.unload()
    assert losses[1.0] == pytest.approx(losses[2.0], rel=1e-5)
    for name, change in learned[1.0].items():
        assert change.any()
        torch.testing.assert_close(learned[2.0][name], 2 * change, rtol=1e-3, atol=1e-6)


def test_penalty_is_zero_only_off_what_older_experts_write(make, requests):  # (f)
    training, extras = begin(make, requests, sigma_scale=50.0)
    penalty = step(training, extras, requests["cold"][:3])[1]
    assert float(penalty.detach()) > 1e-3
    training.zero_grad()
    penalty.backward()
    assert len(gradients(training)) == 2 * len(training.cram.layers), "every adapted linear is penalised"
    for p in training.cram.layers:
        old = training.cram.experts[0][p.name][1]
        with torch.no_grad():
            p.trained_b.copy_(residual(p.trained_b.T, column_basis([old])).T)
    assert float(step(training, extras, requests["cold"][:3])[1].detach()) < 1e-8
    training.unload()


def test_penalty_knows_the_experts_of_the_tasks_own_group_alone(make, requests):
    """Three older experts in two groups."""
    rows = {**requests, "more": [replace(s, id=f"more-{i}") for i, s in enumerate(requests["warm"])]}
    training, extras = begin(make, rows, old=("warm", "maths", "more"), groups=(0, 1, 0), sigma_scale=50.0)
    assert float(step(training, extras, requests["cold"][:3])[1].detach()) > 1e-3
    experts, foreign = training.cram.experts, 0.0
    for p in training.cram.layers:
        own = column_basis([experts[0][p.name][1], experts[2][p.name][1]])
        assert training.bases[p.name].shape == own.shape
        with torch.no_grad():
            p.trained_b.copy_(residual(p.trained_b.T, own).T)
        foreign += float((p.trained_b.detach().T @ column_basis([experts[1][p.name][1]])).norm())
    assert foreign > 1
    assert float(step(training, extras, requests["cold"][:3])[1].detach()) < 1e-8
    routed = training.router.route(training_features(extras(requests["cold"][:3]))).weights[:, 0]
    torch.testing.assert_close(training._old_mass, routed[:, [0, 2]].sum(-1))
    training.unload()


def test_penalty_of_a_linear_moves_that_linear_alone(make, requests):
    """Its pooled input is a given: earlier linears and the routing are not asked to change what reaches it."""
    training, extras = begin(make, requests, sigma_scale=50.0, learn_centroid=True)
    last = training.cram.layers[-1]
    training.bases = {last.name: training.bases[last.name]}
    loss, penalty = step(training, extras, requests["cold"][:3])
    penalty.backward(retain_graph=True)
    assert {n for n, grad in gradients(training).items() if grad.any()} == {
        f"{last.name}.lora_A",
        f"{last.name}.lora_B",
    }
    assert training.centroid.grad is None or not training.centroid.grad.any()
    loss.backward()
    assert training.centroid.grad.any(), "the loss does reach it"
    training.unload()


def test_dropout_acts_while_training_and_only_then(make, requests):
    training, extras = begin(make, requests, dropout=0.5)
    samples = requests["cold"][:2]

    def losses(model):
        with torch.no_grad():
            return [float(step(model, extras, samples)[0]) for _ in range(2)]

    training.train()
    one, two = losses(training)
    assert one != two
    training.eval()
    one, two = losses(training)
    assert one == two
    training.unload()


def test_penalty_equals_its_definition(make, requests):
    """Against z_b = B A mean(x), with each linear's own input and the mean taken over image tokens."""
    training, extras = begin(make, requests, sigma_scale=50.0, penalty=3.0)
    samples = requests["cold"][:3]
    inputs = {**encode_training(training.cram.loaded, samples), **extras(samples)}
    seen = {}
    modules = dict(training.model.named_modules())
    handles = [
        modules[p.name].register_forward_hook(lambda _, a, __, n=p.name: seen.update({n: a[0].detach()}))
        for p in training.cram.layers
    ]
    with torch.no_grad():
        penalty = training.penalty(training, inputs, training(**inputs))
    for handle in handles:
        handle.remove()
    ids = sorted(training.cram.loaded.image_token_ids)
    mask = torch.isin(inputs["input_ids"], torch.tensor(ids)).float()
    gamma = training.router.route(training_features(inputs)).weights[:, 0, :-1].sum(-1)
    assert 0.1 < float(gamma.mean()) < 0.9
    terms = []
    for p in training.cram.layers:
        mean = (seen[p.name] * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        z = mean @ p.trained_a.T @ p.trained_b.T
        basis = torch.linalg.qr(training.cram.experts[0][p.name][1])[0]
        terms.append((gamma * (z @ basis).square().sum(-1)).mean())
    torch.testing.assert_close(penalty, 3.0 * torch.stack(terms).mean(), rtol=1e-3, atol=1e-5)
    training.unload()


def training_features(inputs):
    from holdfast.tuners.cram.router import Features

    return Features(text=inputs["cram_text"], image=inputs["cram_image"], has_image=inputs["cram_has_image"])


def test_no_penalty_without_older_experts_or_in_the_warm_up(make, requests):
    alone, extras = begin(make, requests, old=())
    assert float(step(alone, extras, requests["cold"][:2])[1]) == 0
    alone.unload()
    warm_up, extras = begin(make, requests, stable=False)
    assert float(step(warm_up, extras, requests["cold"][:2])[1]) == 0
    warm_up.unload()


def test_input_space_penalises_square_linears_only(make, requests):
    training, extras = begin(make, requests, penalty_space="input")
    square = {p.name for p in training.cram.layers if p.in_features == p.out_features}
    assert set(training.bases) == square and 0 < len(square) < len(training.cram.layers)
    assert float(step(training, extras, requests["cold"][:2])[1].detach()) > 0
    training.unload()
    with pytest.raises(AdapterError, match=r"no adapted linear is square"):
        begin(make, requests, penalty_space="input", targets=("k_proj",))


def test_the_buffer_trains_alone_or_on_top_of_older_experts(make, requests):
    def first_loss(history):
        training, extras = begin(make, requests, stable=False, warmup_history=history, factors=None)
        cram, card = training.cram, training.card
        training.unload()
        cram = make(samples={"warm": requests["warm"]}, groups=(0,), warmup_history=history)
        training = CramTraining(cram, buffer_factors(cram, seed=0), card, stable=False)
        loss, _ = step(training, extras, requests["cold"][:2])
        loss.backward()
        grads = gradients(training)
        assert any(g.any() for n, g in grads.items() if n.endswith("lora_B"))
        training.unload()
        return float(loss.detach())

    off, routed = first_loss("off"), first_loss("routed")
    assert off != routed


def test_gradient_checkpointing_gives_the_same_gradients(make, requests):
    training, extras = begin(make, requests, sigma_scale=50.0)
    samples = requests["cold"][:3]
    grads = []
    for checkpointing in (False, True):
        training.train()
        training.zero_grad()
        with _checkpointing(training.model, checkpointing):
            loss, penalty = step(training, extras, samples)
            (loss + penalty).backward()
        grads.append(gradients(training))
    training.model.eval()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)
    training.unload()


def test_accumulated_micro_batches_keep_their_own_routing(make, requests):
    training, extras = begin(make, requests, sigma_scale=1.0)
    one, two = requests["cold"][:2], requests["cold"][2:4]
    for part in (one, two):
        step(training, extras, part)[0].backward()
    both = gradients(training)
    training.zero_grad()
    single = []
    for part in (one, two):
        step(training, extras, part)[0].backward()
        single.append(gradients(training))
        training.zero_grad()
    for name in both:
        torch.testing.assert_close(both[name], single[0][name] + single[1][name], rtol=1e-4, atol=1e-6)
    training.unload()


@pytest.mark.parametrize("per_block", [False, True])
def test_a_learned_centroid_gets_gradient_and_is_saved(make, requests, tmp_path: Path, per_block):
    training, extras = begin(make, requests, learn_centroid=True, centroid_per_block=per_block, sigma_scale=3.0)
    step(training, extras, requests["cold"][:3])[0].backward()
    blocks = 2 if per_block else 1
    assert training.centroid.shape[0] == blocks and bool(training.centroid.grad.any(-1).all())
    training.save_pretrained(str(tmp_path / "expert"))
    assert (tmp_path / "expert" / "centroid.safetensors").is_file()
    training.unload()


def test_state_holds_the_trained_factors_alone_and_loads_back(make, requests):
    training, _ = begin(make, requests)
    state = {k: v.clone() for k, v in training.state_dict().items()}
    assert len(state) == 2 * len(training.cram.layers)
    with torch.no_grad():
        for p in training.trained().values():
            p.zero_()
    training.load_state_dict(state)
    assert all(torch.equal(v, state[k]) for k, v in training.state_dict().items())
    with pytest.raises(AdapterError, match=r"holds 1 tensors, expected"):
        training.load_state_dict(dict([next(iter(state.items()))]))
    training.unload()


def test_a_batch_without_features_is_refused(make, requests):
    training, _ = begin(make, requests)
    with pytest.raises(DataError, match=r"carries no CRAM features"):
        training(**encode_training(training.cram.loaded, requests["cold"][:1]))
    training.unload()


def test_a_task_with_and_without_images_trains_in_one_batch(make, requests):
    rows = [*requests["cold"][:2], *[replace(s, id=f"m{i}") for i, s in enumerate(requests["maths"][:2])]]
    training, extras = begin(make, {**requests, "both": rows}, name="both", sigma_scale=50.0)
    loss, penalty = step(training, extras, rows)
    (loss + penalty).backward()
    assert torch.isfinite(loss) and torch.isfinite(penalty)
    training.unload()


def test_two_processes_learn_the_same_expert_as_one(pico_folder: Path, tmp_path: Path):
    """Over gloo, with FSDP2: gradients averaged over two halves of a batch, in both phases, all weights in shards.

    Whole copies (DDP) are asked of the method itself, in tests/experiment/test_together.py.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    worker = Path(cram_kit.__file__).with_name("cram_worker.py")
    environment = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(pico_folder), str(tmp_path)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [p.communicate(timeout=240)[1] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], errors
    from safetensors.torch import load_file

    first, second, single = (load_file(tmp_path / f"{name}.safetensors") for name in ("rank0", "rank1", "single"))
    assert set(first) == set(single)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        torch.testing.assert_close(tensor, single[name], rtol=1e-3, atol=1e-5)
