"""An adapter read from disk means what PEFT means by it; what is not plain LoRA is refused by name."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from holdfast.checkpoints.adapter import LoraAdapter, is_adapter
from holdfast.checkpoints.fingerprint import fingerprint
from holdfast.checkpoints.merged import MergedCheckpoint, open_checkpoint
from holdfast.checkpoints.reader import CheckpointReader
from holdfast.errors import AdapterError, CheckpointError

WIDTH = 16


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, WIDTH // 2, bias=True)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = Attention()
        self.down_proj = nn.Linear(24, WIDTH, bias=False)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))


class Toy(nn.Module):
    """The shape of a language model inside a wrapper; never run, only merged."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.language_model = Decoder()
        self.lm_head = nn.Linear(WIDTH, 10, bias=False)


def save_base(model, folder):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    # The spelling of an older file: the wrappers stand the other way round.
    renamed = {k.replace("model.language_model", "language_model.model"): v for k, v in model.state_dict().items()}
    save_file({k: v.contiguous() for k, v in renamed.items()}, folder / "model.safetensors")
    return folder


def make(folder, *, base_class=Toy, dtype=torch.float32, seed=0, **options):
    """A base and a random adapter saved by PEFT, and the state dict that PEFT merges them to."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    base = base_class().to(dtype)
    folder.mkdir(exist_ok=True)
    save_base(base, folder / "base")
    options = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "k_proj", "down_proj"], **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(base, LoraConfig(**options), autocast_adapter_dtype=False)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.data = torch.randn_like(parameter)
            elif parameter.requires_grad:
                parameter.data += 1
        wrapped.save_pretrained(folder / "adapter")
        merged = wrapped.merge_and_unload()
    return folder, merged.state_dict()


def check_merge(folder, merged, tolerance=1e-6):
    with open_checkpoint(folder / "base") as plain:
        adapter = LoraAdapter(folder / "adapter")
        view = MergedCheckpoint(plain.base, [adapter])
        changed = 0
        for name, expected in merged.items():
            key = view.names.require(name)
            torch.testing.assert_close(view.read(key), expected, rtol=tolerance, atol=tolerance)
            changed += not torch.equal(view.read(key), plain.read(key))
        adapter.close()
    return changed


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.down_proj": 6}, "alpha_pattern": {"k_proj": 3}},
        {"rank_pattern": {"q_proj": 8}, "use_rslora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "lora_only"},
        {"target_modules": ["lm_head"]},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_the_merge_equals_pefts(options, tmp_path):
    folder, merged = make(tmp_path / "x", **options)
    assert check_merge(folder, merged) >= 1


def test_transposed_base_weights_merge_as_in_peft(tmp_path):
    from transformers.pytorch_utils import Conv1D

    class Transposed(Toy):
        def __init__(self):
            super().__init__()
            for block in self.model.language_model.layers:
                block.down_proj = Conv1D(WIDTH, 24)

    folder, merged = make(tmp_path / "x", base_class=Transposed, target_modules=["down_proj"], fan_in_fan_out=True)
    assert check_merge(folder, merged) == 2


def test_a_bf16_base_is_summed_in_fp32_and_cast_once(tmp_path):
    folder, _ = make(tmp_path / "x", dtype=torch.bfloat16)
    with open_checkpoint(folder / "base") as plain:
        adapter = LoraAdapter(folder / "adapter")
        view = MergedCheckpoint(plain.base, [adapter])
        name = "model.language_model.layers.0.self_attn.q_proj"
        a, b = adapter.read_factors(name)
        key = view.names.require(f"{name}.weight")
        exact = plain.read(key).double() + 2.5 * b.double() @ a.double()
        assert torch.equal(view.read(key), exact.to(torch.bfloat16))
        torch.testing.assert_close(view.read_float(key).double(), exact, rtol=1e-6, atol=1e-6)
        adapter.close()


def test_adapters_stack_in_order(tmp_path):
    folder, _ = make(tmp_path / "x")
    second, _ = make(tmp_path / "y", seed=1, r=2)

    class Value:
        base = str(folder / "base")
        adapters = (str(folder / "adapter"), str(second / "adapter"))

    name = "model.language_model.layers.1.down_proj"
    with open_checkpoint(Value()) as view:
        key = view.names.require(f"{name}.weight")
        expected = view.base.read(key)
        for adapter, scaling in zip(view.adapters, (2.5, 5.0), strict=True):
            a, b = adapter.read_factors(name)
            expected = expected + scaling * b @ a
        torch.testing.assert_close(view.read(key), expected)


@pytest.mark.parametrize("order", ["replaced-then-updated", "updated-then-replaced"])
def test_an_update_of_a_replaced_tensor_is_applied_and_one_before_it_is_replaced(order, tmp_path):
    whole, _ = make(tmp_path / "x", modules_to_save=["lm_head"])
    update, _ = make(tmp_path / "y", seed=1, target_modules=["lm_head"])
    folders = (whole, update) if order.startswith("replaced") else (update, whole)

    class Value:
        base = str(whole / "base")
        adapters = tuple(str(folder / "adapter") for folder in folders)

    with open_checkpoint(Value()) as view:
        key = view.names.require("lm_head.weight")
        saved, updating = view.adapters if order.startswith("replaced") else view.adapters[::-1]
        expected = saved.read_saved("lm_head.weight")
        if order.startswith("replaced"):
            a, b = updating.read_factors("lm_head")
            expected = expected + 2.5 * b @ a
        assert not view.is_plain(key)
        torch.testing.assert_close(view.read(key), expected)
        torch.testing.assert_close(view.read_float(key), expected)


def test_an_input_scale_beside_the_factors_scales_the_base(tmp_path):
    folder, _ = make(tmp_path / "x")
    name = "model.language_model.layers.0.down_proj"
    scale = torch.linspace(0.5, 1, 24)
    save_file({name: scale}, folder / "adapter" / "holdfast_input_scale.safetensors")
    with open_checkpoint(folder / "base") as plain:
        adapter = LoraAdapter(folder / "adapter")
        a, b = adapter.read_factors(name)
        view = MergedCheckpoint(plain.base, [adapter])
        key = view.names.require(f"{name}.weight")
        torch.testing.assert_close(view.read(key), plain.read(key) * scale + 2.5 * b @ a)
        adapter.close()
    save_file({name: scale[:3].contiguous()}, folder / "adapter" / "holdfast_input_scale.safetensors")
    with pytest.raises(AdapterError, match=r"expected one factor per column, \(24,\)"):
        LoraAdapter(folder / "adapter")


def edit_config(folder, **changes):
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_type": "IA3"}, "is a 'IA3' adapter; only LORA"),
        ({"lora_bias": True}, "lora_bias = True changes what"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens = .* not handled"),
        ({"layer_replication": [[0, 2]]}, "layer_replication = .* not handled"),
        ({"some_option_of_tomorrow": 3}, "some_option_of_tomorrow = 3 changes what"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights in memory"),
        ({"r": 5}, "configuration gives it rank 5"),
        ({"lora_alpha": None}, "lora_alpha is None; expected a positive number"),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern has '\(', which is no regular expression"),
        ({"rank_pattern": {"q_proj": "x"}}, r"rank_pattern\['q_proj'\] is 'x'; expected a positive number"),
        ({"alpha_pattern": {"q_proj": None}}, r"alpha_pattern\['q_proj'\] is None; expected a positive number"),
        ({"alpha_pattern": ["a"]}, r"alpha_pattern is \['a'\]; expected \{module pattern: number\}"),
    ],
)
def test_what_is_not_plain_lora_is_refused(changes, message, tmp_path):
    folder, _ = make(tmp_path / "x")
    edit_config(folder, **changes)
    with pytest.raises(AdapterError, match=message):
        LoraAdapter(folder / "adapter")


def edit_factors(folder, change):
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


KEY = "base_model.model.model.language_model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(f"{KEY}.lora_B.weight"), "q_proj has lora_A only"),
        (lambda t: t.update({f"{KEY}.lora_embedding_A": torch.ones(2)}), "q_proj has A, B, embedding_A only"),
        (lambda t: t.clear() or t.update({"base_model.model.lm_head.weight": torch.ones(1)}), "holds no LoRA factors"),
        (lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(4, WIDTH).long()}), "expected a floating type"),
    ],
)
def test_factors_that_do_not_belong_together_are_refused(change, message, tmp_path):
    folder, _ = make(tmp_path / "x")
    edit_factors(folder, change)
    with pytest.raises(AdapterError, match=message):
        LoraAdapter(folder / "adapter")


def test_nan_in_a_factor_is_found_when_it_is_read(tmp_path):
    folder, _ = make(tmp_path / "x")
    edit_factors(folder, lambda t: t[f"{KEY}.lora_A.weight"].view(-1)[3:4].fill_(float("nan")))
    adapter = LoraAdapter(folder / "adapter")
    with pytest.raises(AdapterError, match=r"q_proj\.lora_A\.weight holds NaN or inf"):
        adapter.read_factors(KEY.removeprefix("base_model.model."))
    adapter.close()


def test_an_adapter_for_other_modules_or_shapes_is_refused(tmp_path):
    folder, _ = make(tmp_path / "x")

    class Narrow(Toy):
        def __init__(self):
            super().__init__()
            for block in self.model.language_model.layers:
                block.down_proj = nn.Linear(20, WIDTH, bias=False)

    class Other(Toy):
        def __init__(self):
            super().__init__()
            for block in self.model.language_model.layers:
                block.out_proj = block.down_proj
                del block.down_proj

    for other, message in (
        (Narrow, "the adapter was trained on another model"),
        (Other, "has no tensor for .*down_proj"),
    ):
        base = CheckpointReader(save_base(other(), tmp_path / other.__name__))
        adapter = LoraAdapter(folder / "adapter")
        with pytest.raises(AdapterError, match=message):
            MergedCheckpoint(base, [adapter])
        base.close()
        adapter.close()


def test_missing_pickled_and_truncated_adapters_say_so(tmp_path):
    folder, _ = make(tmp_path / "x")
    assert is_adapter(folder / "adapter")
    assert not is_adapter(folder / "base")
    with pytest.raises(AdapterError, match="is no PEFT adapter"):
        LoraAdapter(folder / "base")
    weights = folder / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-2])
    with pytest.raises(AdapterError, match="is truncated"):
        LoraAdapter(folder / "adapter")
    weights.rename(folder / "adapter" / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin is pickled and never loaded"):
        LoraAdapter(folder / "adapter")


def test_an_adapter_has_a_fingerprint(tmp_path):
    folder, _ = make(tmp_path / "x")
    other, _ = make(tmp_path / "y", seed=1)
    prints = []
    for place in (folder, other):
        adapter = LoraAdapter(place / "adapter")
        prints.append(fingerprint(adapter))
        adapter.close()
    assert prints[0] != prints[1]


@pytest.mark.parametrize(
    "changes",
    [{"lora_alpha": 20}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}, {"fan_in_fan_out": True}],
    ids=lambda changes: next(iter(changes)),
)
def test_the_fingerprint_knows_what_the_configuration_makes_of_the_factors(changes, tmp_path):
    folder, _ = make(tmp_path / "x")
    adapter = LoraAdapter(folder / "adapter")
    plain = fingerprint(adapter)
    edit_config(folder, lora_dropout=0.5)
    assert fingerprint(LoraAdapter(folder / "adapter")) == plain
    edit_config(folder, **changes)
    assert fingerprint(LoraAdapter(folder / "adapter")) != plain


def test_the_fingerprint_knows_the_input_scales(tmp_path):
    folder, _ = make(tmp_path / "x")
    prints = [fingerprint(LoraAdapter(folder / "adapter"))]
    for value in (0.5, 0.75):
        scale = {"model.language_model.layers.0.down_proj": torch.full((24,), value)}
        save_file(scale, folder / "adapter" / "holdfast_input_scale.safetensors")
        prints.append(fingerprint(LoraAdapter(folder / "adapter")))
    assert len(set(prints)) == 3


def test_neither_a_folder_nor_a_reachable_id_is_an_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        open_checkpoint("nobody/no-such-model-anywhere")
