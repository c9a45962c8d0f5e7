"""Tokenizer, chat template and processor that lie in an adapter's folder: they win over the base's.

A tuning may add tokens, change the template or the picture size, and trainers save what they used beside the adapter.
The adapter's numbers only mean something with them. Groups of files go together: a vocabulary of one folder with the
added tokens of another would be a third tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from holdfast.checkpoints.reader import read_json
from holdfast.errors import CheckpointError
from holdfast.files import parse_json

TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
_VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"),
    "tekken.json",
)
_TOKENIZER = (*_VOCABULARIES, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "merges.txt")
_TEMPLATES = (TEMPLATE_FILE, "chat_template.json", "additional_chat_templates")
PROCESSOR_CONFIG, IMAGE_CONFIG = "processor_config.json", "preprocessor_config.json"
GENERATION_CONFIG = "generation_config.json"
_PROCESSOR = (PROCESSOR_CONFIG, IMAGE_CONFIG, "video_preprocessor_config.json")

# A file or folder to be copied, or the content of a file.
Content = Path | bytes


def overlay(contents: Mapping[str, Content], adapters: Iterable[Path]) -> dict[str, Content]:
    """`contents` (name -> file) of a base with what the adapters' folders say, in order; the last wins.

    Raises: CheckpointError: a damaged JSON file.
    """
    found = dict(contents)
    for folder in adapters:
        own = {name: folder / name for name in (*_TOKENIZER, *_TEMPLATES, *_PROCESSOR) if (folder / name).exists()}
        if any(name in own for name in _VOCABULARIES):
            found = {name: content for name, content in found.items() if name not in _TOKENIZER}
        template = _inner_template(own)
        if template is not None or any(name in own for name in _TEMPLATES):
            found = {name: content for name, content in found.items() if name not in _TEMPLATES}
        if IMAGE_CONFIG in own and PROCESSOR_CONFIG in found and PROCESSOR_CONFIG not in own:
            found[PROCESSOR_CONFIG] = _without_images(found[PROCESSOR_CONFIG])
        if PROCESSOR_CONFIG in own and IMAGE_CONFIG not in own and "image_processor" in _read(own[PROCESSOR_CONFIG]):
            found.pop(IMAGE_CONFIG, None)
        found |= own
        if template is not None and not any(name in own for name in _TEMPLATES):
            # The processor's template comes from this file; from a tokenizer's configuration only where it has none.
            found[TEMPLATE_FILE] = template.encode()
    return found


def fill_missing(contents: Mapping[str, Content], lent: Mapping[str, Content]) -> dict[str, Content]:
    """`contents` of a model's folder with the tokenizer, template and processor of `lent` where it has none.

    People save the weights of a tuned model alone. A tokenizer counts as there when its vocabulary is.
    """
    found = dict(contents)
    for _, files in _missing_parts(contents, lent):
        found |= {name: content for name, content in lent.items() if name in files and name not in contents}
    return found


def describe_missing(
    contents: Mapping[str, Content], lent: Mapping[str, Content], whose: str, lender: str
) -> list[str]:
    """A sentence that says what of the settings `whose` folder lacks and gets from `lender`."""
    parts = [what for what, _ in _missing_parts(contents, lent)]
    return [f"{', '.join(parts)}: {whose} has none, so {lender} is used"] if parts else []


def lacks_settings(contents: Mapping[str, Content]) -> bool:
    """Whether a model's folder has no vocabulary, or no processor's configuration."""
    return not any(name in contents for name in _VOCABULARIES) or not any(
        name in contents for name in (PROCESSOR_CONFIG, IMAGE_CONFIG)
    )


def _missing_parts(contents: Mapping[str, Content], lent: Mapping[str, Content]) -> list[tuple[str, tuple[str, ...]]]:
    """(what, its files) of each part that `contents` lacks and `lent` has."""
    files = {name: content for name, content in contents.items() if isinstance(content, Path)}
    has_template = any(name in contents for name in _TEMPLATES) or _inner_template(files) is not None
    lacking = (
        ("tokenizer", _TOKENIZER, not any(name in contents for name in _VOCABULARIES)),
        ("chat template", _TEMPLATES, not has_template),
        ("processor", _PROCESSOR, not any(name in contents for name in (PROCESSOR_CONFIG, IMAGE_CONFIG))),
        ("generation settings", (GENERATION_CONFIG,), GENERATION_CONFIG not in contents),
    )
    return [(what, names) for what, names, lacks in lacking if lacks and any(name in lent for name in names)]


def has_settings(folder: Path) -> bool:
    """Whether an adapter's folder has any tokenizer, template or processor file of its own."""
    return any((folder / name).exists() for name in (*_TOKENIZER, *_TEMPLATES, *_PROCESSOR))


def describe_overlay(contents: Mapping[str, Content], adapters: Iterable[Path]) -> list[str]:
    """Sentences that say what of the base's settings an adapter's folder replaces by something else."""
    before = {name: _bytes(content) for name, content in contents.items()}
    after = {name: _bytes(content) for name, content in overlay(contents, adapters).items()}
    differs = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    parts = [
        what
        for what, files in (("tokenizer", _TOKENIZER), ("chat template", _TEMPLATES), ("processor", _PROCESSOR))
        if differs & set(files)
    ]
    return [f"{', '.join(parts)}: the adapter's folder has its own, which the result gets"] if parts else []


def _inner_template(own: Mapping[str, Path]) -> str | None:
    """The chat template inside a configuration, as transformers 4 saved it."""
    for name in (PROCESSOR_CONFIG, TOKENIZER_CONFIG):
        template = _read(own[name]).get("chat_template") if name in own else None
        if isinstance(template, list):
            named = {item.get("name"): item.get("template") for item in template if isinstance(item, Mapping)}
            template = named.get("default")
        if isinstance(template, str) and template:
            return template
    return None


def _without_images(content: Content) -> bytes:
    config = _read(content)
    config.pop("image_processor", None)
    return json.dumps(config, indent=2, ensure_ascii=False).encode()


def _read(content: Content) -> dict[str, Any]:
    if isinstance(content, Path):
        return read_json(content, "settings of a tokenizer or processor")
    found = parse_json(content, "settings of a tokenizer or processor", error=CheckpointError)
    if not isinstance(found, dict):
        raise CheckpointError(f"Settings of a tokenizer or processor are a {type(found).__name__}; expected an object.")
    return found


def _bytes(content: Content) -> bytes:
    if isinstance(content, bytes):
        return content
    if content.is_dir():
        return b"".join(path.name.encode() + path.read_bytes() for path in sorted(content.rglob("*")) if path.is_file())
    return content.read_bytes()


__all__ = [
    "Content",
    "describe_missing",
    "describe_overlay",
    "fill_missing",
    "has_settings",
    "lacks_settings",
    "overlay",
]
