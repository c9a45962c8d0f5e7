"""Checkpoint -> model and processor. A folder or hub id, with PEFT adapters merged on top; never remote code."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import logging as transformers_logging

from holdfast.bounds import bounded, no_panic
from holdfast.checkpoints.adapter import CONFIG_FILE, INPUT_SCALE_FILE, LoraAdapter
from holdfast.checkpoints.adapter_settings import describe_missing, fill_missing, has_settings, overlay
from holdfast.checkpoints.contents import (
    ADAPTER_WEIGHTS,
    INDEX_FILE,
    SINGLE_FILE,
    require_model_folder,
    require_safe_adapter,
)
from holdfast.checkpoints.merged import MergedCheckpoint, add_updates, locate
from holdfast.checkpoints.naming import NameIndex, normalised
from holdfast.checkpoints.patterns import try_patterns
from holdfast.checkpoints.reader import CheckpointReader, has_wrapped_names, read_json
from holdfast.checkpoints.rewrite import copy_contents, side_contents
from holdfast.checkpoints.sizes import require_plausible_sizes
from holdfast.checkpoints.support import quantisation_kind
from holdfast.checkpoints.tensor_file import TensorFile
from holdfast.checkpoints.tied import EMBEDDING, HEAD, untie_in_memory
from holdfast.checkpoints.value import Source, as_checkpoint
from holdfast.errors import AdapterError, CheckpointError, ModelError
from holdfast.models.families import build_processors_without_video, family_of
from holdfast.models.foreign_settings import require_bounded
from holdfast.models.loaded import BlockStore, LoadedModel
from holdfast.models.memory import find_device, usable_bytes
from holdfast.models.tuner import attach_tuner, is_tuner_folder
from holdfast.models.widened import widen_while_running

# Matching and loading take seconds; a pattern that never ends is stopped.
PEFT_SECONDS = 300.0

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
            raise ModelError(f"{base}: the weights cannot be loaded: {_shown(error)}") from error
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


def _resize_for(model: Any, adapter: LoraAdapter, base: str) -> None:
    """Give the model the adapter's vocabulary. Raises AdapterError: one end of it would be left with random rows."""
    ends = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    rows = ends[0].weight.shape[0]
    saved = {normalised(name) for name in adapter.saved} & {EMBEDDING, HEAD}
    tied = len({id(module.weight) for module in ends}) == 1
    if adapter.vocabulary not in (None, rows) and not tied and len(saved) == 1:
        raise AdapterError(
            f"{adapter.folder} resizes one end of the vocabulary only ({adapter.vocabulary} rows, {base} has {rows}). "
            "Save the adapter with both (`save_embedding_layers=True`), or merge it into its base with the tool that "
            "trained it."
        )
    resize_vocabulary(model, adapter.vocabulary)


def resize_vocabulary(model: Any, rows: int | None) -> None:
    """Give a model `rows` tokens, where it has another number; None leaves it as it is. New rows are zeros."""
    if rows is None or rows == model.get_input_embeddings().weight.shape[0]:
        return
    with quiet_transformers():
        model.resize_token_embeddings(rows, mean_resizing=False)


def checkpoint_name(source: Source) -> str:
    """What errors and records call a checkpoint."""
    return str(as_checkpoint(source))


def read_config(base: str) -> Any:
    """The configuration of a vision-language checkpoint. Raises ModelError where it is none."""
    path = Path(base)
    require_model_folder(path)
    if path.exists() and not (path / "config.json").is_file():
        raise ModelError(f"{base} has no config.json; expected the folder of a saved transformers model.")
    if path.exists():
        # Before transformers reads it: of a bounded size and depth.
        read_json(path / "config.json", "a model's config.json")
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
    except MemoryError:
        raise
    except Exception as error:
        raise ModelError(f"{base}: config.json cannot be used: {_shown(error)}") from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ModelError(
            f"{base} is a {config.model_type!r} model without a vision tower; expected an image-text-to-text model "
            "such as LLaVA, Qwen2.5-VL or InternVL (`holdfast list families`)."
        )
    if path.is_dir():
        require_plausible_sizes(config.to_dict(), path)
    return config


def read_processor(
    base: str, config: Any | None = None, adapters: Sequence[str] = (), *, settings: str | None = None
) -> Any:
    """The processor of a checkpoint, with PIL images, a chat template and a padding token.

    adapters: folders on top of the base; a tokenizer, template or processor that one of them has wins over the base's.
    settings: a folder or hub id whose own serve where the base has none.

    Raises: ModelError: no processor, or a tokenizer with more tokens than the model has embeddings.
    """
    folders = [locate(adapter) for adapter in adapters if not is_tuner_folder(adapter)]
    has_own = any(has_settings(folder) for folder in folders)
    lent = {} if settings is None else side_contents(locate(settings))
    if not has_own and not (lent and describe_missing(side_contents(locate(base)), lent, base, "the other's")):
        return _read_processor(base, config)
    with tempfile.TemporaryDirectory(prefix="holdfast-settings-") as place:
        own = fill_missing(side_contents(locate(base)), lent)
        copy_contents(overlay(own, folders), Path(place))
        processor = _read_processor(place, read_config(base) if config is None else config, name=base)
    if not has_own:
        return processor
    rows = _vocabulary(folders) or (config or read_config(base)).get_text_config().vocab_size
    if len(processor.tokenizer) > rows:
        raise ModelError(
            f"{' + '.join((base, *adapters))}: the tokenizer knows {len(processor.tokenizer)} tokens and the model has "
            f"{rows} embeddings. The embeddings were resized for this tuning and are not here; merge the adapter into "
            "its base with the tool that trained it."
        )
    return processor


