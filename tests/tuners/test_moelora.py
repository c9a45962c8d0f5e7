"""MoELoRA: the released arithmetic, one expert after another, and a folder that says what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast.checkpoints.value import Checkpoint
from holdfast.data.types import Sample
from holdfast.errors import AdapterError, CheckpointError, ConfigError
from holdfast.functional.mixture import mixture_update, start_of_mixture, token_gates
from holdfast.methods import get
from holdfast.models.encode import encode_request
from holdfast.models.load import load
from holdfast.tuners.cram.stored_router import read_router
from holdfast.tuners.moelora import MixtureTraining, fresh, save_mixtures

EXPERTS, RANK, WIDTH, OUT, SCALING = 3, 2, 10, 7, 2.0


def parts(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    router, a, b = start_of_mixture(WIDTH, OUT, experts=EXPERTS, rank=RANK, generator=generator)
    return 4 * router, 50 * a, torch.randn(b.shape, generator=generator)


def one_by_one(x: torch.Tensor, router: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The released code's loop over experts and tokens, in float64."""
    x, router, a, b = (t.double() for t in (x, router, a, b))
    out = torch.zeros(*x.shape[:2], OUT, dtype=torch.float64)
    for row in range(x.shape[0]):
        for token in range(x.shape[1]):
            state = x[row, token]
            scores = torch.exp(router @ state)
            for expert in range(EXPERTS):
                rows = slice(expert * RANK, (expert + 1) * RANK)
                out[row, token] += b[:, rows] @ (a[rows] @ state) * SCALING * scores[expert] / scores.sum()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moelora_is_its_experts_one_by_one(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(3)).to(dtype)
    router, a, b = parts()
    found = mixture_update(x, token_gates(x, router), a, b, SCALING)
    assert found.dtype is dtype
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(found.double(), one_by_one(x, router, a, b), **near)


def test_experts_with_one_router_row_each_share_a_token() -> None:
    x = torch.randn(4, WIDTH)
    gates = token_gates(x, parts()[0])
    torch.testing.assert_close(gates.sum(-1), torch.ones(4))
    router, a, b = parts()
    order = [2, 0, 1]
    rows = [r for e in order for r in range(e * RANK, (e + 1) * RANK)]
    same = mixture_update(x, token_gates(x, router[order]), a[rows], b[:, rows], SCALING)
    torch.testing.assert_close(same, mixture_update(x, gates, a, b, SCALING), msg="experts have no order")
    assert not mixture_update(x, gates, a, torch.zeros_like(b), SCALING).any()


@pytest.fixture(scope="module")
def folder(pico_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of experts that say something."""
    loaded = load(pico_folder, device="cpu")
    made = fresh(loaded, experts=2, rank=2, scaling=SCALING, seed=0)
    generator = torch.Generator().manual_seed(1)
    for _, _, b in made.layers.values():
        b.normal_(0.0, 3.0, generator=generator)
    path = tmp_path_factory.mktemp("moelora") / "mixture"
    save_mixtures(path, made, loaded)
    return path


def asked(loaded, sample: Sample) -> torch.Tensor:
    with torch.no_grad():
        return loaded.model(**encode_request(loaded, [sample])).logits


REQUEST = Sample.single("s", "Which colour is it?")


def test_a_folder_answers_as_what_was_trained_and_comes_off_again(pico_folder: Path, folder: Path) -> None:
    from holdfast.models import held
    from holdfast.tuners.moelora import load_mixtures

    loaded = load(pico_folder, device="cpu")
    plain = asked(loaded, REQUEST)
    training = MixtureTraining(loaded, load_mixtures(folder, loaded), 0.0)
    trained = asked(loaded, REQUEST)
    training.unload()
    assert torch.equal(asked(loaded, REQUEST), plain) and not torch.allclose(trained, plain, atol=1e-2)
    with held.holding():
        found = held.load(Checkpoint(base=str(pico_folder), adapters=(str(folder),)))
        assert torch.equal(asked(found, REQUEST), trained)
        rows = found.tuner.explain([REQUEST, REQUEST])
        assert torch.equal(asked(held.load(str(pico_folder)), REQUEST), plain)
    assert [row["id"] for row in rows] == ["s", "s"] and rows[0] == rows[1]
    assert set(rows[0]["weights"]) == {"expert 1", "expert 2"} and sum(rows[0]["weights"].values()) == pytest.approx(1)


def test_training_reaches_experts_and_routers_and_nothing_else(pico_folder: Path, folder: Path) -> None:
    from holdfast.tuners.moelora import load_mixtures

    loaded = load(pico_folder, device="cpu")
    training = MixtureTraining(loaded, load_mixtures(folder, loaded), 0.0)
    training(**encode_request(loaded, [REQUEST])).logits.square().mean().backward()
    trained = training.trained()
    assert set(training.state_dict()) == set(trained)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())
    assert not any(p.requires_grad for p in loaded.model.parameters())
    training.unload()


def test_what_is_not_its_folder_or_its_base_is_refused(pico_folder: Path, folder: Path, tmp_path: Path) -> None:
    from holdfast.tuners.moelora import load_mixtures

    loaded = load(pico_folder, device="cpu")
    tensors, record = load_file(folder / "moelora.safetensors"), json.loads((folder / "moelora.json").read_text())
    key = next(k for k in tensors if k.endswith(".lora_A") and not k.startswith("base."))
    broken = {
        "is incomplete": ({k: v for k, v in tensors.items() if k != key}, record),
        "of other shapes": ({**tensors, key: tensors[key][:, :-1].contiguous()}, record),
        "has format 9": (tensors, {**record, "format": 9}),
        "no whole folder": (tensors, {"format": 1}),
        "trained on another base": (
            {k: v + 1 if k.startswith("base.probe.") else v for k, v in tensors.items()},
            record,
        ),
    }
    for number, (sentence, (held, said)) in enumerate(broken.items()):
        place = tmp_path / str(number)
        place.mkdir()
        save_file(held, place / "moelora.safetensors")
        (place / "moelora.json").write_text(json.dumps(said))
        with pytest.raises(AdapterError, match=sentence):
            load_mixtures(place, loaded)
    with pytest.raises(AdapterError, match="no whole folder"):
        load_mixtures(tmp_path, loaded)


def test_what_wants_cram_or_a_lora_says_what_the_folder_is(folder: Path) -> None:
    from holdfast.checkpoints.adapter import LoraAdapter
    from holdfast.checkpoints.reader import CheckpointReader

    with pytest.raises(CheckpointError, match="holds experts that a tuner puts on a base, and no weights"):
        CheckpointReader(folder)
    with pytest.raises(AdapterError, match="is a folder of moelora, which has no router that decides per request"):
        read_router(folder)
    with pytest.raises(AdapterError):
        LoraAdapter(folder)


def test_the_rank_is_shared_out_over_the_experts() -> None:
    assert get("moelora").config.experts == 8
    with pytest.raises(ConfigError, match="rank 12 cannot be shared out evenly over 8 experts"):
        get("moelora", training={"rank": 12})
    with pytest.raises(ConfigError, match="experts is 1"):
        get("moelora", experts=1)
