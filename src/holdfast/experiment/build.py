"""Names of a run file -> methods that are ready to run, and what else it looks up by name."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from holdfast import judges, registry, scorers
from holdfast import methods as method_registry
from holdfast.data import readers
from holdfast.errors import UnknownNameError, nearest, unknown_name
from holdfast.experiment.run_config import RunConfig, label_of
from holdfast.registry import Registry
from holdfast.stream.protocol import Method


def build_methods(config: RunConfig, names: Sequence[str] | None = None) -> dict[str, Method]:
    """The methods of a run (or those named), ready to run.

    Raises: UnknownNameError: no such method, or a default that no method has.
    """
    registry.load_plugins(config.plugins)
    chosen = list(config.methods) if names is None else [n if n in config.methods else label_of(n) for n in names]
    for label in chosen:
        if label not in config.methods:
            raise unknown_name("method of this run", label, config.methods)
    built = {label: _build_method(config, label) for label in chosen}
    known = {key for label in config.methods for key in _option_names(config.method_of(label))}
    for key in config.defaults:
        # A default of methods that this run leaves out is no mistake; importing all of them takes a moment.
        if key not in known:
            known = {key for name in method_registry.METHODS for key in _option_names(name)}
        if key not in known:
            hint = nearest(key, known)
            raise UnknownNameError(
                f"defaults.{key}: no method has this option."
                + (f" Did you mean {hint!r}?" if hint else "")
                + f" Known: {', '.join(sorted(known))}."
            )
    return built


def _build_method(config: RunConfig, label: str) -> Method:
    name = config.method_of(label)
    own = {key: value for key, value in config.methods[label].items() if key != "method"}
    shared = {key: _members(name, key, value) for key, value in config.defaults.items() if key in _options(name)}
    return method_registry.get(name, label=label, defaults=shared, **own)


def _options(name: str) -> set[str]:
    return set(method_registry.config_of(name).__dataclass_fields__)


def _members(name: str, key: str, value: Any) -> Any:
    """Of a group of defaults (`edit`) those that the method's own kind of the group has.

    What no method has stays, so that it is refused by its name.
    """
    own = _group(name, key)
    others = set(value) - own if isinstance(value, Mapping) and own else set()
    if others:
        everywhere = {member for method in method_registry.METHODS for member in _group(method, key)}
        return {member: v for member, v in value.items() if member not in others & everywhere}
    return value


def _group(name: str, key: str) -> set[str]:
    """Names inside the group `key` of a method's options, old ones too; none where it is no group."""
    hint = typing.get_type_hints(method_registry.config_of(name)).get(key)
    if not (isinstance(hint, type) and is_dataclass(hint)):
        return set()
    return {f.name for f in fields(hint)} | set(getattr(hint, "__old_names__", {}))


def _option_names(name: str) -> set[str]:
    """Option names of a method, none of one that does not exist: another run of the file may leave it out."""
    try:
        return _options(name)
    except UnknownNameError:
        return set()


def parts_of(config: RunConfig, labels: Sequence[str] | None = None) -> list[tuple[str, Registry, str]]:
    """(what, registry, name) of everything that a run looks up by name, each once.

    labels: of the methods that count; None: all of the file.
    """
    stream, injected = config.stream, config.injection
    tasks = config.used_tasks()
    pools = [
        pool
        for pool in (stream.safety_calibration, stream.benign_calibration, injected.pool if injected else None)
        if pool
    ]
    formats = [*(task.format for task in tasks), *(pool.format for pool in pools)]
    asked = (config.safety_calibration.prompts, config.benign_calibration.prompts)
    sets = [*stream.safety, *(prompts for prompts in asked if prompts)]
    if config.safety_gate is not None:
        sets.append(config.safety_gate.probe)
    found = [
        *(("methods", method_registry.REGISTRY, config.method_of(label)) for label in labels or config.methods),
        *(("judges", judges.REGISTRY, judge.name) for judge in config.evaluation.judges),
        *(("scorers", scorers.REGISTRY, task.scorer) for task in tasks),
        *(("readers", readers.REGISTRY, name) for name in formats),
        *(("safety_readers", readers.SAFETY_REGISTRY, spec.format) for spec in sets),
    ]
    return list(dict.fromkeys(found))
