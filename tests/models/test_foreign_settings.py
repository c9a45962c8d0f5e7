"""Settings of tokenizers and image processors that multiply what they are given, or break off in Rust."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import hostile_kit as kit
import model_zoo
from holdfast.data.types import Sample
from holdfast.errors import ModelError
from holdfast.models.encode import decode, encode_request
from holdfast.models.foreign_settings import require_bounded
from holdfast.models.preflight import read_without_weights
from holdfast.models.settings import read_processor

ENDLESS = {"Regex": r"^(\w|\w)*$(?!.)|(\w|\w)*[^\w\W]$"}


def spoiled(base: Path, out: Path, file: str, part: str | None, **changes) -> Path:
    """A copy of `base` without weights whose `file` has other settings."""
    out.mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            (out / path.name).write_bytes(path.read_bytes())
    data = json.loads((out / file).read_text())
    (data if part is None else data[part]).update(changes)
    (out / file).write_text(json.dumps(data))
    return out


TOO_MUCH = {
    "text for text": ({"normalizer": kit.sequence("normalizers", [kit.replace("o", "o" * 50)] * 8)}, "normalizer may"),
    "sequences in sequences": (
        {"normalizer": kit.sequence("normalizers", [kit.sequence("normalizers", [kit.replace("e", "e" * 40)] * 4)])},
        "normalizer may",
    ),
    "between all letters": ({"normalizer": kit.replace({"Regex": "x*"}, "y" * 2000)}, "2e.03 times as long"),
    "bytes of bytes": ({"pre_tokenizer": kit.sequence("pretokenizers", [kit.BYTES] * 40)}, "pre_tokenizer may"),
    "in what is decoded": (
        {"decoder": kit.sequence("decoders", [kit.replace("a", "a" * 50)] * 3)},
        "decoder may make a text 1.25e.05",
    ),
    "around every text": ({"post_processor": {**kit.AROUND, "single": [kit.PIECE] * 5000}}, "puts 5000 parts"),
}


@pytest.mark.parametrize("kind", TOO_MUCH)
def test_a_tokenizer_that_multiplies_texts_is_refused(kind: str, pico_folder: Path, tmp_path: Path) -> None:
    changes, message = TOO_MUCH[kind]
    with pytest.raises(ModelError, match=message):
        read_processor(str(spoiled(pico_folder, tmp_path / "m", "tokenizer.json", None, **changes)))


PICTURES = {
    "a side": {"size": {"shortest_edge": 10**6}},
    "a cut": {"crop_size": {"height": 40_000, "width": 40_000}},
    "both sides": {"size": {"height": 9000, "width": 9000}},
}


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_larger_than_any_model_sees_are_refused(kind: str, pico_folder: Path, tmp_path: Path) -> None:
    place = spoiled(pico_folder, tmp_path / "m", "processor_config.json", "image_processor", **PICTURES[kind])
    with pytest.raises(ModelError, match="at most 67108864 pixels are made of a picture"):
        read_processor(str(place))


def test_image_tokens_without_number_are_refused(pico_folder: Path, tmp_path: Path) -> None:
    place = spoiled(pico_folder, tmp_path / "m", "processor_config.json", None, num_additional_image_tokens=10**9)
    with pytest.raises(ModelError, match=r"num_additional_image_tokens is 1e.09; at most 1048576"):
        read_processor(str(place))


@pytest.mark.parametrize("family", sorted(model_zoo.BUILDERS))
def test_the_families_settings_are_within_the_bounds(family: str) -> None:
    require_bounded(model_zoo.BUILDERS[family]()[1], family)


# What transformers' own image processors of released models do, by their defaults.
def test_published_defaults_are_within_the_bounds() -> None:
    from transformers import Qwen2VLImageProcessorPil

    for size in ({"shortest_edge": 3136, "longest_edge": 12_845_056}, {"shortest_edge": 65_536, "longest_edge": 2**24}):
        require_bounded(SimpleNamespace(image_processor=Qwen2VLImageProcessorPil(size=size)), "Qwen-VL")


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "post_processor"])
def test_rust_that_breaks_off_is_an_error_of_the_file(part: str, pico_folder: Path, tmp_path: Path) -> None:
    changes = {
        "normalizer": kit.replace(ENDLESS, ""),
        "pre_tokenizer": kit.sequence("pretokenizers", [{**kit.SPLIT, "pattern": ENDLESS}, kit.BYTES]),
        "post_processor": {**kit.AROUND, "single": [kit.special("<nope>"), kit.PIECE]},
    }
    place = spoiled(pico_folder, tmp_path / "m", "tokenizer.json", None, **{part: changes[part]})
    with pytest.raises(ModelError, match=r"cannot be used: .*(retry-limit|no entry found)"):
        encode_request(read_without_weights(str(place)), [Sample.single("s", "o" * 60 + " ", "a")])


def test_rust_that_breaks_off_over_an_answer_is_an_error_too(pico_folder: Path, tmp_path: Path) -> None:
    decoder = kit.sequence("decoders", [{"type": "Fuse"}, kit.replace(ENDLESS, "")])
    place = spoiled(pico_folder, tmp_path / "m", "tokenizer.json", None, decoder=decoder)
    tokenizer = read_without_weights(str(place)).tokenizer
    with pytest.raises(ModelError, match=r"The tokenizer of m cannot be used: .*retry-limit"):
        decode(tokenizer, tokenizer.convert_tokens_to_ids([*"o" * 60, "!"]), name="m")


@pytest.mark.parametrize("value", ["x", [10**30], {"a": 1}, 1.5, True])
def test_what_is_no_token_cannot_end_an_answer(value: object, pico_folder: Path, tmp_path: Path) -> None:
    place = spoiled(pico_folder, tmp_path / "m", "generation_config.json", None, eos_token_id=value)
    with pytest.raises(ModelError, match="expected a token's id or a list of them"):
        assert read_without_weights(str(place)).eos_token_ids


def test_pictures_that_become_no_numbers_are_told_of(pico_folder: Path, tmp_path: Path) -> None:
    place = spoiled(pico_folder, tmp_path / "m", "processor_config.json", "image_processor", image_std=[0, 0, 0])
    sample = Sample.single("s", "a", "b", images=[model_zoo.picture(tmp_path / "p.png", (9, 9, 9))])
    with pytest.raises(ModelError, match="makes NaN or infinity of pictures"):
        encode_request(read_without_weights(str(place)), [sample])
