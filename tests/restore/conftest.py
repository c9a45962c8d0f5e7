"""The shipped example: the aligned model, an adapter that loosened its refusals, and requests of the embedded world."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from holdfast.cli.samples import read_samples
from holdfast.restore.run import RestoreConfig, Restored, restore
from holdfast.restore.search import Budget
from holdfast.restore.sets import RestoreSets, own_ids, split
from holdfast.tiny.example import ExampleFiles, write_example

CONFIG = RestoreConfig(strengths=(0.1, 0.35, 1.0, 4.0), whole_curve=True, tokens=48, batch_size=64)


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> ExampleFiles:
    return write_example(tmp_path_factory.mktemp("restore") / "example", requests=24)


@pytest.fixture(scope="session")
def sets(example: ExampleFiles) -> RestoreSets:
    counts = {"safety": (8, 32), "benign": (8, 24), "task": (48, 24)}
    files = {"safety": example.forbidden, "benign": example.benign, "task": example.task}
    return RestoreSets(
        **{
            name: split(
                own_ids(read_samples(path), name),
                None,
                calibrate=counts[name][0],
                probes=counts[name][1],
                seed=0,
                what=name,
            )
            for name, path in files.items()
        }
    )


@dataclass(frozen=True)
class Done:
    """A restore that was run once for all tests."""

    result: Restored
    out: Path


@pytest.fixture(scope="session")
def done(example: ExampleFiles, sets: RestoreSets, tmp_path_factory: pytest.TempPathFactory) -> Done:
    out = tmp_path_factory.mktemp("restored") / "out"
    result = restore(str(example.before), str(example.after), sets, out=out, budget=Budget(), config=CONFIG)
    return Done(result, out)
