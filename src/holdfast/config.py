"""One strict decoder from plain data (YAML, JSON) to frozen dataclasses, and back.

An unknown key is an error that names the nearest known one; a wrong type says where it stands, what was found and what
was expected. Nothing here knows a particular configuration: dataclasses live next to the code that they configure.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from holdfast.errors import ConfigError, UnknownNameError, nearest

T = TypeVar("T")
C = TypeVar("C", bound=Callable[..., Any])

# Old name -> its new one; where the values changed too, with what an old value is now.
OldNames = Mapping[str, str | tuple[str, Callable[[Any], Any]]]


def accepts_old_names(**old: str | tuple[str, Callable[[Any], Any]]) -> Callable[[C], C]:
    """A function, or a dataclass and its run files, that still takes arguments by the names of an earlier version.

    A dataclass answers to the old names, too, with the new values.

    old: old name = new name, or (new name, old value -> new value). Naming both, with two values, is a ConfigError.
        Of a dataclass a new name may be "group.name", an option of the dataclass that its option `group` is now.
    """

    def decorate(target: C) -> C:
        function: Any = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]

        @functools.wraps(function)
        def renaming(*args: Any, **values: Any) -> Any:
            where = getattr(target, "__name__", "")
            return function(*args, **_made_groups(target, old, _current_names(old, values, where), where))

        if not isinstance(target, type):
            return renaming  # type: ignore[return-value]
        target.__init__ = renaming  # type: ignore[misc]
        target.__old_names__ = old  # type: ignore[attr-defined]
        for name, entry in old.items():
            setattr(target, name, property(attrgetter(entry if isinstance(entry, str) else entry[0])))
        return target

    return decorate


def _current_names(old: OldNames, values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    if not any(name in values for name in old):
        return values
    current = {name: value for name, value in values.items() if name not in old}
    for name in (name for name in values if name in old):
        entry = old[name]
        new, convert = (entry, None) if isinstance(entry, str) else entry
        value = values[name] if convert is None else convert(values[name])
        if new in current and current[new] != value:
            raise ConfigError(
                f"{where}: {name}={values[name]!r} is the old name of {new}, and {new}={current[new]!r} is given too. "
                f"Keep {new}."
            )
        group, _, member = new.rpartition(".")
        if group:
            current[group] = _with_member(current.get(group, {}), member, value, f"{where}: {name}", group)
        else:
            current[new] = value
    return current


def _with_member(whole: Any, member: str, value: Any, old: str, group: str) -> Any:
    """`whole`, a mapping or a dataclass, with `member` set; what a dataclass holds by default may be replaced."""
    made = dataclasses.is_dataclass(whole) and not isinstance(whole, type)
    if not made and not isinstance(whole, Mapping):
        raise ConfigError(f"{old} is now {group}.{member}, and {group} is {_show(whole)}; expected a mapping of keys.")
    found = getattr(whole, member) if made else whole.get(member, value)
    free = made and found == getattr(type(whole)(), member)
    if found != value and not free:
        raise ConfigError(
            f"{old}={value!r} is the old name of {group}.{member}, and {group}.{member}={found!r} is given too. "
            f"Keep {group}.{member}."
        )
    return dataclasses.replace(whole, **{member: value}) if made else {**whole, member: value}


def _made_groups(target: Any, old: OldNames, values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """`values` for the dataclass `target`, the groups that old names were laid into made."""
    entries = (entry if isinstance(entry, str) else entry[0] for entry in old.values())
    groups = {new.partition(".")[0] for new in entries if "." in new}
    plain = {group: values[group] for group in groups if isinstance(values.get(group), Mapping)}
    if not plain:
        return values
    hints = typing.get_type_hints(target)
    return {**values, **{group: decode(hints[group], v, f"{where}.{group}") for group, v in plain.items()}}


def current_names(cls: type, data: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """`data` for dataclass `cls` with old names replaced, at every depth: mappings are laid over another by new names.

    Raises: ConfigError: an old name and its new one, with two values.
    """
    found = dict(_current_names(getattr(cls, "__old_names__", {}), data, where or cls.__name__))
    hints = typing.get_type_hints(cls)
    for key, value in found.items():
        inner = hints.get(key)
        if isinstance(value, Mapping) and isinstance(inner, type) and dataclasses.is_dataclass(inner):
            found[key] = current_names(inner, value, f"{where}.{key}" if where else str(key))
    return found


def with_defaults(hint: Any, value: Any) -> Any:
    """What an earlier version encoded of `hint`, with the options that are new since then, at every depth.

    A new option's default means what was done before there was one, so both say the same; where the default is another,
    the option says what was (`field(default=..., metadata={"before": ...})`).

    hint: a dataclass, or a type that is made of some, such as `tuple[TaskSpec, ...]` or `GateConfig | None`.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        fitting = [arg for arg in args if with_defaults(arg, value) is not value]
        return with_defaults(fitting[0], value) if fitting else value
    if isinstance(value, Mapping):
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            return _whole(hint, value)
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return {key: with_defaults(args[1], inner) for key, inner in value.items()}
    if isinstance(value, list) and isinstance(origin, type) and issubclass(origin, Sequence):
        return [with_defaults(args[0], inner) for inner in value]
    return value


