"""The edit as a recipe for `rewrite`: for each output tensor its inputs and its function, dense or as an adapter."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from holdfast.checkpoints.merged import add_updates
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
    for key, entry in pair.after.entries.items():
        source = Input(pair.after.base, entry)
        old_key = pair.keys.get(key)
        target = by_key.get(key)
        if target is not None:
            recipe[key] = (
                _edit_sum(pair, target, rule)
                if isinstance(target, LoraTarget)
                else _edit_dense(pair, target, rule, source, allow_other_base)
            )
        elif not pair.after.is_plain(key):
            recipe[key] = Compute((source,), _merge(pair, key))
            unprotected.append(key)
        elif pair.lora is not None or old_key is None:
            recipe[key] = Copy(source)
        elif pair.before.is_plain(old_key):
            recipe[key] = Copy(source, compare=Input(pair.before.base, pair.before.entries[old_key]))
        else:
            recipe[key] = Copy(source)
            unprotected.append(key)
    return recipe, unprotected


def _edit_dense(pair: Pair, target: DenseTarget, rule: EditRule, source: Input, allow_other_base: bool) -> Compute:
    """The edited weight of a layer that both checkpoints store."""

    def edit(w_prev: Tensor, w_new: Tensor) -> tuple[Tensor, dict[str, Any]]:
        old = w_prev if pair.before.is_plain(target.before_key) else pair.before.merge(target.before_key, w_prev)
        new = w_new if pair.after.is_plain(target.key) else pair.after.merge(target.key, w_new)
        edited = _named(target.layer, lambda: rule.edit(target.layer, old, new))
        if not allow_other_base:
            folders = {"before": pair.before.folder, "after": pair.after.folder}
            require_descent(target.key, edited.row, **folders, option="--allow-other-base")
        return _store(edited.weight, w_new), _row(target.layer, old.shape, edited.row)

    return Compute((_before(pair, target), source), edit)


def _edit_sum(pair: Pair, target: LoraTarget, rule: EditRule) -> Compute:
    """The edited weight of a layer that AFTER stores as BEFORE plus a LoRA update."""
    lora, entry = target.adapter, target.lora

    def edit(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, dict[str, Any]]:
        # BEFORE may carry adapters of its own; then the old weight is their sum, in fp32.
        plain = pair.before.is_plain(target.before_key)
        old = weight if plain else pair.before.merge(target.before_key, weight)
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

    return Compute((_before(pair, target), Input(lora, entry.a), Input(lora, entry.b)), edit)


def _before(pair: Pair, target: Target) -> Input:
    return Input(pair.before.base, pair.before.entries[target.before_key])


def adapter_recipe(
    pair: Pair, targets: Sequence[Target], rule: EditRule, coefficient: CoefficientChoice
) -> tuple[Recipe, list[str]]:
    """Every tensor of the adapter: the edited A of each target; B and all else copied.

    The keys of the second value are modules that the adapter changes and the edit does not protect.

    Raises: AdapterError: AFTER is no adapter, or the rule has no closed form for LoRA.
    """
    lora = pair.lora
    if lora is None:
        raise AdapterError(
            f"--export adapter needs AFTER to be a LoRA adapter on BEFORE; {pair.after.folder} is a full checkpoint. "
            "Pass the adapter folder, or export dense."
        )
    if not isinstance(rule, LoraEditRule):
        raise AdapterError(f"The rule {rule.name!r} has no closed form for LoRA updates; use --export dense.")
    recipe: Recipe = {name: Copy(Input(lora, entry)) for name, entry in lora.entries.items()}
    own = lora_targets(targets)
    for target in own:
        inputs: tuple[Input, ...] = (Input(lora, target.lora.a), Input(lora, target.lora.b))
        if rule.reads_base and coefficient != "drop":
            inputs += (_before(pair, target),)
        recipe[target.lora.a.name] = Compute(inputs, _edit_adapter(pair, target, rule, coefficient))
    edited = {target.lora.module for target in own}
    unprotected = [f"{module}.weight" for module in lora.modules if module not in edited]
    return recipe, [*unprotected, *lora.saved]


def _edit_adapter(
    pair: Pair, target: LoraTarget, rule: LoraEditRule, coefficient: CoefficientChoice
) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    entry = target.lora

    def edit(lora_a: Tensor, lora_b: Tensor, weight: Tensor | None = None) -> tuple[Tensor, dict[str, Any]]:
        old = weight
        if weight is not None and not pair.before.is_plain(target.before_key):
            old = pair.before.merge(target.before_key, weight)
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


def _merge(pair: Pair, key: str) -> Callable[[Tensor], tuple[Tensor, None]]:
    def merge(weight: Tensor) -> tuple[Tensor, None]:
        return pair.after.merge(key, weight, out=weight), None

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
