"""The patterns of an adapter's configuration: matched as PEFT does, within a bound on time.

Python's engine tries alternatives one after another, so a pattern of twenty characters can keep it busy for ever; an
adapter from the internet brings its patterns along. All of them are tried when the adapter is opened, on the names of
its own modules, also those that only PEFT will match when it loads the result.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from holdfast.bounds import bounded
from holdfast.errors import AdapterError
from holdfast.text import one_line

MATCH_SECONDS = 3.0
# Trainers that list modules in one pattern stay far below.
MAX_PATTERN = 100_000

# field -> what PEFT matches a module's name with (`tuners_utils.check_target_module_exists`, `get_pattern_key`)
_WHOLE = "(?:{})\\Z"
_END = r"(.*\.)?({})$"
_LAYERS = r".*\.{}\.(\d+)\."
_ANYWHERE = r"(^|.*\.){}($|\..*)"
# Of other kinds than LoRA, or of a later PEFT: what is called so holds patterns, as text, in a list or as keys.
_PATTERN_FIELD = re.compile(r"(_|^)(modules?|patterns?|parameters?|layers?)$|^(target|exclude|modules)_")


def values_by_module(patterns: Mapping[str, Any], modules: Sequence[str], *, where: str) -> dict[str, Any]:
    """module -> the value of the first pattern that matches the end of its name; the others are left out.

    Raises: AdapterError: no regular expression, or one that takes too long; `where` names its place.
    """
    found: dict[str, Any] = {}
    with bounded(f"{where}: matching its patterns", seconds=MATCH_SECONDS, error=AdapterError):
        for pattern, value in patterns.items():
            compiled = _compile(pattern, _END, where)
            for module in modules:
                if module not in found and compiled.match(module):
                    found[module] = value
    return found


def try_patterns(config: Mapping[str, Any], names: Iterable[str], *, where: str) -> None:
    """Match the patterns that PEFT will match once it loads the adapter, in every field that has some.

    Raises: AdapterError: a value of another kind, no regular expression, or one that takes too long.
    """
    fields: list[tuple[str, str, str]] = []
    for name in ("target_modules", "exclude_modules"):
        value = config.get(name)
        if isinstance(value, str):
            fields.append((name, value, _WHOLE))
        elif value is not None and not _is_texts(value):
            raise AdapterError(f"{where}: {name} is {one_line(repr(value), 80)}; expected a pattern or names.")
    layers = config.get("layers_pattern")
    if layers is not None and not isinstance(layers, str) and not _is_texts(layers):
        raise AdapterError(f"{where}: layers_pattern is {one_line(repr(layers), 80)}; expected text or a list of it.")
    fields += [("layers_pattern", text, _LAYERS) for text in ([layers] if isinstance(layers, str) else layers or ())]
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name) or {}
        if not isinstance(patterns, Mapping):
            raise AdapterError(f"{where}: {name} is {one_line(repr(patterns), 80)}; expected {{pattern: number}}.")
        fields += [(name, pattern, _END) for pattern in patterns]
    told = {"target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"}
    for name, value in config.items():
        if name in told or not _PATTERN_FIELD.search(name):
            continue
        if isinstance(value, str):
            fields.append((name, value, _WHOLE))
        # PEFT puts some of these names into patterns (`modules_to_save`).
        texts = value if isinstance(value, list | Mapping) else ()
        fields += [(name, text, _ANYWHERE) for text in texts if isinstance(text, str) and not _is_plain(text)]
    tried = list(names)
    with bounded(f"{where}: matching its patterns", seconds=MATCH_SECONDS, error=AdapterError):
        for name, pattern, form in fields:
            compiled = _compile(pattern, form, f"{where}: {name}")
            for module in tried:
                compiled.match(module)


def _is_plain(text: str) -> bool:
    """Whether a name is matched as it stands: nothing in it repeats or chooses."""
    return re.fullmatch(r"[\w.\-/ ]*", text) is not None


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _compile(pattern: str, form: str, where: str) -> Any:
    if len(pattern) > MAX_PATTERN:
        raise AdapterError(f"{where} has a pattern of {len(pattern)} characters; expected at most {MAX_PATTERN}.")
    try:
        compiled = re.compile(form.format(pattern))
        main = threading.current_thread() is threading.main_thread()
        return compiled if main else _Timed(form.format(pattern), where)
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterError(
            f"{where} has {one_line(pattern, 120)!r}, which is no regular expression ({one_line(str(error), 120)}); "
            "expected the end of a module's name."
        ) from error


class _Timed:
    """A pattern for a thread that no signal reaches: another engine, which looks at the clock itself."""

    def __init__(self, pattern: str, where: str) -> None:
        import regex

        self._pattern, self._where = regex.compile(pattern, flags=regex.V0), where

    def match(self, text: str) -> bool:
        try:
            return self._pattern.match(text, timeout=MATCH_SECONDS) is not None
        except TimeoutError:
            raise AdapterError(
                f"{self._where}: matching does not end within {MATCH_SECONDS:g} s, and was stopped."
            ) from None
