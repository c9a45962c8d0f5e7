"""Which tensors an edit touches: the calibrated layers, found on disk on both sides, with all that a rule needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from holdfast.checkpoints.adapter import LoraAdapter, LoraEntry
from holdfast.checkpoints.curvature_file import SETS, Curvature
from holdfast.checkpoints.naming import normalised
from holdfast.checkpoints.tensor_file import EDITABLE_DTYPES
from holdfast.editing.pair import Pair
from holdfast.errors import AdapterError, CalibrationError, CheckpointError
from holdfast.rules.base import Layer, layer_seed


@dataclass(frozen=True)
class DenseTarget:
    """One layer to be edited: its keys in AFTER and in BEFORE."""

    layer: Layer
    key: str
    before_key: str


@dataclass(frozen=True)
class LoraTarget:
    """One layer to be edited where AFTER is BEFORE under one adapter: `adapter` holds its factors, as `lora` says."""

    layer: Layer
    key: str
    before_key: str
    adapter: LoraAdapter
    lora: LoraEntry


Target = DenseTarget | LoraTarget


def lora_targets(targets: Iterable[Target]) -> list[LoraTarget]:
    """Those that are LoRA updates: all of them where AFTER is an adapter, else none."""
    return [target for target in targets if isinstance(target, LoraTarget)]


@dataclass(frozen=True)
class Blocks:
    """Layers without a calibration. of: module name -> 0-based decoder block. count: number of blocks."""

    of: Mapping[str, int]
    count: int

    @property
    def modules(self) -> list[str]:
        """In block order."""
        return sorted(self.of, key=lambda name: (self.of[name], name))


def find_targets(pair: Pair, layers: Curvature | Blocks, *, seed: int) -> list[Target]:
    """Every layer to be edited, in block order. layers: a calibration, or where the layers are without one.

    Raises: CalibrationError: a calibrated layer that the model does not have, or of another width. CheckpointError: a
        layer that is no plain matrix, or stored in a type that cannot be edited.
    """
    if isinstance(layers, Curvature):
        curvature, layers = layers, Blocks(layers.blocks, layers.block_count)
        names: Sequence[str] = curvature.modules
    else:
        curvature, names = None, layers.modules
    if pair.lora is not None and pair.lora.input_scale:
        raise AdapterError(
            f"{pair.lora.folder} is the result of an edit already (it scales the base's input columns). Edit the "
            "adapter that was trained, or merge this one and go on from there."
        )
    modules = _modules_by_key(pair)
    targets = []
    for name in names:
        layer = Layer(
            name=name,
            block=layers.of[name],
            block_count=layers.count,
            safety=curvature.safety[name] if curvature is not None else None,
            task=curvature.task[name] if curvature is not None else None,
            seed=layer_seed(seed, name),
        )
        target = _find(pair, layer, curvature, modules)
        if target is not None:
            targets.append(target)
    if not targets:
        raise AdapterError(
            f"{pair.lora.folder if pair.lora else pair.after.folder} changes none of the {len(names)} calibrated "
            "layers; there is nothing to edit. Was it trained on another part of the model?"
        )
    return targets


def _modules_by_key(pair: Pair) -> dict[str, str]:
    """Key of a weight -> the module of AFTER's adapter that changes it."""
    if pair.lora is None:
        return {}
    return {key: module for module, key in pair.after.keys_of(pair.lora).items()}


