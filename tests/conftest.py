"""One microscopic model and one microscopic stream for every test that runs the whole path."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings

from fork_server import ForkServer
from holdfast.data.types import Stream

# Limits of a process, named pipes and kills as POSIX has them are what these test, from their first import on.
if sys.platform == "win32":
    collect_ignore = ["cli/test_hostile.py", "checkpoints/test_hostile.py", "test_bounds.py"]

# No test reaches for the network. huggingface_hub reads this once, when it is first imported, which is later than here.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Wall-clock says nothing about a property on a shared machine: a busy neighbour would fail a right test.
settings.register_profile("holdfast", deadline=None)
settings.load_profile("holdfast")


@pytest.fixture(scope="session")
def pico_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import model_zoo  # transformers: seconds, only for the tests that need it

    return model_zoo.save("llava", tmp_path_factory.mktemp("pico") / "llava")


@pytest.fixture(scope="session")
def pico_stream(tmp_path_factory: pytest.TempPathFactory) -> Stream:
    import pico

    return pico.stream(tmp_path_factory.mktemp("pico-stream"))


# The guard's child reads a result in a clean process: six seconds of imports, and hundreds of tests edit. A server that
# has only imported forks one each. `tests/restore` runs the real command.
_CHILD = "holdfast.editing.verify.child"
_PROGRAM = f"""
import os, peft, transformers
from transformers import AutoModelForImageTextToText, AutoProcessor
from {_CHILD} import main as child
def main(path, folder):
    os.chdir(folder)
    child(path)
"""


@pytest.fixture(scope="session")
def children() -> Iterator[list[ForkServer]]:
    """The server of forked guard processes, once one was asked for."""
    started: list[ForkServer] = []
    yield started
    for server in started:
        server.__exit__()


@pytest.fixture(autouse=True)
def _quick_child(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, children: list[ForkServer]) -> None:
    if request.path.parent.name == "restore" or not hasattr(os, "fork"):
        return

    def run(command: list[str], **rest: Any) -> subprocess.CompletedProcess[str]:
        if _CHILD not in command:
            return subprocess.run(command, **rest)
        if not children:
            children.append(ForkServer(_PROGRAM))
        status, error = children[0].run(command[-1], str(Path.cwd()))
        return subprocess.CompletedProcess(command, status, stdout="", stderr=error)

    monkeypatch.setattr("holdfast.editing.verify.compare.subprocess", SimpleNamespace(run=run))
