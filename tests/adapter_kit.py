"""Random adapters saved by PEFT, and the logits that stock transformers and PEFT give for them."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from holdfast.editing.editor import edit_checkpoint
from holdfast.rules.interpolation import InterpolationOptions, InterpolationRule

IDS = torch.arange(20, 40)[None]


def train(base: Path, out: Path, **options) -> Path:
    """A random adapter, saved by PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
        wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **options))
        generator = torch.Generator().manual_seed(5)
        for name, parameter in wrapped.named_parameters():
            if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens")):
                parameter.data = parameter.data + torch.randn(parameter.shape, generator=generator) * 0.1
        wrapped.save_pretrained(out)
    return out


def stock_logits(base: Path, adapter: Path | None = None) -> torch.Tensor:
    """By transformers and PEFT alone, the adapter unmerged."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        return model.eval()(input_ids=IDS).logits


def edit_all(before: Path, after: Path, out: Path):
    """A dense edit that takes the whole change."""
    return edit_checkpoint(before, after, rule=InterpolationRule(InterpolationOptions(factor=1.0)), out=out)


def logits(loaded) -> torch.Tensor:
    with torch.no_grad():
        return loaded.model(input_ids=IDS).logits


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())
