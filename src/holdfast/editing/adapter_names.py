"""An adapter under the names that present transformers and PEFT give its modules.

An adapter of transformers 4 says `model.layers.0...` where a model in memory now has
`model.language_model.layers.0...`, and one that was saved from within FSDP or torch.compile has their wrappers in its
names. PEFT matches no module of either, and serves the base unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.checkpoints.adapter import LoraAdapter
from holdfast.checkpoints.naming import NameIndex
from holdfast.errors import AdapterError

_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class PresentNames:
    """modules: as the adapter calls them -> as they are called now. keys: of its file -> to be written.

    config: adapter_config.json to be written, or None where the adapter's own serves.
    """

    modules: Mapping[str, str]
    keys: Mapping[str, str]
    config: Mapping[str, Any] | None

    @property
    def renamed(self) -> dict[str, str]:
        """Keys that are written under another name."""
        return {old: new for old, new in self.keys.items() if old != new}


def present_names(lora: LoraAdapter, base: Path, known: Collection[str]) -> PresentNames:
    """How an adapter of a model in `base` is to be written.

    known: names that modules of the model surely have, such as those of a calibration; only where the adapter has
        others is a model built (without weights) to ask.

    Raises: AdapterError: a module that the model does not have, or has twice.
    """
    modules = {module: module for module, _ in lora.parts.values()}
    if not modules.keys() <= set(known):
        from holdfast.models.built import module_names

        index = NameIndex(module_names(base), what=f"the model in {base}")
        modules = {module: index.require(module, error=AdapterError) for module in modules}
    keys = {key: f"{_PREFIX}{modules[module]}.{tail}" for key, (module, tail) in lora.parts.items()}
    if len(set(keys.values())) < len(keys):
        twice = next(key for key in keys if list(keys.values()).count(keys[key]) > 1)
        raise AdapterError(f"{lora.folder} holds {keys[twice]} under two names, one of them {twice}; leave one.")
    moved = any(old != new for old, new in modules.items())
    return PresentNames(modules=modules, keys=keys, config=_config(lora, modules) if moved else None)


def _config(lora: LoraAdapter, modules: Mapping[str, str]) -> dict[str, Any]:
    """The adapter's configuration with whole present names in place of patterns that fit the old ones."""
    config = dict(lora.config)
    owners = sorted([*lora.modules, *lora.dense])
    tokens = {name for name in owners if name in lora.dense and lora.dense[name].kind == "tokens"}
    config["target_modules"] = [modules[name] for name in owners if name not in tokens]
    for field in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if field in config:
            config[field] = None
    own = {modules[name]: lora.rank_and_alpha(name) for name in owners if name not in tokens}
    default = (config["r"], config["lora_alpha"])
    config["rank_pattern"] = {re.escape(name): rank for name, (rank, _) in own.items() if rank != default[0]}
    config["alpha_pattern"] = {re.escape(name): alpha for name, (_, alpha) in own.items() if alpha != default[1]}
    if config.get("modules_to_save"):
        config["modules_to_save"] = [modules.get(name, name) for name in config["modules_to_save"]]
    if isinstance(config.get("trainable_token_indices"), Mapping):
        given = config["trainable_token_indices"]
        config["trainable_token_indices"] = {modules.get(name, name): rows for name, rows in given.items()}
    return config


__all__ = ["PresentNames", "present_names"]
