"""One server process for all tests of this room: a pico base with three CRAM experts, asked over HTTP."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

import cram_kit
import serving_kit
from holdfast.data.types import Sample
from holdfast.models.load import load
from holdfast.tuners.cram.folder import save_pretrained


@dataclass
class World:
    """base: the pico model. cram: its CRAM folder. samples: by task. answers: of `generate`, by sample id."""

    base: Path
    cram: Path
    samples: dict[str, list[Sample]]
    answers: dict[str, str] = field(default_factory=dict)
    routes: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="package")
def world(pico_folder, tmp_path_factory) -> World:
    from holdfast.models.generate import generate

    folder = tmp_path_factory.mktemp("served")
    samples = cram_kit.requests(folder)
    loaded = load(pico_folder, device="cpu")
    cram = cram_kit.with_experts(loaded, samples)
    save_pretrained(cram, folder / "cram")
    asked = [sample for rows in samples.values() for sample in rows[:3]]
    texts = generate(replace(loaded, tuner=cram), asked, max_new_tokens=6, batch_size=1)
    return World(
        base=pico_folder,
        cram=folder / "cram",
        samples=samples,
        answers={sample.id: text for sample, text in zip(asked, texts, strict=True)},
        routes={row["id"]: row for row in cram.explain(asked)},
    )


@pytest.fixture(scope="package")
def server(world):
    made = serving_kit.started(
        str(world.cram), "--max-image-pixels", "1000000", "--max-images", "2", "--max-tokens", "64"
    )
    yield made
    serving_kit.ended(made)
