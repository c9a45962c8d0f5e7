"""A CRAM folder: what is saved answers the same, one expert loads in stock PEFT, and what does not fit is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import cram_kit
from cram_kit import rewrite, rewrite_tensors
from holdfast.errors import AdapterError, StorageError, UnknownNameError
from holdfast.models.encode import encode_request
from holdfast.models.families import editable_linears
from holdfast.models.generate import generate
from holdfast.models.load import load
from holdfast.stream.protocol import Checkpoint
from holdfast.tuners.cram.folder import from_pretrained, load_expert, save_expert, save_pretrained
from holdfast.tuners.cram.merge import export_merged
from holdfast.tuners.cram.stored_router import read_router
from holdfast.tuners.same_weights import _same_values, probe


@pytest.fixture(scope="module")
def saved(base, requests, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "cram"
    cram = cram_kit.with_experts(base, requests, sigma_scale=1.0)
    save_pretrained(cram, folder)
    cram.detach()
    return folder


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "cram"))


def replace_expert(folder: Path, factors: dict) -> None:
    """Another first expert, which the router was told of."""
    expert = read_router(folder).folders[0]
    shutil.rmtree(expert)
    save_expert(expert, factors, base="x")
    digest = hashlib.sha256((expert / "adapter_model.safetensors").read_bytes()).hexdigest()
    rewrite(folder, lambda d: d["experts"][0].update(sha256=digest))


@torch.no_grad()
def logits(loaded, samples):
    inputs = encode_request(loaded, samples)
    with loaded.serving(samples):
        return loaded.model(**inputs).logits[:, -1]


def test_a_saved_folder_answers_as_the_model_did(base, requests, make, saved, pico_folder):  # (h)
    samples = [requests[name][i] for name, i in (("warm", 0), ("maths", 3), ("cold", 5))]
    cram = make(samples=requests, sigma_scale=1.0)
    expected = logits(replace(base, tuner=cram), samples)
    cram.detach()
    loaded = load(Checkpoint(base=str(pico_folder), adapters=(str(saved),)))
    torch.testing.assert_close(logits(loaded, samples), expected)
    assert loaded.tuner.config == cram.config
    assert str(saved) in loaded.name


def test_a_folder_holds_no_pickle_and_saving_again_gives_the_same_bytes(base, saved, tmp_path):
    files = [p for p in saved.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".json", ".safetensors"}
    cram = from_pretrained(saved, base)
    save_pretrained(cram, tmp_path / "again")
    cram.detach()
    for path in files:
        assert (tmp_path / "again" / path.relative_to(saved)).read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again"], "nothing temporary is left"


def test_an_expert_answers_the_same_in_stock_peft(base, requests, saved, pico_folder):  # (m)
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    samples = requests["warm"][:3]
    cram = from_pretrained(saved, base)
    inputs = encode_request(base, samples)
    with torch.no_grad(), cram.forced({"warm": 1.0}):
        expected = base.model(**inputs).logits
    cram.detach()
    folder = read_router(saved).folders[0]
    model = PeftModel.from_pretrained(load(pico_folder).model, str(folder))
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    assert len(layers) == 8 and all(m.scaling["default"] == 1 for m in layers)
    assert {m.r["default"] for m in layers} == {1, 2, 3, 4}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected)
    with model.disable_adapter(), torch.no_grad():
        assert float((model(**inputs).logits - expected).abs().max()) > 0.1


def test_a_stock_peft_adapter_can_be_an_expert_with_its_scale_folded_in(base, tmp_path):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(
        base.model, LoraConfig(r=3, lora_alpha=6, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    )
    wrapped.save_pretrained(str(tmp_path / "peft"))
    stored = {k: v.clone() for k, v in wrapped.state_dict().items() if "lora_B" in k}
    wrapped.unload()
    factors = load_expert(tmp_path / "peft")
    name = "model.language_model.layers.0.self_attn.q_proj"
    b = next(v for k, v in stored.items() if name in k)
    torch.testing.assert_close(factors[name][1], 2 * b)


def test_an_adapter_that_does_more_than_add_is_no_expert(saved, tmp_path):
    expert = shutil.copytree(read_router(saved).folders[0], tmp_path / "expert")
    weights = load_file(expert / "adapter_model.safetensors")
    save_file({**weights, "base_model.model.lm_head.weight": torch.zeros(4, 4)}, expert / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"holds more than LoRA factors \(lm_head\.weight\)"):
        load_expert(expert)
    save_file(weights, expert / "adapter_model.safetensors")
    name = next(iter(load_expert(expert)))
    width = weights[f"base_model.model.{name}.lora_A.weight"].shape[1]
    save_file({name: torch.ones(width)}, expert / "holdfast_input_scale.safetensors")
    with pytest.raises(AdapterError, match="holds more than LoRA factors"):
        load_expert(expert)


def test_a_published_folder_is_never_overwritten(base, saved):
    cram = from_pretrained(saved, base)
    with pytest.raises(StorageError, match=r"exists; choose another folder"):
        save_pretrained(cram, saved)
    cram.detach()


def test_a_router_without_its_experts_is_refused(base, damaged):
    shutil.rmtree(read_router(damaged).folders[1])
    with pytest.raises(AdapterError, match=r"the router names 3 experts, but .*01-cold is no PEFT adapter"):
        from_pretrained(damaged, base)


def test_an_expert_of_another_base_is_refused(base, saved, damaged, pico_folder):
    other = load(pico_folder)
    with torch.no_grad():
        for name, p in other.model.named_parameters():
            if "layers" in name:
                p.mul_(1.01)
    with pytest.raises(AdapterError, match=r"was trained on another base .*: \d+ of \d+ weights have other values"):
        from_pretrained(saved, other)
    replace_expert(damaged, {"model.language_model.layers.0.self_attn.q_proj": (torch.ones(2, 7), torch.ones(32, 2))})
    with pytest.raises(AdapterError, match=r"maps 7 to 32 features, in this base 32 to 32; it belongs to another base"):
        from_pretrained(damaged, base)
    replace_expert(damaged, {"model.layers.9.q_proj": (torch.ones(2, 32), torch.ones(32, 2))})
    with pytest.raises(AdapterError, match=r"adapts model.layers.9.q_proj, which .* does not have"):
        from_pretrained(damaged, base)


def test_an_experts_weights_are_those_that_its_router_was_written_with(base, saved, damaged, tmp_path):
    """Swapped folders, and an expert that was trained again elsewhere: both fit the base and would answer."""
    one, two, _ = read_router(damaged).folders
    one.rename(tmp_path / "aside")
    two.rename(one)
    (tmp_path / "aside").rename(two)
    with pytest.raises(
        AdapterError, match=r"expert 'warm' in experts/00-warm are not those .* or are another expert's"
    ):
        from_pretrained(damaged, base)
    shutil.copytree(read_router(saved).folders[0], one, dirs_exist_ok=True)
    shutil.copytree(read_router(saved).folders[1], two, dirs_exist_ok=True)
    from_pretrained(damaged, base).detach()
    shutil.rmtree(two)
    save_expert(two, cram_kit.factors(base, cram_kit.config(), seed=77), base="other")
    with pytest.raises(AdapterError, match=r"expert 'cold' in experts/01-cold .* Copy the whole folder again"):
        from_pretrained(damaged, base)
    (two / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"01-cold is no PEFT adapter. Copy the whole folder"):
        from_pretrained(damaged, base)


@pytest.mark.parametrize("name", ["layers.1.mlp.down_proj.weight", "layers.0.self_attn.q_proj.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_with_one_tuned_matrix_is_another_base(saved, pico_folder, name, dtype):
    other = load(pico_folder, dtype=dtype)
    weight = next(p for n, p in other.model.named_parameters() if n.endswith(name))
    with torch.no_grad():
        weight.mul_(1.03)
    with pytest.raises(AdapterError, match=rf"1 of \d+ weights have other values, .*{name} first"):
        from_pretrained(saved, other)


def test_a_base_whose_modules_differ_is_another_base(base, damaged):
    name = "base.probe.model.language_model.layers.7.mlp.up_proj.weight"
    rewrite_tensors(damaged, lambda tensors: tensors.update({name: torch.zeros(16)}))
    with pytest.raises(AdapterError, match=r"trained on another base .*: there is no .*layers\.7\.mlp\.up_proj"):
        from_pretrained(damaged, base)


def test_saving_a_loaded_folder_again_names_the_base_alone(saved, pico_folder, tmp_path):
    loaded = load(Checkpoint(base=str(pico_folder), adapters=(str(saved),)))
    save_pretrained(loaded.tuner, tmp_path / "again")
    folder = read_router(tmp_path / "again").folders[0]
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(pico_folder)
    export_merged(loaded.tuner, {"warm": 1.0}, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(pico_folder)


class Int8(torch.nn.Module):
    """A quantised linear: integer weights and a scale in buffers, no parameter, no `nn.Linear`."""

    def __init__(self, plain: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("whole", (plain.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.whole * self.scale)


def quantised(pico_folder):
    """The pico model with every linear of its decoder blocks quantised."""
    loaded = load(pico_folder)
    for name in editable_linears(loaded.model):
        parent, _, leaf = name.rpartition(".")
        setattr(loaded.model.get_submodule(parent), leaf, Int8(loaded.model.get_submodule(name)))
    return loaded


def test_experts_on_a_whole_quantised_model_are_saved_loaded_and_generate(pico_folder, requests, saved, tmp_path):
    loaded = quantised(pico_folder)
    cram = cram_kit.with_experts(loaded, requests, sigma_scale=1.0)
    assert all("language_model.layers" in p.name for p in cram.layers) and len(cram.layers) == 8
    save_pretrained(cram, tmp_path / "cram")
    cram.detach()
    samples = [requests["warm"][0], requests["maths"][2]]
    again = quantised(pico_folder)
    again = replace(again, tuner=from_pretrained(tmp_path / "cram", again))
    answers = generate(again, samples, max_new_tokens=4)
    assert len(answers) == 2 and not bool(again.tuner.last_routing.abstained.any())
    with again.tuner.base_alone():
        plain = again.model(**encode_request(again, samples)).logits
    assert not torch.equal(logits(again, samples), plain[:, -1])
    again.tuner.detach()
    # Experts of the plain base: what is not quantised, the norms, is compared.
    from_pretrained(saved, again).detach()
    with torch.no_grad():
        next(p for n, p in again.model.named_parameters() if "layers.0.input_layernorm" in n).mul_(2)
    with pytest.raises(AdapterError, match=r"1 of 4 weights have other values"):
        from_pretrained(saved, again)


def test_a_probe_without_any_common_weight_is_refused(base, damaged):
    rewrite_tensors(damaged, lambda tensors: [tensors.pop(k) for k in [*tensors] if k.startswith("base.probe.")])
    with pytest.raises(AdapterError, match=r"or both hold all weights quantised, so nothing says that they are one"):
        from_pretrained(damaged, base)


@pytest.mark.parametrize("shape", [(11008, 4096), (1, 2**24 + 1), (3, 1), (1, 1), (16, 16)])
def test_a_probe_takes_values_from_the_first_to_the_last_of_a_weight_of_any_size(shape):
    """A weight of a 7B model has more values than float32 counts."""
    weight = torch.zeros(shape, dtype=torch.bfloat16)
    flat, last = weight.view(-1), weight.numel() - 1
    for i in range(16):
        flat[i * last // 15] = i + 1
    found = probe({"w": weight})["w"]
    assert len(found) == 16 and torch.equal(found, flat[[i * last // 15 for i in range(16)]])
    assert found[0] == flat[0] and found[-1] == 16


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = [(one, other) for one in DTYPES for other in DTYPES]


@pytest.fixture(scope="module")
def saved_in(pico_folder, requests, tmp_path_factory) -> dict[torch.dtype, Path]:
    """The folder of one base, learned on in each dtype."""
    folders = {}
    for dtype in DTYPES:
        folders[dtype] = tmp_path_factory.mktemp("dtypes") / "cram"
        cram = cram_kit.with_experts(load(pico_folder, dtype=dtype), {"warm": requests["warm"]})
        save_pretrained(cram, folders[dtype])
    return folders


@pytest.mark.parametrize("stored,found", PAIRS)
def test_the_same_base_in_another_dtype_is_accepted(saved_in, pico_folder, stored, found):
    from_pretrained(saved_in[stored], load(pico_folder, dtype=found))


def scaled(weight: torch.Tensor) -> torch.Tensor:
    return weight * 1.001


def two_fifths(weight: torch.Tensor) -> torch.Tensor:
    rows = weight.shape[0] * 2 // 5
    return torch.cat([weight[:rows].flip(0).roll(1, -1), weight[rows:]])


@pytest.mark.parametrize("change", [scaled, two_fifths])
@pytest.mark.parametrize("stored,found", PAIRS)
def test_a_base_with_slightly_other_weights_is_refused_in_any_dtype(saved_in, pico_folder, stored, found, change):
    """Changed in fp32, then rounded; a 0.1 % shift is a quarter of what bf16 rounds by, so it shows in some weights."""
    other = load(pico_folder)
    with torch.no_grad():
        for name, p in other.model.named_parameters():
            if "language_model.layers" in name and p.dim() == 2:
                p.copy_(change(p))
    other.model.to(found)
    with pytest.raises(AdapterError, match=r"was trained on another base .*: \d+ of \d+ weights have other values"):
        from_pretrained(saved_in[stored], other)


@pytest.mark.parametrize("stored,found", PAIRS)
def test_one_number_rounded_to_two_dtypes_is_one_weight(stored, found):
    """Over all magnitudes that the dtypes hold, subnormal ones, ties and zero among them."""
    g = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-9, 4, 200_000, dtype=torch.float64)
    numbers = torch.cat([sizes * torch.randn(sizes.shape, generator=g).sign(), torch.tensor([0.0, 1 + 2**-8, 2**-24])])
    one, two = numbers.float().to(stored), numbers.float().to(found)
    assert _same_values(one, two)
    coarse = max(torch.finfo(stored).eps, torch.finfo(found).eps)
    moved = (numbers * (1 + 3 * coarse)).float().to(found)
    assert not any(
        _same_values(a, b) for a, b in zip(one[50_000::5000], moved[50_000::5000], strict=True) if abs(a) > 1
    )


def test_a_changed_encoder_is_refused(base, saved, damaged, pico_folder):
    other = load(pico_folder)
    with torch.no_grad():
        for p in other.model.model.vision_tower.parameters():
            p.add_(0.1)
    with pytest.raises(AdapterError, match=r"the weights of encoder 'backbone' are not those"):
        from_pretrained(saved, other)
    rewrite(damaged, lambda d: d["encoder"].update(kind="clip"))
    with pytest.raises(AdapterError, match=r"made with encoder 'backbone' \(kind 'clip'\)"):
        from_pretrained(damaged, base)


def test_a_damaged_router_is_refused(base, damaged):
    rewrite_tensors(damaged, lambda t: t["expert.0.image_centroid"].fill_(torch.nan))
    with pytest.raises(AdapterError, match=r"'warm': its image centroid holds NaN or inf"):
        from_pretrained(damaged, base)
    rewrite_tensors(damaged, lambda t: t.pop("expert.0.text_centroid"))
    with pytest.raises(AdapterError, match=r"the router is damaged or of another version"):
        from_pretrained(damaged, base)
    (damaged / "router.json").write_text('{"format": 9}')
    with pytest.raises(
        AdapterError, match=r"has format 9; this version of holdfast reads formats 3 to 5. .* or learn its tasks again"
    ):
        read_router(damaged)
    for content in ("[]", "{", "\xff"):
        (damaged / "router.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(AdapterError, match=r"the router is damaged .* Restore router.json and router.safetensors"):
            read_router(damaged)
    (damaged / "router.json").unlink()
    with pytest.raises(AdapterError, match=r"is no CRAM folder; expected router.json"):
        read_router(damaged)


def first_expert(**values: object) -> Callable[[dict], object]:
    return lambda data: data["experts"][0].update(values)


@pytest.mark.parametrize(
    "change,message",
    [
        (first_expert(group=3), r"in groups \[0, 1, 3\]; expected 0 to 2 without a gap"),
        (lambda d: [e.update(group=e["group"] + 1) for e in d["experts"]], r"in groups \[1, 2\]; expected 0 to 1"),
        (first_expert(group=-1), r"'warm': group is -1; expected a whole number, 0 or more"),
        (first_expert(group=True), r"group is True; expected a whole number"),
        (first_expert(samples=0), r"samples is 0; expected a whole number, 1 or more"),
        (first_expert(samples="4"), r"samples is '4'; expected a whole number"),
        (first_expert(samples=1.5), r"samples is 1.5; expected a whole number"),
        (first_expert(images=-2), r"images is -2; expected a whole number"),
        (first_expert(images=0), r"images is 0, .* and there is an image centroid; expected both exactly when"),
        (first_expert(image_scatter=None), r"image_scatter is None, and there is an image centroid"),
        (first_expert(text_floor="a"), r"text_floor is 'a'; expected a number"),
        (first_expert(text_scatter=None), r"text_scatter is None; expected a number"),
        (first_expert(folder=3), r"folder and sha256 are 'warm', 3 and"),
        (first_expert(surprise=3), r"damaged or of another version: TypeError"),
        (lambda d: d["experts"][0].pop("samples"), r"damaged or of another version: KeyError\('samples'\)"),
        (lambda d: d["experts"].pop(), r"router.safetensors holds expert.2.text_centroid, but router.json names 2"),
        (lambda d: d.update(base={}), r"damaged or of another version: KeyError\('base'\)"),
        (lambda d: d["base"].update(adapters="x"), r"base is .*; expected {\"base\": folder or hub id"),
        (lambda d: d.update(encoder={}), r"KeyError\('text_width'\)"),
        (lambda d: d["encoder"].update(text_width="32"), r"encoder is .*; expected its kind, id, text_width"),
        (lambda d: d["config"].update(sigma=-1), r"sigma is -1.0; expected"),
    ],
)
def test_a_router_whose_parts_do_not_fit_is_refused(damaged, change, message):
    rewrite(damaged, change)
    with pytest.raises(AdapterError, match=rf"{message}.*learn the tasks again"):
        read_router(damaged)


@pytest.mark.parametrize(
    "key,value,message",
    [
        ("text_centroid", torch.ones(7), r"text centroid has shape \(7,\); expected \(32,\), the encoder's width"),
        ("text_centroid", torch.ones(1, 32), r"text centroid has shape \(1, 32\); expected \(32,\)"),
        ("image_centroid", None, r"images is 9, .* and there is no image centroid"),
        (
            "image_centroid",
            torch.ones(1, 7),
            r"image centroid has shape \(1, 7\); expected \(1 or the number of blocks, 32",
        ),
        ("image_centroid", torch.ones(32), r"image centroid has shape \(32,\)"),
        ("image_centroid", torch.ones(0, 32), r"image centroid has shape \(0, 32\)"),
        ("image_centroid", torch.ones(3, 32), r"'warm' has 3 image centroids; expected 1, or one for each of the 2"),
    ],
)
def test_a_centroid_of_another_shape_is_refused(base, damaged, key, value, message):
    rewrite_tensors(
        damaged, lambda t: t.pop(f"expert.0.{key}") if value is None else t.update({f"expert.0.{key}": value})
    )
    with pytest.raises(AdapterError, match=rf"{message}.*learn the tasks again"):
        from_pretrained(damaged, base)


@pytest.mark.parametrize("field", ["text_scatter", "image_scatter", "text_floor", "image_radius"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_router_with_a_number_that_is_not_finite_is_refused(base, damaged, field, value):
    rewrite(damaged, first_expert(**{field: value}))
    with pytest.raises(AdapterError, match=rf"Expert 'warm': its {field} is {value}; expected a finite number"):
        from_pretrained(damaged, base)


def test_a_marker_names_only_tuners_of_holdfast(damaged, pico_folder):
    checkpoint = Checkpoint(base=str(pico_folder), adapters=(str(damaged),))
    (damaged / "holdfast_tuner.json").write_text('{"tuner": "os"}')
    with pytest.raises(UnknownNameError, match=r"Unknown tuner .* 'os'.*Available: cram"):
        load(checkpoint)
    (damaged / "holdfast_tuner.json").write_text("{}")
    with pytest.raises(AdapterError, match=r"cannot be read; expected"):
        load(checkpoint)
