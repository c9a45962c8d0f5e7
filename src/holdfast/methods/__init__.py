"""One file = one method. `METHODS`: name -> "module:Class" and the options that make a named variant of it.

Wherever a method is named, one of an installed distribution and `package.module:Class` do as well: `holdfast.registry`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from holdfast.config import current_names, decode
from holdfast.errors import ConfigError
from holdfast.registry import Registry
from holdfast.stream.protocol import Method

# name -> (where the class lives, options that differ from its defaults)
METHODS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "seqft": ("holdfast.methods.seqft:SeqFT", {}),
    "hpa": ("holdfast.methods.hpa:Hpa", {}),
    # Our own edit, and what of it is left out. Options of `edit` that differ from the rule's own defaults stand here
    # too, so that a run file which names one of them keeps the others.
    "anchor": ("holdfast.methods.anchor:Anchor", {"edit": {"benign_share": 0.6}}),
    "anchor_no_past": ("holdfast.methods.anchor:Anchor", {"edit": {"benign_share": 0.6, "past_weight": 0.0}}),
    "anchor_no_benign": ("holdfast.methods.anchor:Anchor", {"benign_samples": 0}),
    "anchor_no_screen": ("holdfast.methods.anchor:Anchor", {"edit": {"benign_share": 0.6}, "screen": False}),
    # HPA with theta_0's benign answers in its safety set.
    "hpa_benign": ("holdfast.methods.hpa:Hpa", {"benign_samples": None}),
    # Rows of the paper's ablation.
    "hpa_eps": ("holdfast.methods.hpa:Hpa", {"edit": {"ranking": "eps"}}),
    "hpa_phi": ("holdfast.methods.hpa:Hpa", {"edit": {"ranking": "phi"}}),
    "hpa_no_projection": ("holdfast.methods.hpa:Hpa", {"edit": {"projection": "none"}}),
    # Controls: the same kind of edit without a Hessian, at the same p and at HPA's strength.
    "interpolation": ("holdfast.methods.interpolation:Interpolation", {}),
    "largest_change": ("holdfast.methods.largest_change:LargestChange", {}),
    "random_columns": ("holdfast.methods.random_columns:RandomColumns", {}),
    "interpolation_matched": ("holdfast.methods.interpolation:Interpolation", {"match": "hpa"}),
    "largest_change_matched": ("holdfast.methods.largest_change:LargestChange", {"match": "hpa"}),
    "random_columns_matched": ("holdfast.methods.random_columns:RandomColumns", {"match": "hpa"}),
    # Rivals.
    "safe_delta": ("holdfast.methods.safe_delta:SafeDelta", {}),
    "model_tailor": ("holdfast.methods.model_tailor:ModelTailor", {}),
    "safe_lora": ("holdfast.methods.safe_lora:SafeLora", {}),
    "dare": ("holdfast.methods.dare:Dare", {}),
    "ties": ("holdfast.methods.ties:Ties", {}),
    "ewc": ("holdfast.methods.ewc:Ewc", {}),
    "lwf": ("holdfast.methods.lwf:Lwf", {}),
    "o_lora": ("holdfast.methods.o_lora:OLora", {}),
    "reg_lora": ("holdfast.methods.reg_lora:RegLora", {}),
    "replay": ("holdfast.methods.replay:Replay", {}),
    "safety_replay": ("holdfast.methods.safety_replay:SafetyReplay", {}),
    "one_shot": ("holdfast.methods.one_shot:OneShot", {}),
    "resta": ("holdfast.methods.resta:Resta", {}),
    "sppft": ("holdfast.methods.sppft:Sppft", {}),
    "cgm": ("holdfast.methods.cgm:Cgm", {}),
    "cgm_plus": ("holdfast.methods.cgm:Cgm", {"alpha": 1.0, "kept": 0.95}),
    "safe_anchor": ("holdfast.methods.safe_anchor:SafeAnchor", {}),
    "many": ("holdfast.methods.many:Many", {}),
    "guardspace": ("holdfast.methods.guardspace:GuardSpace", {}),
    "moelora": ("holdfast.methods.moelora:MoeLora", {}),
    # From PEFT.
    "osf": ("holdfast.methods.osf:Osf", {}),
    "intruders": ("holdfast.methods.intruders:Intruders", {}),
    # Bounds: nothing learned, and everything at once.
    "frozen": ("holdfast.methods.frozen:Frozen", {}),
    "joint": ("holdfast.methods.joint:Joint", {}),
    "cram": ("holdfast.methods.cram:Cram", {}),
    # Both of them: the edit on finished experts.
    "cram_hpa": ("holdfast.methods.cram_hpa:CramHpa", {"edit": {"projection": "none"}}),
    "cram_anchor": (
        "holdfast.methods.cram_anchor:CramAnchor",
        {"edit": {"benign_share": 0.6, "past_weight": 0.0}},
    ),
    # What theta_0 would refuse goes to theta_0 alone.
    "cram_guard": ("holdfast.methods.cram:Cram", {"guard": "openings"}),
    # Ablations of CRAM.
    "cram_no_penalty": ("holdfast.methods.cram:Cram", {"cram": {"penalty": 0.0}}),
    "cram_fixed_rank": ("holdfast.methods.cram:Cram", {"cram": {"rank": {"fixed": True}}}),
    "cram_no_reuse": ("holdfast.methods.cram:Cram", {"cram": {"reuse": False}}),
    "cram_no_abstention": ("holdfast.methods.cram:Cram", {"cram": {"abstain": "off"}}),
    # The released recipe (`CramConfig.official`).
    "cram_official": (
        "holdfast.methods.cram:Cram",
        {
            "cram": {
                "rank": {"tau_alloc": 0.08, "alloc": "absolute", "novelty": "absolute", "cap_first": True},
                "join_floor": -1.0,
                "sigma": 2.0,
                "released": {
                    "forward_factor": 2.0,
                    "double_scale": True,
                    "learn_centroid": True,
                    "centroid_per_block": True,
                    "penalty_space": "input",
                    "max_groups": 10,
                },
                "abstain": "off",
                "held_out": 0.0,
                "encoder": "openai/clip-vit-large-patch14-336",
                "common_directions": 0.0,
            }
        },
    ),
}


REGISTRY = Registry(
    "method",
    "holdfast.methods",
    METHODS,
    needs=("Config", "begin_task", "train_task", "end_task"),
    made_needs=("name", "config"),
)


def get(name: str, *, label: str | None = None, defaults: Mapping[str, Any] | None = None, **options: Any) -> Method:
    """The method `name` with `options`, keys of its class's `Config`.

    label: what records call it; by default its name. Two settings of one method need two labels.
    defaults: options that what makes a variant (`hpa_eps`) and `options` override.
    Raises UnknownNameError: no such method, or no such option. ConfigError: an option's type or value.
    """
    cls = class_of(name)
    where = f"methods.{label or name}"
    below, preset, above = (
        current_names(cls.Config, d, where) for d in (defaults or {}, REGISTRY.options(name), options)
    )
    config = decode(cls.Config, lay_over(lay_over(below, preset), above), where)
    try:
        method = cls(config, name=label or name)
    except TypeError as error:
        raise ConfigError(f"method {name!r} cannot be made as Class(config, name=label): {error}.") from error
    return REGISTRY.made(name, method)


def class_of(name: str) -> Any:
    """The class of the method `name`, imported now.

    Raises UnknownNameError: no such method. ConfigError: it cannot be imported, or is no method.
    """
    cls = REGISTRY.load(name)
    if not dataclasses.is_dataclass(cls.Config):
        raise ConfigError(f"method {name!r}: its Config is {cls.Config!r}; expected a frozen dataclass of its options.")
    return cls


def config_of(name: str) -> Any:
    """The dataclass of the options of the method `name`. Raises: as `class_of`."""
    return class_of(name).Config


def lay_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, mapping by mapping."""
    merged = {**below, **above}
    for key, value in below.items():
        if isinstance(value, Mapping) and isinstance(above.get(key), Mapping):
            merged[key] = lay_over(value, above[key])
    return merged


__all__ = ["METHODS", "REGISTRY", "class_of", "config_of", "get", "lay_over"]