def _find(pair: Pair, layer: Layer, curvature: Curvature | None, modules: Mapping[str, str]) -> Target | None:
    wanted = curvature.weight_keys(layer.name) if curvature is not None else (f"{layer.name}.weight",)
    if not wanted:
        raise CheckpointError(
            f"No tensor of {pair.before.folder} is the weight of {layer.name}: this family regroups weights when "
            "it is loaded. Save the model again with this version of transformers, or edit it live "
            "(`holdfast.harmonize`)."
        )
    if len(wanted) != 1:
        raise CheckpointError(
            f"The weight of {layer.name} is stored as {len(wanted)} tensors ({', '.join(wanted)}) that are fused on "
            "load; save the model again with this version of transformers, so that files and memory agree."
        )
    key = pair.after.names.find(wanted[0]) or pair.after.names.find(f"{layer.name}.weight")
    if key is None or key not in pair.keys:
        raise CalibrationError(
            f"The calibration is of another model: it has {layer.name}, and {pair.after.folder} has no such weight. "
            "Calibrate with BEFORE and AFTER themselves."
        )
    entry = pair.after.entries[key]
    if len(entry.shape) != 2:
        raise CheckpointError(f"{key} is {entry.shape}; only matrices (out, in) can be edited, not stacked experts.")
    if entry.dtype not in EDITABLE_DTYPES:
        raise CheckpointError(f"{key} is stored as {entry.dtype}; expected F16, BF16 or F32. Dequantise it first.")
    if layer.safety is not None and layer.safety.shape[0] != entry.shape[1]:
        raise CalibrationError(
            f"The calibration is of another model: it has {layer.safety.shape[0]} input columns for {layer.name}, and "
            f"{key} is {entry.shape}."
        )
    if pair.lora is None:
        return DenseTarget(layer=layer, key=key, before_key=pair.keys[key])
    module = modules.get(key)
    if module is None:
        return None  # the adapter leaves this layer as it is
    lora = pair.lora.modules.get(module)
    if lora is None:
        return DenseTarget(layer=layer, key=key, before_key=pair.keys[key])  # DoRA and its like: a weight, no factors
    if lora.transposed:
        raise AdapterError(f"{key} is stored transposed (fan_in_fan_out); such models cannot be edited.")
    return LoraTarget(layer=layer, key=key, before_key=pair.keys[key], adapter=pair.lora, lora=lora)


def measured_on(curvature: Curvature, pair: Pair) -> dict[str, str]:
    """Set -> "BEFORE", "AFTER" or "other weights": whose activations were measured, by content.

    A set whose model is not recorded by content is left out.
    """
    found = pair.fingerprints()
    sides = {}
    for name, side in _sources(curvature).items():
        made_with = _recorded(curvature, side)
        if made_with is None:
            continue
        # The role that the set has comes first: with no change at all, both sides are one model.
        roles = sorted(found, key=lambda role: role != side)
        sides[name] = next((role.upper() for role in roles if found[role] == made_with), "other weights")
    return sides


def check_calibration(curvature: Curvature, pair: Pair) -> None:
    """Hold the calibration's own record of its models (`meta["model"]`) against BEFORE and AFTER, by content.

    The safety set must have been measured on BEFORE and the task set on AFTER; or both on BEFORE (activations "old"),
    or both on AFTER where that was asked for ("new"). A calibration that records no fingerprint passes: names and
    widths are compared anyway.

    Raises: CalibrationError: it was made with other weights, or with the roles the other way round.
    """
    measured = measured_on(curvature, pair)
    activations = curvature.meta.get("config", {}).get("activations")
    allowed: list[tuple[str, str]] = [("BEFORE", "AFTER"), ("BEFORE", "BEFORE")]
    if activations == "new":
        allowed = [("AFTER", "AFTER")]
    if any(all(measured.get(name, role) == role for name, role in zip(SETS, roles, strict=True)) for roles in allowed):
        return
    found = pair.fingerprints()
    advice = "Calibrate again, or allow it (--allow-other-calibration)"
    for name, side in _sources(curvature).items():
        made_with = _recorded(curvature, side)
        if made_with is None or measured[name] != "other weights":
            continue
        if any(prints[0] == made_with[0] and len(prints) == len(made_with) > 1 for prints in found.values()):
            raise CalibrationError(
                f"The calibration's {name} set was measured with {curvature.meta['model'][side].get('name')} under an "
                f"adapter that is not AFTER's ({_short(made_with)}; AFTER is {_short(found['after'])}): another "
                "adapter, this one with other settings (lora_alpha, use_rslora, ...), or a calibration made by an "
                f"earlier version of holdfast, which did not record them. {advice} where they are the same."
            )
        raise CalibrationError(
            f"The calibration is of another model: it was made with {curvature.meta['model'][side].get('name')} "
            f"(weights {_short(made_with)}); BEFORE is {_short(found['before'])}, AFTER is {_short(found['after'])}. "
            f"{advice} where these weights are close relatives."
        )
    where = ", ".join(f"the {name} set on {role}" for name, role in measured.items())
    raise CalibrationError(
        f"The calibration measured {where}; expected the safety set on BEFORE and the task set on AFTER. Calibrate "
        "again with `holdfast calibrate BEFORE --after AFTER`, or allow it (--allow-other-calibration)."
    )


