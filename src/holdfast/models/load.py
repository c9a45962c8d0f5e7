"""Checkpoint -> model and processor. A folder or hub id, with PEFT adapters merged on top; never remote code."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import logging as transformers_logging

from holdfast.checkpoints.adapter import CONFIG_FILE, INPUT_SCALE_FILE, LoraAdapter
from holdfast.checkpoints.adapter_settings import has_settings
from holdfast.checkpoints.contents import require_model_folder, require_safe_adapter
from holdfast.checkpoints.merged import add_updates, locate
from holdfast.checkpoints.naming import NameIndex
from holdfast.checkpoints.rewrite import copy_side_files
from holdfast.checkpoints.tied import untie_in_memory
from holdfast.checkpoints.value import Source, as_checkpoint
from holdfast.errors import AdapterError, CheckpointError, ModelError
from holdfast.models.families import build_processors_without_video, family_of
from holdfast.models.loaded import BlockStore, LoadedModel
from holdfast.models.memory import find_device
from holdfast.models.tuner import attach_tuner, is_tuner_folder

# Called before weights are read: what somebody keeps for later gives way (`models.held`).
before_load: list[Callable[[], None]] = []
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    dtype: of the weights; None keeps the checkpoint's, except fp16 on a CPU, which becomes fp32 (fp16 matrix products
        on CPUs are 100-400 x slower than bf16).
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
    for give_way in before_load:
        give_way()
    with quiet_transformers():
        processor = read_processor(base, config, adapters)
        try:
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                base,
                config=config,
                dtype=weight_dtype,
                trust_remote_code=False,
                use_safetensors=True,  # never a pickle
                output_loading_info=True,
            )
        except (OSError, ValueError, SafetensorError, RuntimeError) as error:
            raise ModelError(f"{base}: the weights cannot be loaded: {error}") from error
    model, info = loaded
    _check_complete(base, info)
    model = model.to(target)
    on_top = adapters[-1] if adapters and is_tuner_folder(adapters[-1]) else None
    for adapter in adapters[:-1] if on_top else adapters:
        model = merge_adapter(model, adapter, base=base)
    model.eval()
    model.requires_grad_(trainable)
    plain = LoadedModel(
        model=model,
        processor=processor,
        name=str(value),
        family=family_of(model.config),
        source=value,
    )
    return replace(plain, tuner=attach_tuner(plain, on_top)) if on_top else plain


def checkpoint_name(source: Source) -> str:
    """What errors and records call a checkpoint."""
    return str(as_checkpoint(source))


def read_config(base: str) -> Any:
    """The configuration of a vision-language checkpoint. Raises ModelError where it is none."""
    path = Path(base)
    require_model_folder(path)
    if path.exists() and not (path / "config.json").is_file():
        raise ModelError(f"{base} has no config.json; expected the folder of a saved transformers model.")
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    except (OSError, HFValidationError) as error:
        raise ModelError(
            f"{base}: neither a model folder nor a hub id that can be reached (or is cached, when HF_HUB_OFFLINE=1): "
            f"{error}"
        ) from error
    except ValueError as error:
        raise ModelError(
            f"{base}: transformers {transformers.__version__} cannot build this model without running code from the "
            f"checkpoint, which holdfast never does: {error}"
        ) from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ModelError(
            f"{base} is a {config.model_type!r} model without a vision tower; expected an image-text-to-text model "
            "such as LLaVA, Qwen2.5-VL or InternVL (`holdfast list families`)."
        )
    return config


def read_processor(base: str, config: Any | None = None, adapters: Sequence[str] = ()) -> Any:
    """The processor of a checkpoint, with PIL images, a chat template and a padding token.

    adapters: folders on top of the base; a tokenizer, template or processor that one of them has wins over the base's.

    Raises: ModelError: no processor, or a tokenizer with more tokens than the model has embeddings.
    """
    folders = [locate(adapter) for adapter in adapters if not is_tuner_folder(adapter)]
    if not any(has_settings(folder) for folder in folders):
        return _read_processor(base, config)
    with tempfile.TemporaryDirectory(prefix="holdfast-settings-") as place:
        copy_side_files(locate(base), Path(place), folders)
        processor = _read_processor(place, read_config(base) if config is None else config, name=base)
    rows = (config or read_config(base)).get_text_config().vocab_size
    if len(processor.tokenizer) > rows:
        raise ModelError(
            f"{' + '.join((base, *adapters))}: the tokenizer knows {len(processor.tokenizer)} tokens and the model has "
            f"{rows} embeddings. The embeddings were resized for this tuning and are not here; merge the adapter into "
            "its base with the tool that trained it."
        )
    return processor


def _read_processor(place: str, config: Any | None, *, name: str | None = None) -> Any:
    """The processor whose files are in `place`. name: what errors call it."""
    base = place if name is None else name
    config = read_config(base) if config is None else config
    build_processors_without_video()
    try:
        # The PIL backend everywhere: torchvision resizes a little differently, and is not always there.
        processor = AutoProcessor.from_pretrained(place, trust_remote_code=False, backend="pil")
    except (OSError, ValueError, ImportError, TypeError, KeyError) as error:
        raise ModelError(
            f"{base}: the processor cannot be loaded; expected processor_config.json or preprocessor_config.json and "
            f"the tokenizer's files beside the weights: {error}"
        ) from error
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise ModelError(
            f"{base}: {type(processor).__name__} has no image processor beside its tokenizer; expected the processor "
            "of a vision-language model (processor_config.json and preprocessor_config.json)."
        )
    family = family_of(config)
    if not processor.chat_template:
        if family.chat_template is None:
            raise ModelError(
                f"{base} has no chat template, so turns cannot be put to the model as it was trained. Add "
                "chat_template.jinja to the folder."
            )
        processor.chat_template = family.chat_template
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def merge_adapter(model: PreTrainedModel, adapter: str, *, base: str = "the model") -> PreTrainedModel:
    """`model` with the adapter in folder `adapter` added to its weights (fp32 sum, cast once), names unchanged.

    Plain LoRA is added exactly, with the input-scaling vectors of a holdfast edit where the folder holds them; every
    other kind of PEFT adapter is merged by PEFT.

    Raises: AdapterError: no adapter there, tensors missing, unknown target modules, or nothing that it changes.
    """
    folder = locate(adapter)
    extra = require_safe_adapter(folder)  # before PEFT sees it: PEFT would unpickle
    try:
        plain = LoraAdapter(folder)
    except AdapterError:
        # A kind that is not plain LoRA (DoRA, IA3, ...), or a damaged one: PEFT merges the first, and names the damage
        # of the second.
        if not (folder / CONFIG_FILE).is_file() or (folder / INPUT_SCALE_FILE).is_file() or extra:
            raise
        return _merge_by_peft(model, str(folder), base)
    try:
        _merge_lora(model, plain, base)
    finally:
        plain.close()
    return model


@torch.no_grad()
def _merge_lora(model: PreTrainedModel, adapter: LoraAdapter, base: str) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = NameIndex(parameters, what=base)
    matched = adapter.match(names)
    for name in adapter.saved:
        key = adapter.key_of_saved(name, names)
        if adapter.changes_one_end(name):
            _give_own_parameter(model, key, parameters)
        value = adapter.read_saved(name)
        if value.shape != parameters[key].shape:
            raise AdapterError(
                f"{adapter.folder}: {name} is {tuple(value.shape)} in the adapter and {tuple(parameters[key].shape)} "
                f"in {base}; resized tensors are not handled. Merge the adapter with PEFT first."
            )
        parameters[key].data.copy_(value)
    done = set()
    for module, key in matched.items():
        entry = adapter.modules[module]
        if adapter.changes_one_end(module):
            _give_own_parameter(model, key, parameters)
        weight = parameters[key]
        if tuple(weight.shape) != (entry.shape[::-1] if entry.transposed else entry.shape):
            raise AdapterError(
                f"{adapter.folder} updates {module} as {entry.shape}, but it is {tuple(weight.shape)} in {base}; the "
                "adapter was trained on another model."
            )
        if id(weight) in done:  # the other end of a pair that the adapter keeps tied
            continue
        done.add(id(weight))
        a, b = (factor.to(weight.device) for factor in adapter.read_factors(module))
        scale = adapter.read_scale(module)
        add_updates(weight.data, [(a, b, entry, None if scale is None else scale.to(weight.device))], out=weight.data)


def _give_own_parameter(model: Any, key: str, parameters: dict[str, torch.nn.Parameter]) -> None:
    """Part a parameter from those it is tied to, for good: configuration and all. One that is not tied stays."""
    shared = [name for name, parameter in parameters.items() if parameter is parameters[key] and name != key]
    if not shared:
        return
    owner, _, name = key.rpartition(".")
    own = torch.nn.Parameter(parameters[key].detach().clone(), requires_grad=parameters[key].requires_grad)
    setattr(model.get_submodule(owner), name, own)
    parameters[key] = own
    untie_in_memory(model.config)
    model.all_tied_weights_keys = {
        target: source
        for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items()
        if key not in (target, source)
    }


def _merge_by_peft(model: PreTrainedModel, adapter: str, base: str) -> PreTrainedModel:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    try:
        with warnings.catch_warnings():
            # PEFT only warns when tensors of an adapter are missing, and would serve a part of it.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            # PEFT asks transformers for an attribute that was renamed.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            wrapped = PeftModel.from_pretrained(model, adapter)
    except (ValueError, RuntimeError, OSError, KeyError, SafetensorError, UserWarning) as error:
        raise AdapterError(f"{adapter} does not fit {base}: {error}") from error
    if not any(isinstance(m, BaseTunerLayer) for m in wrapped.modules()):
        raise AdapterError(f"{adapter} matches no module of {base}; it was trained for another model.")
    everywhere = dict(wrapped.named_parameters(remove_duplicate=False))
    for name, parameter in everywhere.items():
        if "lora_" in name:
            parameter.data = parameter.data.float()
        if name.endswith(".base_layer.weight") and not wrapped.peft_config["default"].to_dict().get(
            "ensure_weight_tying"
        ):
            # Merged in place, a tied head would take the embedding with it.
            _give_own_parameter(wrapped, name, everywhere)
    # Not safe_merge: that rounds the change to the weight's dtype before the sum, and small edits vanish.
    merged = wrapped.merge_and_unload()
    ends = [merged.get_input_embeddings(), merged.get_output_embeddings()]
    if None not in ends and ends[0].weight is not ends[1].weight:
        untie_in_memory(merged.config)
    return merged


def default_device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers within: what matters is raised as an error."""
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def parse_dtype(name: torch.dtype | str) -> torch.dtype:
    """A dtype from its name. Raises ModelError."""
    if isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise ModelError(f"dtype {name!r} is not one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def resolve_dtype(dtype: torch.dtype | str | None, config: Any, device: torch.device) -> torch.dtype:
    """The dtype to compute in: the one asked for, else the checkpoint's.

    On a CPU fp16 becomes fp32, and so does a checkpoint's bf16 where the CPU has no instructions for it and nobody
    asked for it: a matrix product is emulated there, tens of times slower (`benchmarks/bf16_on_cpu.py`).
    """
    wanted = dtype if dtype is not None else config.dtype or config.get_text_config().dtype or torch.float32
    resolved = parse_dtype(wanted)
    if device.type != "cpu":
        return resolved
    emulated = resolved is torch.bfloat16 and dtype is None and not cpu_has_bf16()
    return torch.float32 if emulated or resolved is torch.float16 else resolved


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices itself."""
    ask = getattr(torch.cpu, "get_capabilities", None)  # torch 2.11 cannot be asked
    known = ask() if ask is not None else {}
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


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
    "resolve_dtype",
]
