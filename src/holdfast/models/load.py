"""Checkpoint -> model and processor. A folder or hub id, with PEFT adapters merged on top; never remote code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from holdfast.checkpoints.contents import (
    INDEX_FILE,
    SINGLE_FILE,
)
from holdfast.checkpoints.merged import MergedCheckpoint, locate
from holdfast.checkpoints.reader import CheckpointReader, has_wrapped_names
from holdfast.checkpoints.support import quantisation_kind
from holdfast.checkpoints.value import Source, as_checkpoint
from holdfast.errors import CheckpointError, ModelError
from holdfast.models.families import family_of
from holdfast.models.loaded import BlockStore, LoadedModel
from holdfast.models.memory import find_device
from holdfast.models.merge import merge_adapter, resize_vocabulary
from holdfast.models.precision import DTYPES, default_device, parse_dtype, resolve_dtype, stays_narrow
from holdfast.models.settings import checkpoint_name, quiet_transformers, read_config, read_processor, shown
from holdfast.models.tuner import attach_tuner, is_tuner_folder
from holdfast.models.widened import widen_while_running

# Called before weights are read: what somebody keeps for later gives way (`models.held`).
before_load: list[Callable[[], None]] = []


def load(
    source: Source,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    trainable: bool = False,
) -> LoadedModel:
    """Load a vision-language model of transformers and its processor.

    source: folder, hub id (`HF_HUB_OFFLINE=1` is respected), or a checkpoint with adapters; adapters are merged one
        after another, in fp32 arithmetic, cast once. The last may be a tuner's folder, which stays on top.
    dtype: of the weights; None keeps the checkpoint's, except fp16 on a CPU, and bf16 on one without instructions for
        it, which are computed in fp32: the weights are widened, where they do not fit block by block as they run.
    device: None takes an accelerator where there is one.
    trainable: parameters keep `requires_grad`; otherwise they are frozen.

    Raises: ModelError: no such folder, missing or unreadable files, a language model without vision tower, a processor
        without chat template, code that would have to be trusted. AdapterError: an adapter that does not fit.
        ConfigError: a device that is not there.
    """
    value = as_checkpoint(source)
    base, adapters = value.base, value.adapters
    config = read_config(base)
    target = find_device(device) if device is not None else default_device()
    weight_dtype = resolve_dtype(dtype, config, target)
    _check_files(Path(base))
    for give_way in before_load:
        give_way()
    narrow = None if trainable else stays_narrow(base, dtype, config, target)
    with quiet_transformers():
        processor = read_processor(base, config, adapters, settings=value.settings)
        try:
            loaded: Any = _from_reader(base, config, narrow or weight_dtype)
            loaded = loaded or AutoModelForImageTextToText.from_pretrained(
                base,
                config=config,
                dtype=narrow or weight_dtype,
                trust_remote_code=False,
                use_safetensors=True,  # never a pickle
                output_loading_info=True,
            )
        except MemoryError:
            raise
        except ImportError as error:
            raise ModelError(
                f"{base} is quantised, and the library for it is not installed here ({error}). It is of a kind "
                f"{quantisation_kind('other').sentence}"
            ) from error
        except Exception as error:
            # Whatever a library raises over a foreign configuration or file.
            raise ModelError(f"{base}: the weights cannot be loaded: {shown(error)}") from error
    model, info = loaded
    _check_complete(base, info)
    model = model.to(target)
    on_top = adapters[-1] if adapters and is_tuner_folder(adapters[-1]) else None
    for adapter in adapters[:-1] if on_top else adapters:
        model = merge_adapter(model, adapter, base=base)
    model.eval()
    model.requires_grad_(trainable)
    if narrow is not None:
        widen_while_running(model)
    plain = LoadedModel(
        model=model,
        processor=processor,
        name=str(value),
        family=family_of(model.config),
        source=value,
    )
    return replace(plain, tuner=attach_tuner(plain, on_top)) if on_top else plain


def _from_reader(base: str, config: Any, dtype: torch.dtype) -> tuple[Any, dict[str, Any]] | None:
    """Model and loading info where the files have to be read here: quantised, or with a wrapper's names in them.

    None where transformers reads them itself. transformers' own loader still places every tensor.
    """
    recorded = getattr(config, "quantization_config", None) is not None
    # Of a hub id transformers fetches what it needs; only what it cannot read is fetched here.
    if not recorded and not (Path(base).is_dir() and has_wrapped_names(Path(base))):
        return None
    reader = CheckpointReader(locate(base))
    try:
        checkpoint = MergedCheckpoint(reader)
    except CheckpointError:
        reader.close()
        return None  # of a kind that transformers reads with that kind's library, or says why not
    with checkpoint:
        if not checkpoint.quantised and not checkpoint.base.wrapped:
            return None
        if recorded:
            del config.quantization_config
        found: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
        cls = found[0] if isinstance(found, tuple) else found
        state = {key: checkpoint.read(key) for key in checkpoint}
        loaded: tuple[Any, dict[str, Any]] = cls.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    return loaded


def _check_files(folder: Path) -> None:
    """Raise ModelError where weights on disk are damaged in a way that their loader may not mind: a name twice."""
    if not any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        return
    try:
        CheckpointReader(folder).close()
    except CheckpointError as error:
        raise ModelError(f"{folder}: the weights cannot be loaded: {error}") from error


def _check_complete(base: str, info: dict[str, Any]) -> None:
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{base} lacks {len(missing)} tensor(s), {_some(missing)}; they would be random numbers. The download or "
            "copy is incomplete, or the weights belong to another configuration."
        )
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        key, found, expected = mismatched[0]
        raise ModelError(
            f"{base}: {key} is {tuple(found)} on disk and {tuple(expected)} by config.json "
            f"({len(mismatched)} such tensor(s)); weights and configuration belong to different models."
        )
    if info.get("error_msgs"):
        raise CheckpointError(f"{base}: {'; '.join(info['error_msgs'][:3])}")


def _some(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


__all__ = [
    "DTYPES",
    "BlockStore",
    "LoadedModel",
    "checkpoint_name",
    "default_device",
    "load",
    "merge_adapter",
    "parse_dtype",
    "quiet_transformers",
    "read_config",
    "read_processor",
    "resize_vocabulary",
    "resolve_dtype",
    "stays_narrow",
]
