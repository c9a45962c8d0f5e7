"""The anchored rule over Gram matrices on disk: the mathematics it hands on, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from holdfast.calibration.gram_sets import GramSets
from holdfast.checkpoints.gram_store import GramStore, GramWriter, pack
from holdfast.config import decode
from holdfast.errors import CalibrationError, ConfigError
from holdfast.functional.anchor import anchor_weight
from holdfast.functional.hessian import InputGram
from holdfast.rules.anchor import AnchorConfig, AnchorRule
from holdfast.rules.base import Layer, LoraEditRule

WIDTH, ROWS, RANK = 12, 7, 3
NAMES = ("layers.0.q_proj", "layers.0.k_proj")


def store(folder: Path, seed: int, *, width: int = WIDTH, tokens: int = 50) -> GramStore:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    x = x @ torch.randn(width, width, generator=torch.Generator().manual_seed(seed + 1))
    writer = GramWriter(folder, {"seed": seed})
    gram = InputGram(width, "token", dual=False).update(x)
    writer.write(NAMES, pack(gram), block=0, block_count=3, width=width, sequences=1, tokens=tokens)
    return writer.finish()


@pytest.fixture
def sets(tmp_path: Path) -> GramSets:
    made = {name: store(tmp_path / name, i) for i, name in enumerate(("task", "safety", "past"))}
    return GramSets(**made, benign=store(tmp_path / "benign", 9, tokens=150))


def layer(block: int = 0, count: int = 3) -> Layer:
    return Layer(name=NAMES[0], block=block, block_count=count)


def weights(seed: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(RANK, WIDTH, generator=g), torch.randn(ROWS, RANK, generator=g)
    w = torch.randn(ROWS, WIDTH, generator=g)
    return w, w + 0.5 * b @ a, a, b


@pytest.mark.parametrize("share", [None, 0.0, 0.4, 1.0])
@pytest.mark.parametrize("past_weight", [0.0, 0.3])
@pytest.mark.parametrize("slope", [-1.0, 0.0, 0.5])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_it_is_the_function_of_its_grams(sets, share, past_weight, slope, block) -> None:
    config = AnchorConfig(safety_weight=0.7, past_weight=past_weight, benign_share=share, depth_slope=slope)
    part = 0.75 if share is None else share  # 150 of 200 tokens
    safety = (1 - part) * sets.safety.gram(NAMES[0]) + part * sets.benign.gram(NAMES[0])
    w_prev, w_new, a, b = weights()
    expected = anchor_weight(
        w_prev,
        w_new,
        sets.task.gram(NAMES[0]),
        safety,
        sets.past.gram(NAMES[0]),
        safety_weight=0.7 * (1 + slope * (1 - block)),
        past_weight=past_weight,
        damping=config.damping,
    )
    rule = AnchorRule(config, sets)
    dense = rule.edit(layer(block), w_prev.clone(), w_new.clone())
    torch.testing.assert_close(dense.weight, expected, rtol=1e-4, atol=1e-5)
    lora = rule.edit_lora(layer(block), None, a, b, 0.5)
    assert lora.lora_a.shape == a.shape and lora.input_scale is None
    torch.testing.assert_close(w_prev + 0.5 * b @ lora.lora_a, expected, rtol=1e-4, atol=1e-5)
    for row in (dense.row, lora.row):
        assert row["change"] == pytest.approx(float((w_new - w_prev).norm()), rel=1e-5)
        assert row["distance"] == pytest.approx(float((expected - w_prev).norm()), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_it_keeps_the_dtype_of_the_weights(sets, dtype) -> None:
    w_prev, w_new, a, b = (t.to(dtype) for t in weights())
    rule = AnchorRule(AnchorConfig(), sets)
    assert rule.edit(layer(), w_prev, w_new).weight.dtype == dtype
    assert rule.edit_lora(layer(), None, a, b, 1.0).lora_a.dtype == dtype


def test_settings_follow_options_and_grams(sets, tmp_path) -> None:
    one = AnchorRule(AnchorConfig(), sets)
    assert isinstance(one, LoraEditRule) and one.settings()["safety_weight"] == 1.0
    other = GramSets(task=sets.task, safety=sets.safety)
    settings = [
        r.settings() for r in (one, AnchorRule(AnchorConfig(damping=0.1), sets), AnchorRule(AnchorConfig(), other))
    ]
    assert all(a != b for i, a in enumerate(settings) for b in settings[:i])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"safety_weight": -1.0}, "safety_weight"),
        ({"past_weight": float("nan")}, "past_weight"),
        ({"damping": float("inf")}, "damping"),
        ({"benign_share": 1.5}, "benign_share"),
        ({"depth_slope": 2.0}, "depth_slope"),
    ],
)
def test_options_outside_their_range_are_named(options, sentence) -> None:
    with pytest.raises(ConfigError, match=sentence):
        AnchorConfig(**options)


def test_unknown_options_are_named() -> None:
    with pytest.raises(ConfigError, match="safety_weight"):
        decode(AnchorConfig, {"safety_weigth": 1})


def test_grams_of_another_model_are_refused(sets, tmp_path) -> None:
    wide = GramSets(task=store(tmp_path / "w1", 1, width=20), safety=store(tmp_path / "w2", 2, width=20))
    w_prev, w_new, a, b = weights()
    with pytest.raises(CalibrationError, match="another model"):
        AnchorRule(AnchorConfig(), wide).edit(layer(), w_prev, w_new)
    with pytest.raises(CalibrationError, match="another model"):
        AnchorRule(AnchorConfig(), wide).edit_lora(layer(), None, a, b, 1.0)
    with pytest.raises(CalibrationError, match="no layer"):
        AnchorRule(AnchorConfig(), sets).edit(Layer(name="layers.9.x", block=0, block_count=3), w_prev, w_new)


@pytest.mark.parametrize("share", [None, 0.0, 0.5, 1.0])
def test_without_benign_answers_the_safety_gram_is_the_refusals(sets, share) -> None:
    bare = GramSets(task=sets.task, safety=sets.safety)
    w_prev, w_new, _, _ = weights()
    found = AnchorRule(AnchorConfig(benign_share=share), bare).edit(layer(), w_prev, w_new).weight
    expected = anchor_weight(w_prev, w_new, sets.task.gram(NAMES[0]), sets.safety.gram(NAMES[0]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