def describe_calibration(curvature: Curvature, pair: Pair) -> list[str]:
    """A sentence per set that was not measured on the model that the method takes it from."""
    measured = measured_on(curvature, pair)
    if not measured and curvature.meta.get("config", {}).get("activations") in ("old", "new"):
        # Live models have no fingerprint; then there is the calibration's own word.
        side = {"old": "BEFORE", "new": "AFTER"}[curvature.meta["config"]["activations"]]
        measured = dict.fromkeys(SETS, side)
    return [
        f"the calibration measured the {name} set's inputs on {measured[name]}{_activations(curvature)}; the method "
        f"takes them from {role} ({advice})"
        for name, role, advice in zip(
            SETS, ("BEFORE", "AFTER"), ("`holdfast calibrate BEFORE`", "`holdfast calibrate --after`"), strict=True
        )
        if measured.get(name, role) != role
    ]


def _activations(curvature: Curvature) -> str:
    recorded = curvature.meta.get("config", {}).get("activations")
    return "" if recorded in (None, "each") else f" (activations: {recorded})"


def _sources(curvature: Curvature) -> dict[str, str]:
    """Set -> which of the two recorded models its activations are of."""
    activations = curvature.meta.get("config", {}).get("activations", "each")
    sides = {"old": ("before", "before"), "new": ("after", "after")}.get(activations, ("before", "after"))
    return dict(zip(SETS, sides, strict=True))


def _recorded(curvature: Curvature, side: str) -> list[str] | None:
    record = curvature.meta.get("model", {}).get(side, {})
    if record.get("fingerprint") is None:
        return None
    return [record["fingerprint"], *(adapter["fingerprint"] for adapter in record.get("adapters", ()))]


def _short(fingerprints: Sequence[str]) -> str:
    return " + ".join(f"{value[:12]}..." for value in fingerprints)


def describe_unprotected(keys: Sequence[str]) -> list[str]:
    """One sentence per part of the model that changed and was copied as it is: what an edit did not protect."""
    groups: dict[str, int] = {}
    for key in keys:
        parts = [part for part in normalised(key) if not part.isdigit()]
        name = ".".join(parts[:-1]) if parts[0] == "layers" else parts[0]
        groups[name] = groups.get(name, 0) + 1
    return [
        f"{name}: {count} tensor{'s' if count > 1 else ''} changed by the tuning and copied without protection"
        for name, count in sorted(groups.items())
    ]


def decoder_layers(folder: Path) -> Blocks:
    """Every editable linear of the decoder and its block, from a model without weights.

    For rules that need no calibration. Imports transformers.

    Raises: ModelError: no vision-language model, or a kind that cannot be edited.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForImageTextToText

    from holdfast.models.families import decoder_blocks, editable_linears
    from holdfast.models.settings import quiet_transformers, read_config

    with quiet_transformers(), init_empty_weights():
        model = AutoModelForImageTextToText.from_config(read_config(str(folder)))
    prefixes = [name for name, _ in decoder_blocks(model)]
    linears: Mapping[str, nn.Linear] = editable_linears(model)
    blocks = {
        name: next(i for i, prefix in enumerate(prefixes) if name == prefix or name.startswith(f"{prefix}."))
        for name in linears
    }
    return Blocks(blocks, len(prefixes))
