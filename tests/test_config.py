"""The strict decoder: a bad key, type or value says what to do; what is encoded decodes to itself."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.config import decode, encode, with_defaults
from holdfast.errors import ConfigError, UnknownNameError, unknown_name
from holdfast.methods import METHODS


@dataclass(frozen=True, kw_only=True)
class Inner:
    rank: int = 8
    rate: float = 1e-4


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    mode: Literal["paper", "strict"] = "strict"
    bounds: tuple[float, float] = (0.4, 0.8)
    names: tuple[str, ...] = ()
    limit: int | None = None
    root: Path = Path()

    def __post_init__(self) -> None:
        if self.bounds[0] > self.bounds[1]:
            raise ConfigError(f"bounds must rise, found {self.bounds}")


@given(
    name=st.text(min_size=1),
    rank=st.integers(1, 1000),
    low=st.floats(0, 1),
    names=st.lists(st.text(), max_size=3),
    limit=st.none() | st.integers(),
)
def test_what_is_encoded_decodes_to_itself(
    name: str, rank: int, low: float, names: list[str], limit: int | None
) -> None:
    value = Outer(name=name, inner=Inner(rank=rank), bounds=(low, 1.0), names=tuple(names), limit=limit)
    assert decode(Outer, encode(value)) == value


def _leaves(data: object, place: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(data, dict):
        return []
    return [leaf for key, value in data.items() for leaf in ((*place, key), *_leaves(value, (*place, key)))]


# What was done before there were these options, where their default is something else.
BEFORE = {"common_directions": 0.0, "scaled": True, "cumulative": False}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_an_option_that_an_earlier_version_did_not_have_is_at_its_default(name: str) -> None:
    """Of every method, every option at every depth."""
    module, _, cls = METHODS[name][0].partition(":")
    config = getattr(importlib.import_module(module), cls).Config
    needed = {f.name: "x" for f in dataclasses.fields(config) if f.default is f.default_factory is dataclasses.MISSING}
    whole = encode(config(**needed))
    for *where, option in _leaves(whole):
        earlier = copy.deepcopy(whole)
        group = functools.reduce(lambda found, key: found[key], where, earlier)
        if option not in needed:
            del group[option]
        expected = copy.deepcopy(whole)
        if option in BEFORE:
            functools.reduce(lambda found, key: found[key], where, expected)[option] = BEFORE[option]
        assert with_defaults(config, earlier) == expected, option


@dataclass(frozen=True, kw_only=True)
class Many:
    several: tuple[Inner, ...] = ()
    named: Mapping[str, Inner] = field(default_factory=dict)
    perhaps: Inner | None = None
    text: str | None = None


def test_new_options_are_found_in_lists_mappings_and_what_may_be_absent() -> None:
    earlier = {"several": [{"rank": 1}], "named": {"a": {"rank": 2}}, "perhaps": {"rank": 3}, "gone": 1}
    assert with_defaults(Many, earlier) == {
        "several": [{"rank": 1, "rate": 1e-4}],
        "named": {"a": {"rank": 2, "rate": 1e-4}},
        "perhaps": {"rank": 3, "rate": 1e-4},
        "text": None,
        "gone": 1,
    }
    assert with_defaults(Many, {"perhaps": None})["perhaps"] is None


def test_an_unknown_key_names_the_nearest_and_where_it_stands() -> None:
    with pytest.raises(UnknownNameError, match=r"run\.inner\.rnk: unknown key. Did you mean 'rank'\?"):
        decode(Outer, {"name": "x", "inner": {"rnk": 3}}, "run")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "missing key.* name"),
        ({"name": 3}, "run.name: found 3 .int., expected str"),
        ({"name": "x", "mode": "papr"}, "Did you mean 'paper'"),
        ({"name": "x", "bounds": [0.1]}, "found 1 values, expected 2"),
        ({"name": "x", "bounds": [0.9, 0.1]}, "bounds must rise"),
        ({"name": "x", "inner": {"rank": True}}, "expected int"),
        ({"name": "x", "inner": {"rate": "fast"}}, "expected a number"),
        ({"name": "x", "inner": {"rate": float("nan")}}, "inner.rate: found nan .float., expected a finite number"),
        ({"name": "x", "inner": {"rate": "inf"}}, "expected a finite number"),
        ({"name": "x", "names": "ab"}, "expected a list"),
        ({"name": "x", "inner": 3}, "expected a mapping"),
        ([], "expected a mapping"),
    ],
)
def test_bad_values_are_refused_with_the_place_and_the_expectation(data: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decode(Outer, data, "run")


def test_a_number_that_yaml_reads_as_text_is_a_number() -> None:
    assert decode(Inner, {"rate": "1e-4"}).rate == 1e-4


def test_unknown_name_lists_what_is_available() -> None:
    error = unknown_name("method", "hpaa", ["seqft", "hpa"])
    assert "Did you mean 'hpa'?" in str(error)
    assert "Available: hpa, seqft" in str(error)
