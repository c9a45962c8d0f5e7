"""The page "What is read, what is refused" is what the code says, and what it says of pictures holds."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from holdfast.data import items
from holdfast.data.images import PICTURE_FORMS, _rgb

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def maker() -> Any:
    spec = importlib.util.spec_from_file_location("what_is_read", DOCS / "what_is_read.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_committed_page_is_what_the_code_says(maker: Any) -> None:
    assert (DOCS / "what-is-read.md").read_text(encoding="utf-8") == maker.page(), "run: python docs/what_is_read.py"


def test_every_table_of_the_code_is_on_the_page(maker: Any) -> None:
    page = maker.page()
    for key in (
        *items.REFUSED_KEYS,
        *items.SPOKEN_KEYS,
        "coin_scienceqa",
        "vlguard",
        "playground/Instructions_Original",
    ):
        assert f"`{key}`" in page, key
    for form in PICTURE_FORMS:
        assert form.name in page and form.sentence in page
    assert "## Adapters" in page and "## Checkpoints" in page


@pytest.mark.parametrize("mode", [mode for form in PICTURE_FORMS for mode in form.modes])
def test_every_mode_on_the_page_becomes_its_8_bit_picture(mode: str) -> None:
    """A grey ramp in whatever mode is a grey ramp of 8 bits, and not white."""
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (8, 1))
    grey = Image.fromarray(ramp)
    deep = ramp.astype(np.uint16) * 257
    by_bytes = {"I;16": "<u2", "I;16L": "<u2", "I;16B": ">u2"}
    if mode in by_bytes:
        image = Image.frombytes(mode, grey.size, deep.astype(by_bytes[mode]).tobytes())
    elif mode in ("I", "F"):
        image = Image.fromarray(deep.astype(np.int32) if mode == "I" else ramp.astype(np.float32))
    elif mode == "LAB":
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(grey.convert("RGB"), srgb, lab, outputMode="LAB")
    elif mode in ("La", "RGBa"):
        image = grey.convert("LA" if mode == "La" else "RGBA").convert(mode)
    elif mode == "PA":
        image = grey.convert("P").convert("PA")
    else:
        image = grey.convert(mode)
    expected = np.asarray(grey.convert("1").convert("L") if mode == "1" else grey).astype(int)
    for upright in (True, False):
        made = _rgb(image, upright=upright)
        assert made.mode == "RGB"
        assert np.abs(np.asarray(made).astype(int) - expected[..., None]).max() <= 3