def _whole(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    hints, found = typing.get_type_hints(cls), dict(data)
    for f in dataclasses.fields(cls):
        usual: Any = f.default
        if f.default_factory is not dataclasses.MISSING:
            usual = f.default_factory()
        if f.name in found:
            if dataclasses.is_dataclass(usual):  # a group may have other defaults in `cls` than by itself
                found[f.name] = _under(usual, found[f.name])
            found[f.name] = with_defaults(hints[f.name], found[f.name])
        elif "before" in f.metadata or usual is not dataclasses.MISSING:
            found[f.name] = encode(f.metadata.get("before", usual))
    return found


def _under(usual: Any, value: Any) -> Any:
    """`value` laid over the options `usual`, where both are groups of options."""
    if not dataclasses.is_dataclass(usual) or not isinstance(value, Mapping):
        return value
    options = {f.name: f.metadata.get("before", getattr(usual, f.name)) for f in dataclasses.fields(usual)}
    given = {key: _under(getattr(usual, key, None), inner) for key, inner in value.items()}
    return {**encode(options), **given}


def decode(cls: type[T], data: Any, where: str = "") -> T:
    """Build dataclass `cls` from the mapping `data`; `where` prefixes the path in error messages.

    Raises: ConfigError: no mapping, an unknown or missing key, or a value of another type; it names the place.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or cls.__name__}: expected a mapping of keys, found {_show(data)}.")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in _current_names(getattr(cls, "__old_names__", {}), data, where or cls.__name__).items():
        place = f"{where}.{key}" if where else str(key)
        if key not in fields:
            hint = nearest(str(key), fields)
            suggestion = f" Did you mean {hint!r}?" if hint else ""
            raise UnknownNameError(f"{place}: unknown key.{suggestion} Known keys: {', '.join(sorted(fields))}.")
        values[key] = _value(hints[key], value, place)
    missing = [
        f.name
        for f in fields.values()
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where or cls.__name__}: missing key(s) {', '.join(missing)}.")
    try:
        return cls(**values)
    except ConfigError as error:
        raise type(error)(f"{where}: {error}" if where else str(error)) from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where or cls.__name__}: {error}") from error


def encode(value: Any) -> Any:
    """Plain data (dict, list, str, number, bool, None) of a dataclass, for a record or a YAML file.

    Raises: ConfigError: a value of a type that plain data have no form for.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if isinstance(value, Sequence | set | frozenset):
        return [encode(v) for v in value]
    raise ConfigError(f"cannot record a {type(value).__name__}: {value!r}.")


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        problems = []
        for arg in (a for a in args if a is not type(None)):
            try:
                return _value(arg, value, where)
            except UnknownNameError:
                raise
            except ConfigError as error:
                problems.append(str(error))
        raise ConfigError(problems[0] if len(problems) == 1 else f"{where}: found {_show(value)}, expected {hint}.")
    if origin is typing.Literal:
        # YAML 1.1 reads `off` and `on` as booleans; a user means the word.
        value = {False: "off", True: "on"}[value] if isinstance(value, bool) and {"off", "on"} & {*args} else value
        if value in args:
            return value
        hint_name = nearest(str(value), [str(a) for a in args])
        suggestion = f" Did you mean {hint_name!r}?" if hint_name else ""
        raise ConfigError(f"{where}: found {_show(value)}, expected one of {', '.join(map(str, args))}.{suggestion}")
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else decode(hint, value, where)  # type: ignore[arg-type]
    if origin in (tuple, list, Sequence) or hint in (tuple, list):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(f"{where}: found {_show(value)}, expected a list.")
        if origin is tuple and args and args[-1] is not Ellipsis:
            if len(value) != len(args):
                raise ConfigError(f"{where}: found {len(value)} values, expected {len(args)}.")
            return tuple(_value(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
        item = args[0] if args else Any
        items = [_value(item, v, f"{where}[{i}]") for i, v in enumerate(value)]
        return items if origin is list or hint is list else tuple(items)
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: found {_show(value)}, expected a mapping of keys.")
        item = args[1] if args else Any
        return {str(k): _value(item, v, f"{where}.{k}") for k, v in value.items()}
    if hint is Path:
        if not isinstance(value, str | Path):
            raise ConfigError(f"{where}: found {_show(value)}, expected a path.")
        return Path(value)
    if hint is float and isinstance(value, str | int | float) and not isinstance(value, bool):
        # YAML reads `1e-4` (no dot) as a string; a user means the number.
        try:
            number = float(value)
        except ValueError:
            raise ConfigError(f"{where}: found {_show(value)}, expected a number.") from None
        if not math.isfinite(number):
            raise ConfigError(f"{where}: found {_show(value)}, expected a finite number.")
        return number
    if isinstance(hint, type):
        if isinstance(value, hint) and not (isinstance(value, bool) and hint in (int, float)):
            return value
        raise ConfigError(f"{where}: found {_show(value)}, expected {hint.__name__}.")
    return value


def _show(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
