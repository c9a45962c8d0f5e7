"""Adapters of PEFT added to the weights of a model that is in memory."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from holdfast.bounds import bounded
from holdfast.checkpoints.adapter import CONFIG_FILE, INPUT_SCALE_FILE, LoraAdapter
from holdfast.checkpoints.contents import (
    ADAPTER_WEIGHTS,
    require_safe_adapter,
)
from holdfast.checkpoints.merged import add_updates, locate
from holdfast.checkpoints.naming import NameIndex, normalised
from holdfast.checkpoints.patterns import try_patterns
from holdfast.checkpoints.reader import read_json
from holdfast.checkpoints.tensor_file import TensorFile
from holdfast.checkpoints.tied import EMBEDDING, HEAD, untie_in_memory
from holdfast.errors import AdapterError
from holdfast.models.settings import quiet_transformers, shown

# Matching and loading take seconds; a pattern that never ends is stopped.
PEFT_SECONDS = 300.0


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
        raise AdapterError(f"{adapter} does not fit {base}: {shown(error)}") from error
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
