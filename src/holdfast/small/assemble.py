"""Put the small LLaVA together: the embedded world's tower, a projector, SmolLM2 out of its GGUF, the alignment.

Done once per machine into a folder of the cache; what is there is checked and taken. The result is an ordinary
`LlavaForConditionalGeneration` folder with fp32 weights, which is what a CPU without bf16 computes in.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from holdfast.errors import ModelError
from holdfast.files import Lock, fsync_folder, require_space, sha256, storage_errors, write_json
from holdfast.small.source import GGUF_SHA256, gguf_path

Name = Literal["aligned", "base"]

PARTS = Path(__file__).parent / "parts"
PROJECTOR, ALIGNMENT, RECORD = "projector.safetensors", "alignment.safetensors", "assembled.json"
BYTES = 560_000_000
# Raised when the same parts give another folder.
LAYOUT = 1
IMAGE = "<image>"
# Code tokens that no chat uses; one of them becomes the token of a picture, so no embedding is added.
REPLACED = "<reponame>"

# As SmolLM2's own, without its default system message, and with no line break after "user": what was aligned is aligned
# to this.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}<|im_start|>{{ message['role'] }}"
    "{%- if message['role'] == 'assistant' -%}{{ '\n' }}{% generation %}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for part in message['content'] -%}{{ part['text'] }}{%- endfor -%}{%- endif -%}"
    "<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{%- else -%}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}<image>{{ '\n' }}{%- else -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}<|im_end|>{{ '\n' }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\n' }}{%- endif -%}"
)


def cache_folder() -> Path:
    """Where models are assembled: `$HOLDFAST_CACHE/small`, or `~/.cache/holdfast/small`."""
    base = os.environ.get("HOLDFAST_CACHE")
    if base:
        return Path(base).expanduser() / "small"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "holdfast" / "small"


def identity(name: Name, parts: Path = PARTS) -> str:
    """12 hex digits that change with whatever the assembled folder depends on.

    Raises: ModelError: a part is missing.
    """
    from holdfast.tiny import model_path as tiny_path

    used = [tiny_path("aligned") / "model.safetensors", parts / PROJECTOR]
    used += [parts / ALIGNMENT] if name == "aligned" else []
    for path in used:
        if not path.is_file():
            raise ModelError(
                f"The part {path} of the small world is missing; it comes with holdfast: install holdfast again, or "
                "make it with `python -m holdfast.small.build --out DIR` (an hour or two on two cores) and copy "
                f"DIR/*.safetensors to {parts}."
            )
    told = [str(LAYOUT), GGUF_SHA256, CHAT_TEMPLATE, *(sha256(path).hexdigest() for path in used)]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]


def model_path(name: Name = "aligned", *, cache: Path | str | None = None, parts: Path = PARTS) -> Path:
    """Folder of the assembled model: "aligned" (theta_0 of the small stream) or "base" (before its alignment).

    cache: folder for assembled models; None: `cache_folder()`. Assembling needs the extra `small`, about 0.6 GB of disk
    and 1.5 GB of memory; a folder that is whole is taken as it is, one that is not is made again.

    Raises: ModelError: no such model, the extra is not installed or of another version, a part is missing.
        StorageError: no room, or the cache cannot be written.
    """
    if name not in ("aligned", "base"):
        raise ModelError(f"There is no small model {name!r}; there are 'aligned' and 'base'.")
    place = Path(cache).expanduser() if cache is not None else cache_folder()
    folder = place / f"{name}-{identity(name, parts)}"
    if is_whole(folder):
        return folder
    source = gguf_path()
    require_space(place, BYTES, "The small world's model")
    with _locked(place / f"{folder.name}.lock"):
        if not is_whole(folder):  # another process may have made it meanwhile
            _into(folder, source, name, parts)
    return folder


def is_whole(folder: Path) -> bool:
    """Whether a cache folder is complete: each file that its record names has the size that it was written with."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        files = record["files"]
        return bool(files) and all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process assembles, the others wait for it (a minute or two)."""
    busy = f"{path.parent}: another process has been assembling the model for ten minutes; try again when it is done."
    until = time.monotonic() + 600
    while True:
        try:
            lock = Lock(path, busy=busy, error=ModelError)
            break
        except ModelError:
            if time.monotonic() > until:
                raise
            time.sleep(1)
    with lock:
        yield


def _into(folder: Path, source: Path, name: Name, parts: Path) -> None:
    with storage_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with storage_errors(folder):
            write_model(unfinished, source, name, parts)
            files = {p.name: p.stat().st_size for p in sorted(unfinished.iterdir())}
            write_json(unfinished / RECORD, {"made_from": source.name, "sha256": GGUF_SHA256, "files": files})
            unfinished.chmod(0o755)
            if folder.exists():  # half of one, or a damaged one
                shutil.rmtree(folder)
            unfinished.rename(folder)
            fsync_folder(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_model(folder: Path, source: Path, name: Name, parts: Path) -> None:
    """Write model, processor and chat template of `name` into `folder`. source: the GGUF.

    Raises: ModelError: the GGUF cannot be read. OSError, SafetensorError: the folder cannot be written.
    """
    from safetensors.torch import load_file, save_file

    from holdfast.checkpoints.hub_names import hub_names
    from holdfast.tiny import model_path as tiny_path

    language, tokenizer = read_gguf(source)
    config = llava_config(language.config, tokenizer)
    tensors = {f"model.language_model.{key}": value for key, value in language.model.state_dict().items()}
    if name == "aligned":
        merge_alignment(tensors, load_file(parts / ALIGNMENT))
    tower = load_file(tiny_path("aligned") / "model.safetensors")
    tensors |= {f"model.{k}": v.float() for k, v in tower.items() if k.startswith("vision_tower.")}
    tensors |= {f"model.multi_modal_projector.{k}": v.float() for k, v in load_file(parts / PROJECTOR).items()}
    told = config.to_dict()
    names = hub_names(tensors, told)
    config.save_pretrained(folder)
    save_file(
        {names[key]: value.contiguous() for key, value in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False},
    )
    make_processor(tokenizer).save_pretrained(folder)


def read_gguf(source: Path) -> tuple[Any, Any]:
    """(language model in fp32, tokenizer with the token of a picture) of the GGUF.

    Raises: ModelError: transformers cannot read it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from holdfast.models.settings import quiet_transformers

    try:
        with quiet_transformers():
            language: Any = AutoModelForCausalLM.from_pretrained(
                source.parent, gguf_file=source.name, dtype=torch.float32, local_files_only=True
            )
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        raise ModelError(f"{source} cannot be read by the installed transformers and gguf: {error}") from error
    return language.eval().requires_grad_(False), make_tokenizer(source)


