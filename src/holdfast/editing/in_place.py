"""The same edit on live models: weights in memory in, edited weights in memory out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.checkpoints.curvature_file import Curvature
from holdfast.checkpoints.gram_store import GramStore
from holdfast.checkpoints.naming import NameIndex, strip_peft_prefix
from holdfast.editing.account import linear_name
from holdfast.editing.descent import require_alike, require_descent, require_shape
from holdfast.errors import AdapterError, CalibrationError, CheckpointError, NumericalError
from holdfast.functional.columns import measure_change
from holdfast.rules.base import EditRule, Layer, LoraEditRule, layer_seed


def edit_live(
    before: Mapping[str, Tensor],
    after: nn.Module,
    *,
    rule: EditRule,
    curvature: Curvature | GramStore,
    seed: int = 0,
    allow_other_base: bool = False,
) -> list[dict[str, Any]]:
    """Edit the calibrated layers of `after` in place; returns a row per edited layer, as in an `EditReport`.

    before: parameters of the model that the tuning started from, by name, in memory of their own. after: the tuned
        model; of a PEFT model the active LoRA's A is edited (its base weights are not touched, so HPA's coefficient is
        left out), and frozen layers without one are left alone.
    curvature: which layers, with their diagonals; or the task's Gram matrices, for a rule that reads these itself.
    allow_other_base: accept weights that have nothing in common with those of `before`.

    Raises: CalibrationError: a calibrated layer that `after` does not have, or of another width. CheckpointError:
        `before` lacks a layer, has it in another shape or type, has nothing in common with it, or shares its memory.
        AdapterError: a LoRA variant, a merged adapter, or a rule without closed form. NumericalError: NaN or inf.
    before: name -> weight (r, c), or a tensor of any shape that is left alone.
    """
    _check_model(curvature, after)
    modules = dict(after.named_modules())
    full_names = {strip_peft_prefix(name): name for name in modules if name}
    names = NameIndex(full_names, what=type(after).__name__)
    old_names = NameIndex(before, what="BEFORE")
    under_adapters = any(hasattr(module, "lora_A") for module in modules.values())
    planned: list[_DenseLayer | _LoraLayer] = []
    for name in curvature.modules:
        found = names.find(name)
        module: Any = modules[full_names[found]] if found is not None else None
        if module is None or not hasattr(module, "weight"):
            raise CalibrationError(
                f"The calibration is of another model: it has {name}, and {type(after).__name__} has no such layer."
            )
        if under_adapters and not hasattr(module, "lora_A") and not module.weight.requires_grad:
            continue  # PEFT freezes what it does not train
        layer = Layer(
            name=name,
            block=curvature.blocks[name],
            block_count=curvature.block_count,
            safety=curvature.safety[name] if isinstance(curvature, Curvature) else None,
            task=curvature.task[name] if isinstance(curvature, Curvature) else None,
            seed=layer_seed(seed, name),
        )
        _check_width(layer, module.weight, _width(curvature, name))
        if hasattr(module, "lora_A"):
            planned += _plan_lora(layer, module, rule)
        else:
            old = before[old_names.require(f"{name}.weight")]
            planned.append(_plan_dense(layer, module, old, rule, allow_other_base))
    rows = [planned_layer.edit() for planned_layer in planned]
    if not rows:
        raise AdapterError("The adapter changes none of the calibrated layers; there is nothing to edit.")
    return rows


def _width(curvature: Curvature | GramStore, name: str) -> int:
    """How many input columns of a layer were calibrated."""
    return curvature.safety[name].shape[0] if isinstance(curvature, Curvature) else curvature.entry(name).width


def _check_model(curvature: Curvature | GramStore, after: nn.Module) -> None:
    """Names and widths agree between unlike families, too; of live weights there is no fingerprint to compare."""
    made_with = curvature.meta.get("model_type")
    found = getattr(getattr(after, "config", None), "model_type", None)
    if made_with is not None and found is not None and made_with != found:
        raise CalibrationError(
            f"The calibration is of another model: it was made with a {made_with!r} model, and {type(after).__name__} "
            f"is a {found!r} model. Calibrate with BEFORE and AFTER themselves."
        )


def _check_width(layer: Layer, weight: Tensor, width: int) -> None:
    if weight.ndim != 2 or weight.shape[1] != width:
        raise CalibrationError(
            f"The calibration is of another model: it has {width} input columns for {layer.name}, "
            f"whose weight is {tuple(weight.shape)}."
        )


@dataclass(frozen=True, eq=False)
class _DenseLayer:
    """A layer whose weight will be edited in place."""

    layer: Layer
    module: Any
    old: Tensor
    rule: EditRule

    def edit(self) -> dict[str, Any]:
        new = self.module.weight.detach()
        edited = self.rule.edit(self.layer, _in_type_of(self.old, new), new.clone())
        with torch.no_grad():
            self.module.weight.copy_(edited.weight)
        return _row(self.layer, self.module, edited.row)


@dataclass(frozen=True, eq=False)
class _LoraLayer:
    """A layer of a PEFT model; the factor A of its active adapter will be edited in place."""

    layer: Layer
    module: Any
    adapter: str
    rule: LoraEditRule

    def edit(self) -> dict[str, Any]:
        a, b = (factors[self.adapter].weight for factors in (self.module.lora_A, self.module.lora_B))
        scaling = float(self.module.scaling[self.adapter])
        edited = self.rule.edit_lora(self.layer, None, a.detach().float(), b.detach().float(), scaling)
        with torch.no_grad():
            a.copy_(edited.lora_a)
        return _row(self.layer, self.module, edited.row)


def _row(layer: Layer, module: Any, figures: Mapping[str, Any]) -> dict[str, Any]:
    rows, columns = module.weight.shape
    place = {"layer": layer.name, "linear": linear_name(layer.name), "block": layer.block}
    return {**place, "rows": int(rows), "columns": int(columns), **figures}


def _plan_dense(layer: Layer, module: Any, old: Tensor, rule: EditRule, allow_other_base: bool) -> _DenseLayer:
    weight = module.weight
    _check_dense(f"{layer.name}.weight", old, weight)
    _require_finite(layer, after=weight, before=old)
    if not allow_other_base:
        change = measure_change(_in_type_of(old, weight), weight.detach())
        row = {"cosine": change.cosine(), "relative_change": change.relative()}
        models = {"before": "BEFORE", "after": "AFTER"}
        require_descent(f"{layer.name}.weight", row, **models, option="allow_other_base=True")
    return _DenseLayer(layer, module, old, rule)


def _plan_lora(layer: Layer, module: Any, rule: EditRule) -> list[_LoraLayer]:
    """The layer's active adapter, or nothing where none is active."""
    if module.merged:
        raise AdapterError(
            f"{layer.name} has its adapter merged into the base weight, where an edit of A would not reach it. Call "
            "`unmerge_adapter()` first; or `merge_and_unload()`, and pass the old weights as BEFORE."
        )
    active = [name for name in module.active_adapters if name in module.lora_A]
    if len(active) > 1 or any(getattr(module, "lora_variant", {}).get(name) is not None for name in active):
        what = "several active adapters" if len(active) > 1 else "a LoRA variant (DoRA or like it)"
        raise AdapterError(
            f"{layer.name} has {what}; one plain LoRA can be edited in place. Merge (`merge_and_unload`) and pass the "
            "merged model."
        )
    if not isinstance(rule, LoraEditRule):
        raise AdapterError(f"The rule {rule.name!r} has no closed form for LoRA updates; merge the adapter first.")
    for name in active:
        _require_finite(layer, lora_A=module.lora_A[name].weight, lora_B=module.lora_B[name].weight)
    return [_LoraLayer(layer, module, name, rule) for name in active]


def _in_type_of(old: Tensor, new: Tensor) -> Tensor:
    """BEFORE's weight as the tuning loaded it: in AFTER's type, where AFTER is."""
    return old.detach().to(new.device, new.dtype)


def _check_dense(key: str, old: Tensor, new: Tensor) -> None:
    if old.is_floating_point() and new.is_floating_point():
        require_shape(key, before=old.shape, after=new.shape)
    else:
        require_alike(
            key,
            before=(old.shape, old.dtype),
            after=(new.shape, new.dtype),
            remedy="Load both dequantised, in the type that the tuning started from.",
        )
    if old.device == new.device and old.untyped_storage().data_ptr() == new.untyped_storage().data_ptr():
        raise CheckpointError(
            f"{key} of BEFORE is the memory of AFTER's: tuning changed both, and no difference is left. Keep copies "
            "before you tune: {name: value.clone() for name, value in model.state_dict().items()}."
        )


def _require_finite(layer: Layer, **tensors: Tensor) -> None:
    for what, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise NumericalError(f"{layer.name} holds NaN or inf ({what}); the training diverged. Nothing was edited.")
