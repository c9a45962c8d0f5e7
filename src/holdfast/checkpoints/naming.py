"""One layer, many spellings: match module names across checkpoints without importing a model library.

transformers renames on load and save: a LLaVA file from 2023 says `language_model.model.layers.0...`, the module in
memory is `model.language_model.layers.0...`, a Qwen2-VL file says `model.layers.0...`. All that differs is wrappers
around the decoder and the tower, and their order. Two names match when they agree without the wrappers; if that leaves
more than one candidate it is an error, never a guess.
"""

from __future__ import annotations

from collections.abc import Iterable

from holdfast.errors import CheckpointError, nearest

# Path components that wrap a decoder or a tower and carry no identity of their own.
_PARALLEL = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})
_WRAPPERS = _PARALLEL | frozenset(
    {"base_model", "model", "module", "language_model", "text_model", "vision_model", "thinker"}
)
_PEFT_PREFIX = "base_model.model."


def strip_peft_prefix(key: str) -> str:
    """`base_model.model.` removed, once; PEFT puts it before every key of an adapter file.

    What FSDP, activation checkpointing, torch.compile and data parallelism put into names goes too: a file that was
    saved from within them names the same modules.
    """
    return strip_wrappers(key).removeprefix(_PEFT_PREFIX)


def strip_wrappers(key: str) -> str:
    """`key` without the components that FSDP, activation checkpointing, torch.compile and data parallelism add."""
    parts = [part for part in key.split(".") if part not in _PARALLEL]
    while parts[:1] == ["module"] and len(parts) > 1:
        parts = parts[1:]
    return ".".join(parts)


def normalised(name: str) -> tuple[str, ...]:
    """The components of a dotted name that are not wrappers."""
    return tuple(part for part in name.split(".") if part not in _WRAPPERS)


class NameIndex:
    """Finds the key of a checkpoint that means a given module or parameter name."""

    def __init__(self, keys: Iterable[str], *, what: str) -> None:
        self.keys = frozenset(keys)
        self._what = what
        self._by_parts: dict[tuple[str, ...], list[str]] = {}
        for key in sorted(self.keys):
            self._by_parts.setdefault(normalised(key), []).append(key)

    def find(self, name: str) -> str | None:
        """The key equal to `name`, else the only one that agrees without wrappers, else None.

        Raises: CheckpointError: several keys agree.
        """
        if name in self.keys:
            return name
        matches = self._by_parts.get(normalised(name), [])
        if len(matches) > 1:
            raise CheckpointError(
                f"{name} could be any of {', '.join(matches)} in {self._what}; rename the layer so that one is left."
            )
        return matches[0] if matches else None

    def require(self, name: str, *, error: type[CheckpointError] = CheckpointError) -> str:
        """Like `find`; a missing name is an `error` that shows the nearest key.

        Raises: `error`: no tensor of this name.
        """
        key = self.find(name)
        if key is None:
            hint = nearest(name, self.keys)
            suggestion = f" The nearest is {hint}." if hint else ""
            raise error(f"{self._what} has no tensor for {name}.{suggestion} Do both descend from one base model?")
        return key
