"""What the router sees of a request, by the model's own eyes or by CLIP's and SigLIP's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import cram_kit
import model_zoo
from cram_kit import rewrite, rewrite_tensors
from holdfast.data.types import Sample, Turn
from holdfast.errors import AdapterError, ConfigError, DataError, ModelError
from holdfast.models.encode import encode_request
from holdfast.models.load import load
from holdfast.tuners.cram.cram_config import CramConfig
from holdfast.tuners.cram.folder import from_pretrained, save_pretrained
from holdfast.tuners.cram.phases import check_continues
from holdfast.tuners.cram.router_features import (
    BackboneEncoder,
    ContrastiveEncoder,
    instruction,
    make_encoder,
    widest_directions,
)
from holdfast.tuners.cram.stored_router import COMMON, read_router

WIDTH = 24


def save_contrastive(kind: str, folder: Path) -> Path:
    """A pico CLIP or SigLIP with its real processor classes."""
    import transformers as t

    towers = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**towers, "vocab_size": model_zoo.VOCAB, "max_position_embeddings": 77, "pad_token_id": 0}
    vision = {**towers, "image_size": 28, "patch_size": 14}
    tokenizer = model_zoo.tokenizer()
    tokenizer.model_max_length = 77
    torch.manual_seed(1)
    if kind == "clip":
        text["eos_token_id"] = 2
        model = t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
        images = t.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        processor = t.CLIPProcessor(image_processor=images, tokenizer=tokenizer)
    else:
        model = t.SiglipModel(t.SiglipConfig(text_config=text, vision_config=vision))
        images = t.SiglipImageProcessorPil(size={"height": 28, "width": 28})
        processor = t.SiglipProcessor(image_processor=images, tokenizer=tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["clip", "siglip"])
def contrastive(request, tmp_path_factory) -> Path:
    return save_contrastive(request.param, tmp_path_factory.mktemp(request.param))


def test_the_instruction_is_what_the_user_says_and_nothing_else():
    turns = (
        Turn(role="system", text="be kind"),
        Turn(role="user", text="<image>\nWhat is it?"),
        Turn(role="assistant", text="a dog"),
        Turn(role="user", text="And its colour?"),
        Turn(role="assistant", text="brown"),
    )
    assert instruction(Sample(id="x", turns=turns)) == "What is it?\nAnd its colour?"
    with pytest.raises(DataError, match=r"'y' has no instruction text, only images"):
        instruction(Sample.single("y", "<image>"))


def test_backbone_vectors_are_means_over_own_tokens(base, requests):
    encoder = BackboneEncoder(base)
    sample = requests["warm"][0]
    weight = base.model.get_input_embeddings().weight
    ids = base.tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
    mean = weight[ids].mean(0) - weight.mean(0)
    torch.testing.assert_close(encoder.text([sample])[0], torch.nn.functional.layer_norm(mean, mean.shape))
    pixels = encode_request(base, [sample])["pixel_values"]
    with torch.no_grad():
        shown = torch.cat(list(base.model.get_image_features(pixel_values=pixels).pooler_output))
    image, has_image = encoder.images([sample, requests["maths"][0]])
    torch.testing.assert_close(image[0], shown.mean(0), rtol=1e-4, atol=1e-5)
    assert has_image.tolist() == [True, False] and not image[1].any()


def test_backbone_vectors_do_not_depend_on_the_batch(base, requests):
    samples = [requests["warm"][0], requests["maths"][0], requests["cold"][3], requests["warm"][1]]
    together = BackboneEncoder(base).images(samples)[0]
    alone = torch.cat([BackboneEncoder(base, batch_size=1).images([s])[0] for s in samples])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_contrastive_encoders_see_text_and_images(contrastive, requests):
    encoder = ContrastiveEncoder(str(contrastive), batch_size=3)
    samples = [requests["warm"][0], requests["cold"][0], requests["maths"][0], requests["warm"][2]]
    both = Sample.single("both", "Compare.", images=[*samples[0].images, *samples[1].images])
    text, (image, has_image) = encoder.text([*samples, both]), encoder.images([*samples, both])
    assert text.shape == (5, WIDTH) and image.shape == (5, WIDTH)
    torch.testing.assert_close(text.mean(-1), torch.zeros(5), rtol=0, atol=1e-5)
    assert has_image.tolist() == [True, True, False, True, True] and not image[2].any()
    torch.testing.assert_close(image[4], image[:2].mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(image[0], image[3], rtol=1e-4, atol=1e-5)
    assert float((image[0] - image[1]).norm()) > 0.01


def test_a_router_on_a_contrastive_encoder_is_saved_moved_and_guarded(base, contrastive, requests, tmp_path):
    tasks = {name: requests[name] for name in ("warm", "cold")}
    cram = cram_kit.with_experts(base, tasks, encoder=str(contrastive), groups=(0, 0), abstain="off")
    save_pretrained(cram, tmp_path / "cram")
    samples = [tasks["warm"][0], tasks["cold"][0]]
    with torch.no_grad(), cram.serving(samples):
        base.model(**encode_request(base, samples))
    weights = cram.last_routing.weights
    assert weights[:, 0].argmax(-1).tolist() == [0, 1]
    cram.detach()
    again = from_pretrained(tmp_path / "cram", base, encoder=ContrastiveEncoder(str(contrastive)))
    torch.testing.assert_close(again.route(samples).weights, weights)
    again.detach()
    with pytest.raises(AdapterError, match=r"made with encoder .*Load it with the encoder it was made with"):
        from_pretrained(tmp_path / "cram", base, encoder=BackboneEncoder(base))
    changed = ContrastiveEncoder(str(contrastive))
    with torch.no_grad():
        for p in changed.model.parameters():
            p.add_(0.1)
    with pytest.raises(AdapterError, match=r"the weights of encoder .* are not those that the router was made with"):
        from_pretrained(tmp_path / "cram", base, encoder=changed)
    assert not hasattr(base.model, "holdfast_cram")


def test_what_is_no_encoder_is_refused(base, pico_folder, tmp_path):
    with pytest.raises(ModelError, match=r"is a 'llava' model; expected CLIP or SigLIP"):
        make_encoder(CramConfig(encoder=str(pico_folder)), base)
    with pytest.raises(ModelError, match=r"cannot be loaded"):
        make_encoder(CramConfig(encoder=str(tmp_path)), base)


def in_a_cone(loaded, *, strength: float = 3.0):
    """Give word embeddings a direction that those of a language model share, more or less of it."""
    weight = loaded.model.get_input_embeddings().weight
    g = torch.Generator().manual_seed(0)
    direction = torch.randn(weight.shape[1], generator=g)
    with torch.no_grad():
        weight += strength * torch.rand(len(weight), 1, generator=g) ** 4 * direction
    return torch.nn.functional.normalize(direction, dim=0)


def test_what_all_words_share_is_left_out_of_instruction_vectors(pico_folder, requests):
    loaded = load(pico_folder)
    direction = in_a_cone(loaded)
    share = 1.0 / loaded.model.get_input_embeddings().weight.shape[1]  # one direction
    encoder = BackboneEncoder(loaded, common_directions=share)
    assert encoder.common.shape == (1, len(direction)) and float((encoder.common @ direction).abs()) > 0.95
    samples = [requests[name][0] for name in ("warm", "cold", "maths")]
    weight = loaded.model.get_input_embeddings().weight
    for sample, vector in zip(samples, encoder.text(samples), strict=True):
        ids = loaded.tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
        mean = weight[ids].mean(0) - weight.mean(0)
        mean = mean - (mean @ encoder.common[0]) * encoder.common[0]
        torch.testing.assert_close(vector, torch.nn.functional.layer_norm(mean, mean.shape), rtol=1e-4, atol=1e-5)
    assert encoder.identity["common_directions"] == 1
    assert BackboneEncoder(loaded, common_directions=0).identity["common_directions"] == 0


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("rows,width", [(40, 8), (9, 24), (3, 16)])
def test_the_widest_directions_are_the_first_principal_ones(rows, width, count):
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -3, width)
    state = torch.random.get_rng_state()
    found = widest_directions(weight, count)
    assert torch.equal(state, torch.random.get_rng_state())  # draws nothing from anybody's generator
    assert torch.equal(found, widest_directions(weight, count))
    count = min(count, rows, width)
    torch.testing.assert_close(found @ found.T, torch.eye(count), rtol=0, atol=1e-4)
    spread = torch.linalg.svdvals(weight - weight.mean(0))
    torch.testing.assert_close(
        ((weight - weight.mean(0)) @ found.T).norm(dim=0), spread[:count], rtol=1e-3, atol=1e-4 * float(spread[0])
    )


def test_a_router_keeps_what_it_leaves_out(pico_folder, requests, tmp_path):
    """So that it reads the same vectors later, and no other encoder's."""
    loaded = load(pico_folder)
    in_a_cone(loaded)
    share = 2.0 / loaded.model.get_input_embeddings().weight.shape[1]
    tasks = {name: requests[name] for name in ("warm", "maths")}
    cram = cram_kit.with_experts(loaded, tasks, groups=(0, 1), common_directions=share)
    samples = [tasks["warm"][0], tasks["maths"][0]]
    expected, kept = cram.route(samples), cram.encoder.common
    save_pretrained(cram, tmp_path / "cram")
    cram.detach()
    stored = read_router(tmp_path / "cram")
    assert torch.equal(stored.common, kept) and stored.encoder["common_directions"] == 2
    again = from_pretrained(tmp_path / "cram", loaded)
    assert torch.equal(again.encoder.common, kept)
    torch.testing.assert_close(again.route(samples).similarity, expected.similarity)
    again.detach()
    with pytest.raises(AdapterError, match=r"common_directions 2\), but this one is .* \(common_directions 0\)"):
        from_pretrained(tmp_path / "cram", loaded, encoder=BackboneEncoder(loaded, common_directions=0))
    with pytest.raises(ConfigError, match=r"was made with common_directions .* Set common_directions to"):
        check_continues(tmp_path / "cram", stored.router.config, CramConfig())
    for change, message in (
        (lambda t: t.pop(COMMON), r"has shape None; expected \(2, "),
        (lambda t: t.update({COMMON: t[COMMON][:1].clone()}), r"has shape \(1, .*expected \(2, "),
        (lambda t: t[COMMON].fill_(torch.nan), r"holds NaN or inf"),
    ):
        folder = tmp_path / f"damaged-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tmp_path / "cram", folder)
        rewrite_tensors(folder, change)
        with pytest.raises(AdapterError, match=rf"damaged: {COMMON} {message}"):
            read_router(folder)


def test_a_folder_of_an_earlier_format_left_nothing_out(pico_folder, requests, tmp_path):
    loaded = load(pico_folder)
    in_a_cone(loaded)
    cram = cram_kit.with_experts(loaded, {"warm": requests["warm"]}, groups=(0,), common_directions=0.0)
    expected = cram.route(requests["warm"][:2]).similarity
    save_pretrained(cram, tmp_path / "cram")
    cram.detach()

    def earlier(data):
        data["format"] = 4
        del data["config"]["common_directions"], data["encoder"]["common_directions"]

    rewrite(tmp_path / "cram", earlier)
    again = from_pretrained(tmp_path / "cram", loaded)
    assert again.config.common_directions == 0
    torch.testing.assert_close(again.route(requests["warm"][:2]).similarity, expected)
    again.detach()
