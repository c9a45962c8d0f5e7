"""A pico LLaVA, requests of two kinds, and experts that do something."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cram_kit
from holdfast.data.types import Sample
from holdfast.models.load import load
from holdfast.models.loaded import LoadedModel
from holdfast.tuners.cram.model import Cram


@pytest.fixture(scope="session")
def base(pico_folder: Path) -> LoadedModel:
    return load(pico_folder)


@pytest.fixture(scope="session")
def requests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Sample]]:
    return cram_kit.requests(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def make(base: LoadedModel) -> Iterator[Callable[..., Cram]]:
    """Builds a CRAM with experts on the shared base, and takes it off again after the test."""
    made: list[Cram] = []

    def build(loaded: LoadedModel = base, **kwargs: Any) -> Cram:
        made.append(cram_kit.with_experts(loaded, **kwargs))
        return made[-1]

    yield build
    for cram in made:
        cram.detach()
