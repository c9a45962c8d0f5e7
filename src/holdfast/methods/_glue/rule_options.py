"""Glue between a method's options and its rule's: a run file names both on one level."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

T = TypeVar("T")


def part_of(config: Any, options: type[T]) -> T:
    """Those of a method's options that are its rule's: `config` has every field of the dataclass `options`.

    Raises: ConfigError: as `options` itself, a value that it does not take.
    """
    return options(**{f.name: getattr(config, f.name) for f in fields(options)})  # type: ignore[arg-type]
