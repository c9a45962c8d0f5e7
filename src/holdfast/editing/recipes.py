"""The edit as a recipe for `rewrite`: for each output tensor its inputs and its function, dense or as an adapter."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from holdfast.checkpoints.merged import MergedCheckpoint, add_updates
from holdfast.checkpoints.rewrite import Compute, Copy, Input
from holdfast.checkpoints.writer import OutputTensor
from holdfast.editing.account import linear_name
from holdfast.editing.descent import require_descent
from holdfast.editing.pair import Pair
from holdfast.editing.plan import DenseTarget, LoraTarget, Target, lora_targets
from holdfast.errors import AdapterError, NumericalError
from holdfast.rules.base import EditRule, Layer, LoraEditRule

Recipe = dict[str, Copy | Compute]
CoefficientChoice = Literal["drop", "measure", "keep"]
# Where a row carries its input-scaling vector until the editor writes the vectors to their own file.
SCALE_FIELD = "_input_scale"
# In the row of a tensor that is copied: whether it differs from BEFORE's, which has another type.
DIFFERS_FIELD = "_differs"


def output_tensors(entries: Mapping[str, Any]) -> list[OutputTensor]:
    """What a folder with these entries consists of."""
    return [OutputTensor(name, entry.dtype, entry.shape, entry.nbytes) for name, entry in entries.items()]


def dense_recipe(
    pair: Pair, targets: Sequence[Target], rule: EditRule, *, allow_other_base: bool = False
) -> tuple[Recipe, list[str]]:
    """Every tensor of AFTER: edited, copied, or merged; and the keys that an adapter changes outside the targets.

    allow_other_base: edit weights that have nothing in common with BEFORE's, instead of raising CheckpointError.
    """
    by_key = {target.key: target for target in targets}
    recipe: Recipe = {}
    unprotected = []
    for key in pair.after.entries:
        sources = _inputs(pair.after, key)
        old_key = pair.keys.get(key)
        target = by_key.get(key)
        if target is not None:
            recipe[key] = (
                _edit_sum(pair, target, rule)
                if isinstance(target, LoraTarget)
                else _edit_dense(pair, target, rule, allow_other_base)
            )
        elif not pair.after.is_plain(key):
            merged = key in pair.after.updates or key in pair.after.replaced
            if merged or old_key is None or pair.lora is not None:
                recipe[key] = Compute(sources, _merge(pair, key))
                unprotected += [key] if merged else []
            else:
                recipe[key] = _copy_and_compare(pair, key, old_key)
        elif pair.lora is not None or old_key is None:
            recipe[key] = Copy(sources[0])
        elif pair.before.is_plain(old_key):
            recipe[key] = Copy(sources[0], compare=Input(pair.before.base, pair.before.entries[old_key]))
        elif old_key in pair.before.read_as:
            recipe[key] = _copy_and_compare(pair, key, old_key)
        else:
            recipe[key] = Copy(sources[0])
            unprotected.append(key)
    recipe |= {key: Copy(_inputs(pair.before, key)[0]) for key in pair.only_before}
    return recipe, unprotected


def _inputs(checkpoint: MergedCheckpoint, key: str) -> tuple[Input, ...]:
    """What has to be read for a tensor of a checkpoint."""
    return tuple(Input(checkpoint.base, entry) for entry in checkpoint.stored(key))


def _value(checkpoint: MergedCheckpoint, key: str, stored: Sequence[Tensor]) -> Tensor:
    """As stored where nothing is done to it, else the value in fp32 or wider."""
    return stored[0] if checkpoint.is_plain(key) else checkpoint.value(key, *stored)


def _copy_and_compare(pair: Pair, key: str, old_key: str) -> Compute:
    """AFTER's value of a tensor, and whether it is BEFORE's, where their bytes cannot be compared."""
    after, before = _inputs(pair.after, key), _inputs(pair.before, old_key)
    read = _merge(pair, key)

    def copy(*stored: Tensor) -> tuple[Tensor, dict[str, Any]]:
        old = _value(pair.before, old_key, stored[len(after) :])
        new = stored[0] if pair.after.is_plain(key) else read(*stored[: len(after)])[0]
        return new, {DIFFERS_FIELD: not torch.equal(new.to(old.dtype), old)}

    return Compute((*after, *before), copy)


def _edit_dense(pair: Pair, target: DenseTarget, rule: EditRule, allow_other_base: bool) -> Compute:
    """The edited weight of a layer that both checkpoints store."""
    before, after = _inputs(pair.before, target.before_key), _inputs(pair.after, target.key)
    stored_type = pair.after.entries[target.key].torch_dtype

    def edit(*stored: Tensor) -> tuple[Tensor, dict[str, Any]]:
        old = _value(pair.before, target.before_key, stored[: len(before)])
        new = _value(pair.after, target.key, stored[len(before) :])
        edited = _named(target.layer, lambda: rule.edit(target.layer, old, new))
        if not allow_other_base:
            folders = {"before": pair.before.folder, "after": pair.after.folder}
            require_descent(target.key, edited.row, **folders, option="--allow-other-base")
        buffer = stored[len(before)]
        fits = buffer.dtype == stored_type
        weight = _store(edited.weight, buffer) if fits else edited.weight.to(stored_type)
        return weight, _row(target.layer, old.shape, edited.row)

    return Compute((*before, *after), edit)


def _edit_sum(pair: Pair, target: LoraTarget, rule: EditRule) -> Compute:
    """The edited weight of a layer that AFTER stores as BEFORE plus a LoRA update."""
    lora, entry = target.adapter, target.lora

    before = _inputs(pair.before, target.before_key)
    stored_type = pair.after.entries[target.key].torch_dtype

    def edit(*stored: Tensor) -> tuple[Tensor, dict[str, Any]]:
        *weights, lora_a, lora_b = stored
        # BEFORE may carry adapters of its own; then the old weight is their sum, in fp32.
        old = _value(pair.before, target.before_key, weights)
        fits = weights[0].dtype == stored_type
        weight = weights[0] if fits else torch.empty(old.shape, dtype=stored_type)
        a, b = _wide(lora_a), _wide(lora_b)
        if isinstance(rule, LoraEditRule):
            base = old if rule.reads_base else None
            if base is None and not bool(old.isfinite().all()):
                raise NumericalError(
                    f"{target.layer.name}: NaN or inf in w_prev; BEFORE is damaged. Nothing was edited."
                )
            edited = _named(target.layer, lambda: rule.edit_lora(target.layer, base, a, b, entry.scaling))
            add_updates(old, [(edited.lora_a, b, entry, edited.input_scale)], weight)
            return weight, _row(target.layer, old.shape, edited.row)
        new = add_updates(old, [(a, b, entry, None)], torch.empty(old.shape, dtype=torch.float32))
        dense = _named(target.layer, lambda: rule.edit(target.layer, old, new))
        return _store(dense.weight, weight), _row(target.layer, old.shape, dense.row)

    return Compute((*before, Input(lora, entry.a), Input(lora, entry.b)), edit)


def adapter_recipe(
    pair: Pair,
    targets: Sequence[Target],
    rule: EditRule,
    coefficient: CoefficientChoice,
    keys: Mapping[str, str],
) -> tuple[Recipe, list[str]]:
    """Every tensor of the adapter: the edited A of each target; B and all else copied.

    keys: key in AFTER's adapter -> key to be written.
    The keys of the second value are modules that the adapter changes and the edit does not protect.

    Raises: AdapterError: AFTER is no adapter, or the rule has no closed form for LoRA.
    """
    lora = pair.lora
    if lora is None:
        raise AdapterError(
            f"--export adapter needs AFTER to be a LoRA adapter on BEFORE; it is "
            f"{_several(pair) or f'{pair.after.folder}, a full checkpoint'}. Pass the adapter folder, or export dense."
        )
    if not isinstance(rule, LoraEditRule):
        raise AdapterError(f"The rule {rule.name!r} has no closed form for LoRA updates; use --export dense.")
    own = lora_targets(targets)
    if len(own) < len(targets) or lora.why_not_factors() is not None:
        why = lora.why_not_factors() or "it changes weights otherwise than by factors alone (DoRA or like it)"
        raise AdapterError(f"{lora.folder} cannot be edited as an adapter: {why}. Use --export dense.")
    recipe: Recipe = {keys[name]: Copy(Input(lora, entry)) for name, entry in lora.entries.items()}
    for target in own:
        inputs: tuple[Input, ...] = (Input(lora, target.lora.a), Input(lora, target.lora.b))
        if rule.reads_base and coefficient != "drop":
            inputs += _inputs(pair.before, target.before_key)
        recipe[keys[target.lora.a.name]] = Compute(inputs, _edit_adapter(pair, target, rule, coefficient))
    edited = {target.lora.module for target in own}
    unprotected = [f"{module}.weight" for module in (*lora.modules, *lora.dense) if module not in edited]
    return recipe, [*unprotected, *lora.saved]


def _several(pair: Pair) -> str | None:
    own = len(pair.after.adapters) - len(pair.before.adapters)
    return f"{own} adapters on top of each other" if own > 1 and pair.before.folder == pair.after.folder else None


def _edit_adapter(
    pair: Pair, target: LoraTarget, rule: LoraEditRule, coefficient: CoefficientChoice
) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    entry = target.lora

    def edit(lora_a: Tensor, lora_b: Tensor, *weight: Tensor) -> tuple[Tensor, dict[str, Any]]:
        old = _value(pair.before, target.before_key, weight) if weight else None
        a, b = _wide(lora_a), _wide(lora_b)
        edited = _named(target.layer, lambda: rule.edit_lora(target.layer, old, a, b, entry.scaling))
        row = _row(target.layer, entry.shape, edited.row)
        if coefficient == "keep" and edited.input_scale is not None:
            # Base64 in the row: the mark of a finished file then holds all that a resumed run needs.
            row[SCALE_FIELD] = base64.b64encode(edited.input_scale.float().numpy().tobytes()).decode()
        return _store(edited.lora_a, lora_a), row

    return edit


def read_scale_field(text: str) -> Tensor:
    """The vector that a row carried.

    Returns: (c,) fp32.
    """
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)


def _merge(pair: Pair, key: str) -> Callable[..., tuple[Tensor, None]]:
    entry = pair.after.entries[key]

    def merge(*stored: Tensor) -> tuple[Tensor, None]:
        fits = stored[0].dtype == entry.torch_dtype and tuple(stored[0].shape) == entry.shape
        out = stored[0] if fits else torch.empty(entry.shape, dtype=entry.torch_dtype)
        return pair.after.value(key, *stored, out=out), None

    return merge


def _named(layer: Layer, action: Callable[[], Any]) -> Any:
    """Run the rule; a numerical failure says in which layer."""
    try:
        return action()
    except NumericalError as error:
        raise NumericalError(f"{layer.name}: {error}") from error


def _wide(factor: Tensor) -> Tensor:
    return factor if factor.dtype == torch.float64 else factor.float()


def _store(value: Tensor, buffer: Tensor) -> Tensor:
    """`value` in the type and memory of `buffer`: cast once."""
    return value if value is buffer else buffer.copy_(value)


def _row(layer: Layer, shape: Sequence[int], figures: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "layer": layer.name,
        "linear": linear_name(layer.name),
        "block": layer.block,
        "rows": int(shape[0]),
        "columns": int(shape[1]),
        **figures,
    }