def _vocabulary(folders: Sequence[Path]) -> int | None:
    """Tokens of the last adapter that brings embeddings of its own, or None."""
    rows = None
    for folder in folders:
        try:
            adapter = LoraAdapter(folder)
        except AdapterError:
            continue  # whoever merges it says why it cannot be
        rows = adapter.vocabulary or rows
        adapter.close()
    return rows


def _read_processor(place: str, config: Any | None, *, name: str | None = None) -> Any:
    """The processor whose files are in `place`. name: what errors call it."""
    base = place if name is None else name
    config = read_config(base) if config is None else config
    build_processors_without_video()
    try:
        # The PIL backend everywhere: torchvision resizes a little differently, and is not always there.
        with no_panic(f"The tokenizer of {base}", error=ModelError):
            processor = AutoProcessor.from_pretrained(place, trust_remote_code=False, backend="pil")
    except (MemoryError, ModelError):
        raise
    except Exception as error:
        # tokenizers raises Exception itself.
        raise ModelError(
            f"{base}: the processor cannot be loaded; expected processor_config.json or preprocessor_config.json and "
            f"the tokenizer's files beside the weights: {_shown(error)}. Where they are missing, copy them from the "
            "model that this one was tuned from, or name that one with `--processor` (`evaluate`, `gate`)."
        ) from error
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise ModelError(
            f"{base}: {type(processor).__name__} has no image processor beside its tokenizer; expected the processor "
            "of a vision-language model (processor_config.json and preprocessor_config.json)."
        )
    require_bounded(processor, base)
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

    LoRA in all its kinds (`checkpoints.support`) is added exactly, with the input-scaling vectors of a holdfast edit
    where the folder holds them; an adapter of another kind (IA3, ...) is merged by PEFT.

    Raises: AdapterError: no adapter there, tensors missing, unknown target modules, or nothing that it changes.
    """
    folder = locate(adapter)
    extra = require_safe_adapter(folder)  # before PEFT sees it: PEFT would unpickle
    try:
        plain = LoraAdapter(folder)
    except AdapterError:
        # A kind that is no LoRA, or a damaged one: PEFT merges the first, and names the damage of the second.
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
    _resize_for(model, adapter, base)
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
                f"in {base}; only an embedding or a head may have another number of rows. The adapter was trained on "
                "another model."
            )
        parameters[key].data.copy_(value)
    done = set()
    for module, key in matched.items():
        if adapter.changes_one_end(module):
            _give_own_parameter(model, key, parameters)
        weight = parameters[key]
        if id(weight) in done:  # the other end of a pair that the adapter keeps tied
            continue
        done.add(id(weight))
        if module in adapter.dense:
            weight.data.copy_(adapter.apply_dense(module, weight.data))
            continue
        entry = adapter.modules[module]
        if tuple(weight.shape) != (entry.shape[::-1] if entry.transposed else entry.shape):
            raise AdapterError(
                f"{adapter.folder} updates {module} as {entry.shape}, but it is {tuple(weight.shape)} in {base}; the "
                "adapter was trained on another model."
            )
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
            # PEFT matches the configuration's patterns with every module's name, and reads its files.
            place = Path(adapter) / CONFIG_FILE
            try_patterns(
                read_json(place, "a PEFT configuration"), [name for name, _ in model.named_modules()], where=str(place)
            )
            TensorFile(Path(adapter) / ADAPTER_WEIGHTS).close()
            with bounded(f"{adapter}: loading it with PEFT", seconds=PEFT_SECONDS, error=AdapterError):
                wrapped = PeftModel.from_pretrained(model, adapter)
    except (AdapterError, MemoryError):
        raise
    except Exception as error:
        raise AdapterError(f"{adapter} does not fit {base}: {_shown(error)}") from error
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
    """The accelerator where there is one, else the CPU. One process uses one device; that there are more is said."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and (count := torch.accelerator.device_count()) > 1:
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        if alone:
            _say_one_device(accelerator.type, count)
    return accelerator or torch.device("cpu")


@cache
def _say_one_device(kind: str, count: int) -> None:
    logging.getLogger("holdfast").warning(
        f"{count} {kind} devices are in sight; this process uses one of them, which CUDA_VISIBLE_DEVICES chooses. "
        "`holdfast run`, `calibrate` and `evaluate` use all under `accelerate launch`."
    )


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


def stays_narrow(base: str, dtype: torch.dtype | str | None, config: Any, device: torch.device) -> torch.dtype | None:
    """The 16-bit type in which weights stay in memory while fp32 is computed with; None where they are widened whole.

    That is where nobody asked for a type, fp32 is chosen for a 16-bit checkpoint, and it would not fit.
    """
    wide = resolve_dtype(dtype, config, device)
    stored = config.dtype or config.get_text_config().dtype
    if dtype is not None or wide is not torch.float32 or stored not in (torch.bfloat16, torch.float16):
        return None
    try:
        with CheckpointReader(locate(base)) as reader:
            elements = sum(entry.numel for entry in reader.entries.values())
    except CheckpointError:
        return None  # whoever loads it says what is wrong
    return stored if elements * wide.itemsize > usable_bytes(device) else None


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices itself."""
    ask = getattr(torch.cpu, "get_capabilities", None)  # torch 2.11 cannot be asked
    known = ask() if ask is not None else {}
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


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


def _shown(error: BaseException) -> str:
    """The text of an error of another library, with its kind where the text alone says nothing."""
    text = str(error)
    return text if isinstance(error, OSError | ValueError | RuntimeError) else f"{type(error).__name__}: {text}"


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
