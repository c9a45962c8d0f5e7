"""`adapter_config.json` as every loader takes it, and the same bytes in every process.

PEFT keeps `target_modules` as a set and writes it in hash order, may shorten a list of layers to a regular expression,
and leaves out what `AutoPeftModel` needs to find the class of the base. A server reads this file without the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from holdfast.checkpoints.adapter import CONFIG_FILE, LoraAdapter
from holdfast.checkpoints.contents import ADAPTER_WEIGHTS
from holdfast.checkpoints.hub_names import memory_name
from holdfast.checkpoints.naming import normalised
from holdfast.checkpoints.reader import read_json
from holdfast.errors import AdapterError
from holdfast.files import write_json

# Lists of an adapter's configuration whose order means nothing.
_UNORDERED = ("target_modules", "modules_to_save", "exclude_modules", "layers_to_transform")
# Ranks up to which vLLM can be told to make room (`--max-lora-rank`), and the one that it makes room for unasked.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_RANK = 16


def hub_id(source: str | None) -> str | None:
    """The hub id that names a checkpoint, or None where only a place on this machine does.

    A folder of the hub's cache (`models--ORG--NAME`) says its id itself; what exists here or is written as a path is a
    place.
    """
    if not source:
        return None
    for part in PurePath(source).parts:
        if part.startswith("models--") and part.count("--") >= 1:
            return part.removeprefix("models--").replace("--", "/")
    parts = source.split("/")
    plain = len(parts) == 2 and all(part and not part.startswith((".", "~")) for part in parts) and "\\" not in source
    return source if plain and not Path(source).exists() else None


def known_base(*sources: str | None) -> str | None:
    """The first hub id among `sources`, else the first of them that says anything."""
    named = [source for source in sources if source]
    return next((found for source in named if (found := hub_id(source))), named[0] if named else None)


def auto_mapping(config: Mapping[str, Any]) -> dict[str, str] | None:
    """What `AutoPeftModel` needs to build the base, from its config.json; None where it names no class."""
    architectures, kind = config.get("architectures") or (), config.get("model_type")
    if not architectures or not kind:
        return None
    module = str(kind).replace("-", "_")
    return {"base_model_class": architectures[0], "parent_library": f"transformers.models.{module}.modeling_{module}"}


def settle_adapter_config(
    folder: Path, *, base: str | None = None, base_config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Rewrite the `adapter_config.json` of an adapter in place, and return it: one file for every loader and process.

    Lists are sorted; a pattern of `target_modules` becomes the list of the modules that the weights are for (PEFT
    matches a full name exactly). base: where the base is, or its hub id; an id is preferred, the adapter's own record
    counts. base_config: config.json of the base, for `auto_mapping` where the adapter has none. An adapter of another
    kind than LoRA keeps its keys and its pattern.

    Raises: AdapterError, CheckpointError: a file that cannot be read.
    """
    path = folder / CONFIG_FILE
    config = read_json(path, "a PEFT configuration")
    lora = str(config.get("peft_type", "LORA")).upper() == "LORA"
    if lora and isinstance(config.get("target_modules"), str) and (folder / ADAPTER_WEIGHTS).is_file():
        adapter = LoraAdapter(folder)
        try:
            # PEFT matches them with the modules in memory, whatever the weights are called.
            factored = [*adapter.modules, *(name for name, update in adapter.dense.items() if update.kind != "tokens")]
            config["target_modules"] = sorted(memory_name(name, base_config or {}) for name in factored)
        finally:
            adapter.close()
        config |= {key: None for key in ("layers_to_transform", "layers_pattern") if key in config}
    for key in _UNORDERED:
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    for key in ("rank_pattern", "alpha_pattern") if lora else ():
        # Kept in their order: PEFT takes the first pattern that matches. Other kinds know neither and warn of both.
        config.setdefault(key, {})
    config["base_model_name_or_path"] = known_base(config.get("base_model_name_or_path"), base)
    if base_config is not None and not config.get("task_type") and not config.get("auto_mapping"):
        config["auto_mapping"] = auto_mapping(base_config)
    config["inference_mode"] = True
    write_json(path, dict(sorted(config.items())))
    return config


def is_decoder_module(name: str) -> bool:
    """Whether a module belongs to the text decoder, whose LoRA every server applies."""
    parts = normalised(name)
    return (len(parts) > 2 and parts[0] == "layers" and parts[1].isdigit()) or parts[:1] in (
        ("embed_tokens",),
        ("lm_head",),
    )


