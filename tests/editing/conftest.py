"""A microscopic LLaVA before and after tuning, as a full checkpoint and as an adapter, and a calibration for both."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast.checkpoints.curvature_file import Curvature

LORA = {"r": 4, "lora_alpha": 8, "target_modules": r".*language_model.*_proj"}


@dataclass(frozen=True)
class World:
    """before: bf16 folder. after: the same with every decoder linear and the projector changed. adapter: a LoRA."""

    before: Path
    after: Path
    adapter: Path
    curvature: Curvature


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def make_adapter(base: Path, out: Path, **options) -> Path:
    """A random LoRA on the model in `base`, saved by PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
        wrapped = get_peft_model(model, LoraConfig(**{**LORA, **options}))
        generator = torch.Generator().manual_seed(5)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        wrapped.save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def lora():
    """`make_adapter`, for tests that need another one."""
    return make_adapter


@pytest.fixture(scope="session")
def world(pico_folder, tmp_path_factory) -> World:
    root = tmp_path_factory.mktemp("editing")
    before, after = root / "before", root / "after"
    shutil.copytree(pico_folder, before)
    generator = torch.Generator().manual_seed(3)
    old = {key: value.to(torch.bfloat16) for key, value in tensors(before).items()}
    save_file(old, before / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(before, after)
    new = {}
    for key, value in old.items():
        tuned = ("language_model" in key and "_proj" in key) or "multi_modal_projector.linear_1.weight" in key
        noise = torch.randn(value.shape, generator=generator) * 0.05
        new[key] = (value.float() + noise).to(torch.bfloat16) if tuned else value
    save_file(new, after / "model.safetensors", metadata={"format": "pt"})
    keys = [key for key in old if "language_model" in key and "_proj.weight" in key]
    blocks = {}
    for key in keys:
        _, _, rest = key.removesuffix(".weight").partition("layers.")
        blocks[f"model.language_model.layers.{rest}"] = int(rest.split(".")[0])

    def diagonals(seed: int) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(seed)
        return {
            f"model.language_model.layers.{key.removesuffix('.weight').partition('layers.')[2]}": torch.rand(
                old[key].shape[1], generator=draw
            )
            + 0.05
            for key in keys
        }

    curvature = Curvature(
        safety=diagonals(1), task=diagonals(2), meta={"blocks": blocks, "block_count": max(blocks.values()) + 1}
    )
    return World(before, after, make_adapter(before, root / "adapter"), curvature)
