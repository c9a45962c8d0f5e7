"""Sizes as people write them."""

from __future__ import annotations

import pytest

from holdfast.cli.units import parse_bytes, parse_memory
from holdfast.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GiB", 8 * 2**30), ("512 MB", 512 * 10**6), ("1.5gib", 3 * 2**29), ("4096", 4096), ("2 kib", 2048)],
)
def test_a_size_is_a_number_with_a_unit(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "lots", "8 GiBs", "-1GB", "0", "GB", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not understood; write a number with B, MB, GB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [("0.5B", "below one byte"), ("0.9", "below one byte"), ("0.0001kB", "below one byte"), ("9" * 400, "beyond any")],
)
def test_a_size_is_at_least_a_byte_and_finite(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"{why}.*write a number with B, MB, GB"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["1", "80", "80B", "24 kB", "1023.9KiB", "1048575", "0.9MiB"])
def test_memory_without_its_unit_is_asked_for_one(text: str) -> None:
    number = text.rstrip("BKkMi ")
    with pytest.raises(ConfigError) as caught:
        parse_memory(text, "--memory")
    told = f"--memory {text} is {parse_bytes(text)} bytes; expected a size such as {number}GiB."
    assert str(caught.value) == told


@pytest.mark.parametrize("text", ["1MiB", "1048576", "1.05 MB", "80GB", "0.5GiB"])
def test_memory_that_a_device_may_have_is_read_as_any_size(text: str) -> None:
    assert parse_memory(text, "--memory") == parse_bytes(text)
