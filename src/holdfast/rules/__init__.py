"""One file = one edit of a layer: tensors of one layer in, tensors out. `RULES`: name -> "module:Class".

Wherever a rule is named, one of an installed distribution and `package.module:Class` do as well: `holdfast.registry`.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from holdfast.config import decode
from holdfast.errors import ConfigError
from holdfast.registry import Registry
from holdfast.rules.base import EditRule

RULES: dict[str, Any] = {
    "anchor": "holdfast.rules.anchor:AnchorRule",
    "hpa": "holdfast.rules.hpa:HpaRule",
    "keep": "holdfast.rules.keep:KeepUpdate",
    "interpolation": "holdfast.rules.interpolation:InterpolationRule",
    "largest_change": "holdfast.rules.largest_change:LargestChangeRule",
    "random_columns": "holdfast.rules.random_columns:RandomColumnsRule",
    "dare": "holdfast.rules.dare:DareRule",
    "ties": "holdfast.rules.ties:TiesRule",
    "safe_lora": "holdfast.rules.safe_lora:SafeLoraRule",
    "resta": "holdfast.rules.resta:RestaRule",
    "many": "holdfast.rules.many:ManyRule",
    "cgm": "holdfast.rules.cgm:CgmRule",
}
REGISTRY = Registry("rule", "holdfast.rules", RULES, made_needs=("name", "needs_curvature", "settings", "edit"))


def inputs_of(name: str) -> tuple[str, ...]:
    """What the rule `name` takes beside its options, by keyword: ("grams",) for one that needs whole Gram matrices.

    Raises UnknownNameError: no such rule. ConfigError: its code cannot be imported.
    """
    return tuple(getattr(REGISTRY.load(name), "inputs", ()))


def get(name: str, /, *, given: Mapping[str, Any] | None = None, **options: Any) -> EditRule:
    """The rule `name` with `options`. given: what it takes beside them (`inputs_of`).

    The options are those of its frozen dataclass: its `Config`, or the type of its field `config`, or itself where it
    is a dataclass; and the keywords that it takes where there is none.

    Raises UnknownNameError: no such rule, or no such option. ConfigError: an option's type or value, or code that
        cannot be imported or is no rule.
    """
    made, handed = REGISTRY.load(name), dict(given or {})
    missing = [each for each in getattr(made, "inputs", ()) if each not in handed]
    if missing:
        hint = "give them (`holdfast edit --grams`), or " if missing == ["grams"] else ""
        raise ConfigError(
            f"rule {name!r} takes {', '.join(missing)} beside its options, which a method of a stream hands over: "
            f"{hint}use `holdfast run` with a method that has this rule (`holdfast list methods`)."
        )
    values, where = {**REGISTRY.options(name), **options}, f"rule {name}"
    config = _config_of(made)
    if config is not None:
        return REGISTRY.made(name, made(decode(config, values, where), **handed))
    if dataclasses.is_dataclass(made):
        return REGISTRY.made(name, decode(typing.cast(type, made), values, where))
    try:
        rule = made(**values)
    except TypeError as error:
        raise ConfigError(f"{where} refused its options {values}: {error}.") from error
    return REGISTRY.made(name, rule)


def _config_of(made: Any) -> type | None:
    """The dataclass of a rule's options, where it has one of its own."""
    found = getattr(made, "Config", None)
    if found is None and dataclasses.is_dataclass(made):
        found = typing.get_type_hints(made).get("config")
    return found if isinstance(found, type) and dataclasses.is_dataclass(found) else None


__all__ = ["REGISTRY", "RULES", "EditRule", "get", "inputs_of"]