def max_lora_rank(rank: int) -> int | None:
    """The least `--max-lora-rank` that makes room for `rank`; None where vLLM has no room for it."""
    return next((bound for bound in VLLM_RANKS if rank <= bound), None)


def what_vllm_drops(adapter: LoraAdapter) -> list[str]:
    """Sentences on each part of an adapter that vLLM leaves out or applies otherwise; [] where it serves it exactly.

    The share of each part is of the adapter's squared update, sum of ||s B A||_F^2 over its modules.
    """
    found = []
    outside = [name for name in adapter.modules if not is_decoder_module(name)]
    if outside:
        sizes = {name: squared_update(adapter, name) for name in adapter.modules}
        total = sum(sizes.values())
        share = sum(sizes[name] for name in outside) / total if total else 0.0
        found.append(
            f"{len(outside)} of {len(adapter.modules)} modules lie outside the text decoder ({outside[0]}); vLLM "
            f"leaves them out in silence, {share:.1%} of the update's squared size"
        )
    if adapter.input_scale:
        scales = [adapter.read_scale(name) for name in adapter.input_scale]
        largest = max(float((scale - 1).abs().max()) for scale in scales if scale is not None)
        found.append(
            f"the input-scaling vectors of {len(adapter.input_scale)} modules are a file of holdfast's own, which vLLM "
            f"and PEFT do not read; they scale input columns of the base by up to {largest:.2g} away from 1"
        )
    usual = _plain_scaling(adapter.config)
    others = [name for name, entry in adapter.modules.items() if not math.isclose(entry.scaling, usual, rel_tol=1e-6)]
    if others:
        name = others[0]
        found.append(
            f"{len(others)} modules have a scale of their own ({name}: {adapter.modules[name].scaling:g}); vLLM "
            f"applies lora_alpha / r = {usual:g} to all"
        )
    if adapter.saved:
        found.append(f"{len(adapter.saved)} whole tensors ({next(iter(adapter.saved))}), which vLLM does not take")
    return found


def squared_update(adapter: LoraAdapter, module: str) -> float:
    """||s B A||_F^2 of one module, from its factors alone."""
    a, b = adapter.read_factors(module)
    inner = (b.double().T @ b.double()) * (a.double() @ a.double().T).T
    return float(inner.sum()) * adapter.modules[module].scaling ** 2


def largest_rank(adapter: LoraAdapter) -> int:
    """The rank of the largest pair of factors; 0 without any."""
    return max((entry.rank for entry in adapter.modules.values()), default=0)


def rank_for_vllm(folder: Path) -> int:
    """The rank of an adapter that vLLM serves whole. Raises AdapterError: one that it would serve in part."""
    adapter = LoraAdapter(folder)
    try:
        dropped, rank = what_vllm_drops(adapter), largest_rank(adapter)
    finally:
        adapter.close()
    if dropped:
        raise AdapterError(
            f"{folder}: vLLM would not serve all of this adapter: {'; '.join(dropped)}. Merge it into its base "
            "(`holdfast edit BASE ADAPTER --rule keep --export dense`), or use backend transformers."
        )
    return rank


def _plain_scaling(config: Mapping[str, Any]) -> float:
    rank = float(config["r"])
    return float(config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def serving_notes(folder: Path, *, served_as: str = "dense") -> list[str]:
    """For a card: the rank to tell a server of, and what vLLM would drop. served_as: the form that has all of it."""
    adapter = LoraAdapter(folder)
    try:
        rank, drops = largest_rank(adapter), what_vllm_drops(adapter)
    finally:
        adapter.close()
    bound = max_lora_rank(rank)
    room = f"start vLLM with --max-lora-rank {bound}" if bound else "more than vLLM has room for: export dense"
    lines = [
        f"Rank {rank}: {room} (its default is {VLLM_DEFAULT_RANK})."
        if rank > VLLM_DEFAULT_RANK
        else f"Rank {rank}: within vLLM's default --max-lora-rank {VLLM_DEFAULT_RANK}."
    ]
    lines += [f"vLLM would not serve all of it: {sentence}." for sentence in drops]
    if drops:
        lines.append(
            f"To serve all of it, export it {served_as} (`--export dense`); the result is an ordinary checkpoint."
        )
    return lines


__all__: Sequence[str] = [
    "VLLM_DEFAULT_RANK",
    "VLLM_RANKS",
    "auto_mapping",
    "hub_id",
    "is_decoder_module",
    "known_base",
    "largest_rank",
    "max_lora_rank",
    "rank_for_vllm",
    "serving_notes",
    "settle_adapter_config",
    "squared_update",
    "what_vllm_drops",
]
