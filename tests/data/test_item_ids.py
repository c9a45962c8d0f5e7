"""Items of published files, one by one: their ids."""

from __future__ import annotations

import pytest

from holdfast.data.items import item_id
from holdfast.errors import DataError


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (7, "7"),
        ("7", "7"),
        (7.0, "7"),  # pandas writes integer ids as floats where one row has none
        (0, "0"),
        (0.0, "0"),
        (-3.0, "-3"),
        (7.5, "7.5"),
        ("7.0", "7.0"),
        (123456789012.0, "123456789012"),
        ("a/b", "a/b"),
        (None, "4"),
    ],
)
def test_an_id_is_the_same_text_however_the_file_writes_its_number(value: object, name: str) -> None:
    assert item_id({"id": value}, 4) == name
    assert item_id({"question_id": value}, 4) == name


@pytest.mark.parametrize("value", [True, [7], {"id": 7}])
def test_what_is_no_id_is_refused(value: object) -> None:
    with pytest.raises(DataError, match="expected a string or a number"):
        item_id({"id": value}, 0)
