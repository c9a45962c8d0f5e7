"""`holdfast route` and `holdfast merge-experts` on a pico CRAM folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import cram_kit
from holdfast.cli import app
from holdfast.errors import ConfigError
from holdfast.models.encode import encode_request
from holdfast.models.load import load
from holdfast.stream.protocol import Checkpoint
from holdfast.tuners.cram.folder import save_pretrained
from holdfast.tuners.cram.guard import Evidence, Guard


@pytest.fixture(scope="module")
def world(pico_folder: Path, tmp_path_factory) -> tuple[Path, Path, dict]:
    """A CRAM folder, a file of requests, and the samples behind it."""
    folder = tmp_path_factory.mktemp("world")
    samples = cram_kit.requests(folder)
    cram = cram_kit.with_experts(load(pico_folder), samples)
    save_pretrained(cram, folder / "cram")
    rows = [
        {"id": s.id, "prompt": s.prompt, "answer": "x", **({"image": s.images[0].name} if s.images else {})}
        for s in (samples["warm"][0], samples["maths"][1], samples["cold"][2])
    ]
    (folder / "requests.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder / "cram", folder / "requests.jsonl", samples


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)


def test_route_names_the_expert_of_each_request(world):
    folder, requests, _ = world
    result = run("route", folder, requests, "--json")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [max(r["weights"], key=r["weights"].get) for r in rows] == ["warm", "maths", "cold"]


def test_route_says_when_the_base_answers_alone(world):
    folder, _, samples = world
    result = run("route", folder, "--prompt", "ZZZZ QQQQ", "--image", samples["warm"][0].images[0])
    assert result.exit_code == 0, result.output
    assert "base answers" in " ".join(result.stdout.split())


def test_route_wants_one_kind_of_request(world):
    result = run("route", world[0])
    assert isinstance(result.exception, ConfigError)
    assert "Pass a file of SAMPLES, or one request with --prompt" in str(result.exception)


@pytest.mark.parametrize("export", ["adapter", "dense"])
def test_one_merged_expert_answers_as_the_routed_model(world, pico_folder, tmp_path, export):  # (i)
    folder, _, samples = world
    out = tmp_path / "merged"
    result = run("merge-experts", folder, "--expert", "warm", "--out", out, "--export", export)
    assert result.exit_code == 0, result.output
    assert "exact for every request that is routed to warm" in " ".join(result.output.split())
    merged = load(Checkpoint(base=str(pico_folder), adapters=(str(out),)) if export == "adapter" else str(out))
    routed = load(Checkpoint(base=str(pico_folder), adapters=(str(folder),)))
    inputs = encode_request(merged, samples["warm"][:2])
    with torch.no_grad(), routed.serving(samples["warm"][:2]):
        expected = routed.model(**inputs).logits[:, -1]
        torch.testing.assert_close(merged.model(**inputs).logits[:, -1], expected, rtol=1e-3, atol=1e-3)


def test_a_mean_merge_reports_weights_and_drift(world, tmp_path):
    folder, requests, _ = world
    result = run("merge-experts", folder, "--samples", requests, "--out", tmp_path / "mean")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "mean" / "merge.json").read_text())
    assert sum(record["weights"].values()) == pytest.approx(1, abs=1e-4)
    assert record["drift"]["kl"] > 0 and record["drift"]["requests"] == 3
    assert "drift over 3 requests" in result.output


def test_merge_needs_to_know_what_to_merge(world, tmp_path):
    for arguments, message in ((("--out", tmp_path / "a"), "Name one --expert, or pass --samples"),):
        result = run("merge-experts", world[0], *arguments)
        assert isinstance(result.exception, ConfigError) and message in str(result.exception)


def test_a_merge_says_that_the_guard_stays_behind(world, pico_folder, tmp_path):
    samples = world[2]
    cram = cram_kit.with_experts(load(pico_folder), samples)
    asked = samples["warm"]
    seen = Evidence(log_odds=torch.linspace(-1, 1, len(asked)))
    cram.guard = Guard(
        form="openings",
        false_alarm=0.1,
        openings=(5,),
        opening_texts=(cram.loaded.tokenizer.decode([5]),),
        refusals=seen,
        tasks={"warm": seen},
        threshold=9.0,
        caught=0.0,
        screened={"warm": 0},
    )
    save_pretrained(cram, tmp_path / "guarded")
    result = run("merge-experts", tmp_path / "guarded", "--expert", "warm", "--out", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    assert "The guard does not come with it" in " ".join(result.output.split())
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["guard"] == "dropped"
