"""A rule and its options, from the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from holdfast.rules.base import EditRule

# HPA's own flags by the option that each sets.
HPA_FLAGS = {
    "keep_bounds": "keep",
    "focus_ratio": "focus",
    "alpha_bounds": "alpha",
    "ranking": "ranking",
    "curvature_form": "curvature_form",
    "projection": "projection",
}

_FLAG_OF = {flag: flag.replace("_", "-") for flag in HPA_FLAGS.values()}


def read_rule(
    context: typer.Context,
    name: str,
    pairs: Sequence[str],
    file: Path | None,
    *,
    flags: Mapping[str, Any],
    given: Mapping[str, Any] | None = None,
) -> EditRule:
    """The rule `name` with the options of `file`, and over them those of `pairs` ("key=value", the value as in YAML).

    given: what the rule takes beside its options (`rules.inputs_of`).
    flags: values of HPA's own flags, by option; for HPA a flag that was given counts like a pair. `context` tells
    which were.

    Raises: ConfigError: a pair without "=", a file that holds no mapping, or one of HPA's flags with another rule.
        UnknownNameError: no such rule, or no such option.
    """
    from holdfast import rules
    from holdfast.errors import ConfigError
    from holdfast.methods import lay_over

    values = lay_over(_of_file(file) if file is not None else {}, _of_pairs(pairs))
    # By name: typer brings a click of its own.
    sources = {option: context.get_parameter_source(flag) for option, flag in HPA_FLAGS.items()}
    own = [option for option, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if name != "hpa":
        if own:
            flag = HPA_FLAGS[own[0]].replace("_", "-")
            raise ConfigError(f"--{flag} is an option of rule hpa, not of {name}; use --set KEY=VALUE.")
        return rules.get(name, given=given, **values)
    twice = sorted(set(own) & set(values))
    if twice:
        flag = HPA_FLAGS[twice[0]].replace("_", "-")
        raise ConfigError(f"{twice[0]} is set twice: by --{flag}, and by --set or --options. Leave one of them out.")
    return rules.get(name, **{option: flags[option] for option in own}, **values)


def preset_rule(context: typer.Context, name: str) -> str:
    """The rule of a preset, whose options are its defaults. Raises ConfigError: another flag sets rule or options."""
    from holdfast.cli.presets import PRESETS
    from holdfast.errors import ConfigError

    for parameter, flag in {"rule": "rule", "set_": "set", "options": "options", **_FLAG_OF}.items():
        source = context.get_parameter_source(parameter)
        if source is not None and source.name == "COMMANDLINE":
            raise ConfigError(
                f"--preset {name} stands for a rule with all its options, and --{flag} sets one; leave one of them out "
                f"(--rule {PRESETS[name].rule} --{flag} ... does as you say)."
            )
    return PRESETS[name].rule


def _of_file(path: Path) -> dict[str, Any]:
    from holdfast.data.streams import read_yaml
    from holdfast.errors import ConfigError

    data = read_yaml(path)  # JSON is YAML too
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path}: found {data!r:.60}, expected a mapping from option names to values.")
    return {str(key): value for key, value in data.items()}


def _of_pairs(pairs: Sequence[str]) -> dict[str, Any]:
    from holdfast.errors import ConfigError
    from holdfast.files import parse_yaml
    from holdfast.methods import lay_over

    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {pair}: expected KEY=VALUE, such as --set factor=0.5 or --set edit.alpha=1.")
        value = parse_yaml(text, f"--set {key.strip()}: {text!r:.80}")
        for part in reversed(key.strip().split(".")):
            value = {part: value}
        found = lay_over(found, value)
    return found