def make_tokenizer(source: Path) -> Any:
    """SmolLM2's tokenizer with `<image>` in the place of a token that no chat uses; 49,152 tokens as before.

    Raises: ModelError: transformers cannot read it.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from holdfast.models.settings import quiet_transformers

    try:
        with quiet_transformers():
            read: Any = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        raise ModelError(f"The tokenizer of {source} cannot be read: {error}") from error
    told = json.loads(read.backend_tokenizer.to_str())
    vocabulary = told["model"]["vocab"]
    number = vocabulary.pop(REPLACED)
    vocabulary[IMAGE] = number
    told["added_tokens"] = [one for one in told["added_tokens"] if one["id"] != number]
    told["added_tokens"].append(
        {"id": number, "content": IMAGE, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
    )  # fmt: skip
    told["added_tokens"].sort(key=lambda one: one["id"])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(told)),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens={"image_token": IMAGE},
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        chat_template=CHAT_TEMPLATE,
    )


def llava_config(language: Any, tokenizer: Any) -> Any:
    """The configuration of the whole: the embedded tower, the language model's own sizes."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    from holdfast.tiny import model_path as tiny_path
    from holdfast.tiny import tokenizer as tiny_tokenizer

    tower = json.loads((tiny_path("aligned") / "config.json").read_text(encoding="utf-8"))["vision_config"]
    text = {k: v for k, v in language.to_dict().items() if k not in _NOT_KEPT}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**{k: v for k, v in tower.items() if k not in _NOT_KEPT}),
        text_config=LlamaConfig(**text),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=tiny_tokenizer.IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = "float32"
    return config


_NOT_KEPT = ("quantization_config", "_name_or_path", "architectures", "dtype", "transformers_version", "model_type")


def make_processor(tokenizer: Any) -> Any:
    """A LLaVA processor: SmolLM2's tokenizer and the picture size of the embedded world."""
    from transformers import LlavaProcessor

    from holdfast.tiny.tokenizer import make_processor as tiny_processor

    tiny = tiny_processor()
    return LlavaProcessor(
        image_processor=tiny.image_processor,
        tokenizer=tokenizer,
        patch_size=tiny.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    )


def merge_alignment(tensors: dict[str, Any], alignment: dict[str, Any]) -> None:
    """Add the alignment to the language model's weights in place.

    tensors: `model.language_model.NAME.weight` (out, in). alignment: `NAME.lora_A` (r, in) and `NAME.lora_B` (out, r),
    whose product is the whole change (the scale is in it).

    Raises: ModelError: a layer that the language model does not have.
    """
    for key, low in alignment.items():
        layer, _, side = key.rpartition(".")
        if side != "lora_A":
            continue
        name = f"model.language_model.{layer}.weight"
        if name not in tensors or f"{layer}.lora_B" not in alignment:
            raise ModelError(
                f"The alignment changes {layer}, which the language model does not have; reinstall holdfast."
            )
        tensors[name] = tensors[name] + alignment[f"{layer}.lora_B"].float() @ low.float()
