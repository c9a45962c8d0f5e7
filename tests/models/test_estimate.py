"""Image tokens by each scheme, and bytes that follow from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import DataError
from holdfast.models.estimate import estimate, read_shape

TEXT = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 100,
}


def model(folder: Path, processor: dict[str, Any] | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"text_config": TEXT, **config}))
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.mark.parametrize(
    ("config", "processor", "size", "tokens"),
    [
        ({"vision_config": {"image_size": 336, "patch_size": 14}}, None, (4000, 10), 576),  # LLaVA-1.5
        (
            {"vision_config": {"image_size": 336, "patch_size": 14}, "image_grid_pinpoints": [[336, 672], [672, 672]]},
            None,
            (50, 50),
            5 * 576,
        ),
        (
            {"vision_config": {"image_size": 512, "patch_size": 16}, "scale_factor": 4},
            {"do_image_splitting": True, "size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
            (50, 50),
            17 * 64,
        ),
        (
            {"vision_config": {"image_size": 448, "patch_size": 14}, "downsample_ratio": 0.5},
            {"crop_to_patches": True, "max_patches": 12},
            (50, 50),
            13 * 256,
        ),
        (
            {"vision_config": {"image_size": [448, 448], "patch_size": [14, 14]}, "downsample_ratio": 0.5},
            {"crop_to_patches": True, "max_patches": 12},
            (50, 50),
            13 * 256,
        ),  # InternVL writes both sides
        ({"vision_config": {"patch_size": 14, "spatial_merge_size": 2}}, None, (280, 140), 50),  # Qwen2-VL
        (
            {"vision_config": {"patch_size": 14, "spatial_merge_size": 2}},
            {"size": {"shortest_edge": 3136, "longest_edge": 78400}},
            (2800, 2800),
            100,
        ),
    ],
)
def test_every_scheme_gives_its_tokens(
    tmp_path: Path, config: dict[str, Any], processor: dict[str, Any] | None, size: tuple[int, int], tokens: int
) -> None:
    assert read_shape(model(tmp_path / "m", processor, **config)).image_tokens(*size) == tokens


def test_bytes_follow_from_tokens(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", vision_config={"image_size": 28, "patch_size": 14})
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    found = estimate(read_shape(folder), [[(10, 10), (20, 10)], [], [(5, 5)]], [40, 400, 41], batch_size=2)
    assert found.image_tokens == 8 and found.tokens == 100  # the long text wins
    assert found.decoded_bytes == 3 * (100 + 200) + 3 * 25
    total = 2 * 100
    assert found.cache_bytes == total * 2 * 3 * 32 * 2
    assert found.logit_bytes == total * 100 * 4
    assert found.training_bytes == 1000 + total * 400 + total * 3 * 64 * 34
    assert found.checkpointed_bytes == 1000 + total * 400 + total * 64 * (3 * 2 + 34)


def test_a_config_that_does_not_say_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 4}')
    with pytest.raises(DataError, match="names no num_attention_heads"):
        read_shape(folder)
    with pytest.raises(DataError, match=r"config\.json does not exist"):
        read_shape(tmp_path)
