"""Sizes, ranges and choices as people write them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TypeVar

from holdfast.errors import ConfigError, unknown_name

T = TypeVar("T")

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
# Less memory than any device has: who writes it has left the unit out.
_LEAST_MEMORY = 2**20


def parse_bytes(text: str) -> int:
    """Bytes of "8GiB", "512 MB", "1.5gib" or a plain number; at least 1. Raises ConfigError."""
    match = _SIZE.fullmatch(text)
    unit = None if match is None else _UNITS.get(match[2].upper())
    value = float(match[1]) * unit if match is not None and unit is not None else 0.0
    if not 1 <= value < math.inf:
        what = "is not understood" if value == 0 else "is below one byte" if value < 1 else "is beyond any device"
        raise ConfigError(f"size {text!r} {what}; write a number with B, MB, GB, MiB or GiB, such as 8GiB.")
    return int(value)


def parse_memory(text: str, option: str) -> int:
    """Bytes of a device's memory, as `parse_bytes` reads them.

    Raises ConfigError: no size, or one below 1 MiB, as a number is whose unit was left out.
    """
    size = parse_bytes(text)
    if size < _LEAST_MEMORY:
        number = re.sub(r"[A-Za-z\s]", "", text)
        raise ConfigError(f"{option} {text} is {size} bytes; expected a size such as {number}GiB.")
    return size


def parse_rate(text: str, option: str) -> float:
    """A rate 0..1 of "3%", "3 %", "3" (percent, from 1 on) or "0.03" (below 1). Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(%?)\s*", text)
    value = float(match[1]) if match is not None else -1.0
    rate = value / 100 if match is not None and (match[2] or value >= 1) else value
    if not 0 <= rate <= 1:
        raise ConfigError(f"{option} {text!r} is not understood; write a share from 0 to 100 %, such as 3% or 0.03.")
    return rate


def parse_bounds(text: str, option: str) -> tuple[float, float]:
    """The two numbers of "5..15"; one number stands for both. Raises ConfigError."""
    low, dots, high = text.partition("..")
    try:
        return float(low), float(high if dots else low)
    except ValueError:
        raise ConfigError(f"{option} {text!r} is not understood; write two numbers as in 5..15, or one.") from None


def format_bounds(bounds: tuple[float, float]) -> str:
    """Two numbers as `parse_bounds` reads them: "5..15"."""
    return "{:g}..{:g}".format(*bounds)


def parse_choice(text: str, choices: Mapping[str, T], option: str) -> T:
    """What `text` stands for. Raises UnknownNameError: it is none of the choices."""
    if text not in choices:
        raise unknown_name(f"value of {option}", text, choices)
    return choices[text]
