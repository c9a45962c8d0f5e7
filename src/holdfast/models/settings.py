"""What a folder says of its model beside the weights: configuration, tokenizer, template, processor."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import logging as transformers_logging

from holdfast.bounds import no_panic
from holdfast.checkpoints.adapter import LoraAdapter
from holdfast.checkpoints.adapter_settings import describe_missing, fill_missing, has_settings, overlay
from holdfast.checkpoints.contents import (
    require_model_folder,
)
from holdfast.checkpoints.merged import locate
from holdfast.checkpoints.reader import read_json
from holdfast.checkpoints.rewrite import copy_contents, side_contents
from holdfast.checkpoints.sizes import require_plausible_sizes
from holdfast.checkpoints.value import Source, as_checkpoint
from holdfast.errors import AdapterError, ModelError
from holdfast.models.families import build_processors_without_video, family_of
from holdfast.models.foreign_settings import require_bounded
from holdfast.models.tuner import is_tuner_folder


def checkpoint_name(source: Source) -> str:
    """What errors and records call a checkpoint."""
    return str(as_checkpoint(source))


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
        raise ModelError(f"{base}: config.json cannot be used: {shown(error)}") from error
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
            f"the tokenizer's files beside the weights: {shown(error)}. Where they are missing, copy them from the "
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


def shown(error: BaseException) -> str:
    """The text of an error of another library, with its kind where the text alone says nothing."""
    text = str(error)
    return text if isinstance(error, OSError | ValueError | RuntimeError) else f"{type(error).__name__}: {text}"
