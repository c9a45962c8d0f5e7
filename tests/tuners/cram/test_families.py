"""CRAM on every family: the right expert answers, alone as in a batch, with and without an image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cram_kit
import model_zoo
from holdfast.models.encode import encode_request
from holdfast.models.families import decoder_blocks
from holdfast.models.generate import generate
from holdfast.models.load import load
from holdfast.models.loaded import LoadedModel


@pytest.fixture(params=list(model_zoo.BUILDERS))
def family(request: pytest.FixtureRequest, tmp_path: Path) -> LoadedModel:
    return load(model_zoo.save(request.param, tmp_path / "model"), device="cpu")


def test_each_request_gets_its_expert_alone_and_in_a_batch(family, requests):
    tasks = {name: requests[name] for name in ("warm", "maths")}
    if family.family.needs_image:
        tasks["maths"] = [replace(s, images=requests["cold"][0].images) for s in tasks["maths"]]
    cram = cram_kit.with_experts(family, tasks)
    assert len(cram.layers) == 4 * len(decoder_blocks(family.model)), "q, k, v and o of every decoder block"
    loaded = replace(family, tuner=cram)
    samples = [tasks["warm"][0], tasks["maths"][3]]
    for name, rows in tasks.items():
        for row in cram.explain(rows[:2]):
            assert max(row["weights"], key=row["weights"].get) == name
    together = generate(loaded, samples, max_new_tokens=3)
    assert together == [generate(loaded, [s], max_new_tokens=3)[0] for s in samples]
    inputs = encode_request(loaded, samples[:1])
    with torch.no_grad():
        with cram.serving(samples[:1]):
            routed = loaded.model(**inputs).logits[:, -1]
        with cram.forced({"warm": 1.0}):
            torch.testing.assert_close(loaded.model(**inputs).logits[:, -1], routed, rtol=1e-4, atol=1e-4)
        with cram.base_alone():
            assert float((loaded.model(**inputs).logits[:, -1] - routed).abs().max()) > 1e-3
