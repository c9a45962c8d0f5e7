"""Input embedding and output head that are one tensor: which keys they are, and how a model says that they are not.

A base with `tie_word_embeddings` stores one of the two. What an adapter does to one end is PEFT's to say: a module of
`modules_to_save`, or a LoRA, changes its own end only, unless `ensure_weight_tying` is set; a plain parameter that was
loaded into the base (PEFT's `save_embedding_layers`) changes both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.checkpoints.naming import normalised
from holdfast.checkpoints.tensor_file import TensorEntry

EMBEDDING, HEAD = ("embed_tokens", "weight"), ("lm_head", "weight")
_FLAG = "tie_word_embeddings"
_VOCABULARY = "vocab_size"


@dataclass(frozen=True, slots=True)
class Tied:
    """The two ends of a checkpoint that ties them. missing: the end that no file stores; its value is the other's."""

    embedding: str
    head: str
    missing: str | None

    def other(self, key: str) -> str | None:
        """The end that `key` is tied to; None where `key` is neither."""
        return {self.embedding: self.head, self.head: self.embedding}.get(key)


def find_tied(entries: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> Tied | None:
    """The tied pair of a checkpoint, or None: both ends are stored and the configuration does not tie them.

    A decoder without a head of its own can do nothing but tie, whatever its configuration (or a class's default) says.
    """
    found = {normalised(key): key for key in entries if normalised(key) in (EMBEDDING, HEAD)}
    embedding, head = found.get(EMBEDDING), found.get(HEAD)
    if embedding is not None and head is not None:
        return Tied(embedding, head, None) if is_tied_by_config(config) else None
    if embedding is not None:
        # Files of transformers 4 wrap the whole language model, those of version 5 only the decoder.
        name = "language_model.lm_head.weight" if embedding.startswith("language_model.model.") else "lm_head.weight"
        return Tied(embedding, name, name)
    if head is not None and is_tied_by_config(config):
        decoder = next((key for key in entries if normalised(key)[:1] == ("layers",)), None)
        if decoder is not None:
            name = f"{decoder.partition('layers.')[0]}embed_tokens.weight"
            return Tied(name, head, name)
    return None


def is_tied_by_config(config: Mapping[str, Any]) -> bool:
    """What a config.json says: its own flag, else its text decoder's. Without any it is the class's to say: False."""
    if _FLAG in config:
        return bool(config[_FLAG])
    text = config.get("text_config") or config.get("llm_config") or {}
    return bool(text.get(_FLAG)) if isinstance(text, Mapping) else False


def is_resized(key: str, new: Sequence[int], old: Sequence[int]) -> bool:
    """Whether `key` is an end of the vocabulary whose tensors differ in their rows alone: tokens were added or cut."""
    return normalised(key) in (EMBEDDING, HEAD) and tuple(new[1:]) == tuple(old[1:]) and len(new) == len(old) == 2


def resized_config(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """`config` of a model with `rows` tokens: `vocab_size` of the text decoder, and at the top where it is there."""
    found = dict(config)
    inside = [name for name in ("text_config", "llm_config") if isinstance(found.get(name), Mapping)]
    for name in inside:
        found[name] = {**found[name], _VOCABULARY: rows}
    if _VOCABULARY in found or not inside:
        found[_VOCABULARY] = rows
    return found


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` of a model whose two ends differ: the flag is off at every level that has one, and at the top."""

    def off(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {key: False if key == _FLAG else off(item) for key, item in value.items()}

    found: dict[str, Any] = off(config)
    return found | {
        _FLAG: False,
        # A text configuration without the flag has its class's default, which for some is True.
        **(
            {"text_config": {**found["text_config"], _FLAG: False}}
            if isinstance(found.get("text_config"), dict)
            else {}
        ),
    }


def set_vocabulary(config: Any, rows: int | None) -> None:
    """`rows` tokens in a configuration object of transformers; None leaves it as it is."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        if rows is not None and hasattr(part, _VOCABULARY):
            setattr(part, _VOCABULARY, rows)


def untie_in_memory(config: Any) -> None:
    """Switch tying off in a configuration object of transformers and in its parts, so that no later call ties again."""
    parts = [
        config,
        config.get_text_config(),
        *(getattr(config, name, None) for name in getattr(config, "sub_configs", {})),
    ]
    for part in parts:
        if part is not None and getattr(part, _FLAG, False):
            setattr(part, _FLAG, False)


__all__ = [
    "EMBEDDING",
    "HEAD",
    "Tied",
    "find_tied",
    "is_resized",
    "is_tied_by_config",
    "resized_config",
    "set_vocabulary",
    "untie_in_memory",
    "untied_config",
]
