"""Every rival has as many tries as every other, each of them a run file that decodes, and the best is what is taken."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from holdfast.experiment import decode_run
from holdfast.tiny.recipe import run_data

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import choose

    return choose


def test_every_rival_has_as_many_tries_and_each_is_a_run_file(choose: Any, tmp_path: Path) -> None:
    counts = {method: len(tries) for method, tries in choose.TRIES.items()}
    assert set(counts.values()) == {5}
    rows = {name: row for method in choose.TRIES for name, row in choose.tries_of(method).items()}
    plain = run_data(BENCHMARKS / "nothing.yaml", [], seed=0)
    plain |= {"methods": rows, "stream": {"name": "s", "tasks": [{"name": "t", "test": "t.json"}]}}
    decoded = decode_run(plain, base=tmp_path).methods
    assert set(decoded) == set(rows)
    for method in choose.TRIES:
        said = [json.dumps(decoded[name], sort_keys=True, default=str) for name in choose.tries_of(method)]
        assert len(set(said)) == len(said), f"two tries of {method} are one"


def test_the_best_is_taken_only_where_all_were_tried(choose: Any, tmp_path: Path, monkeypatch: Any) -> None:
    options = choose.parse(["--methods", "ewc,lwf", "--out", str(tmp_path)])
    tmp_path.mkdir(exist_ok=True)

    def figures(_: Any, row: str) -> dict[str, Any] | None:
        method, _, place = row.partition("-")
        if (method, place) == ("lwf", "4"):
            return None
        safer = 0.4 if place == "2" else 0.0
        return {
            "ap": {"value": 0.5 + 0.01 * int(place)},
            "masr": {"value": 0.5 - safer},
            "over_refusal": {"value": 0.1},
        }

    monkeypatch.setattr(choose, "figures_of", figures)
    choose.publish(options)
    assert json.loads((tmp_path / "chosen.json").read_text()) == {"ewc": {"method": "ewc", "weight": 1e3}}
    text = (tmp_path / "choose.md").read_text()
    assert "| ewc | **weight: 1000.0** |" in text and text.count("| lwf |") == 4
