"""The process of one cell of a grid, and where such processes run: here, or wherever `Places` puts them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from holdfast import registry
from holdfast.config import decode
from holdfast.errors import HoldfastError, RunError
from holdfast.experiment.run_config import RunConfig
from holdfast.failures import explain

MISTAKE = 2  # exit status of a cell that says what is wrong with it: starting it again would say it again
# It gets the job as one line of JSON, and stops when its input ends.
LOOK = (sys.executable, "-c", "from holdfast.experiment.cell_process import look; look()")
COMMAND = (sys.executable, "-c", "from holdfast.experiment.cell_process import main; main()")


class Places(Protocol):
    """Where the processes of cells run, in the folder that a job names as `cwd`. Called from several threads."""

    def run(self, job: Mapping[str, Any]) -> tuple[int, str]:
        """(status, what it said on stderr) of one process, when it has ended; whatever ended it, it did not raise."""

    def stop(self) -> None:
        """End those that run now; none is started any more."""


class StoppedError(Exception):
    """The sweep ends; no cell is started any more."""


class HereProcesses:
    """Processes of this machine, ended with this one."""

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self._command = list(command)
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, job: Mapping[str, Any]) -> tuple[int, str]:
        """(status, what it said on stderr). Raises: StoppedError."""
        if (cwd := job.get("cwd")) is not None and not Path(cwd).is_dir():
            return MISTAKE, (
                f"{socket.gethostname()} has no folder {cwd}, from which the sweep was started. Start it from one that "
                "every machine sees."
            )
        with tempfile.TemporaryFile(mode="w+") as said:
            process = self._start(said, job.get("cwd"))
            try:
                assert process.stdin is not None
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(json.dumps(job) + "\n")
                    process.stdin.flush()
                # The pipe stays open meanwhile: its end would tell the cell that nobody waits for it any more.
                status = process.wait()
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
            finally:
                with self._lock:
                    self._running.discard(process)
            said.seek(0)
            return status, said.read()

    def stop(self) -> None:
        """End those that run now; none is started any more."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.kill()

    def _start(self, said: IO[str], cwd: str | None) -> subprocess.Popen[str]:
        with self._lock:
            if self._stopped:
                raise StoppedError
            process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said, text=True, cwd=cwd
            )
            self._running.add(process)
            return process


def look() -> None:
    """A process that says whether the finished cells on standard input are what a run of today would go on with.

    Exit status MISTAKE, and a sentence on stderr: one is not. Data that cannot be read any more are not held against a
    cell: they were there when it was made.
    """
    from holdfast.experiment.resolve import resolve

    job = _job()
    registry.restore(job["names"])
    for cell in job["cells"]:
        try:
            resolve(decode(RunConfig, cell["config"]), Path(cell["out"])).refuse_changed()
        except RunError as error:
            _end(str(error), MISTAKE)
        except HoldfastError:
            continue
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            _end(f"{cell['out']}: a record in it is damaged ({type(error).__name__}: {error}). Remove it.", MISTAKE)
    os._exit(0)


def _job() -> dict[str, Any]:
    """What is on standard input; from now on the process ends when that does."""
    job: dict[str, Any] = json.loads(sys.stdin.readline())

    def watch() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    return job


def _end(sentence: str, status: int) -> None:
    # In one line: the sweep shows the last one.
    print(" ".join(sentence.split()), file=sys.stderr, flush=True)
    os._exit(status)


def main() -> None:
    """The process of one cell: a job on standard input; ends when that does."""
    # Inside: a place on another machine imports this module to start processes, not to run a cell itself.
    from holdfast.experiment.execute import run
    from holdfast.experiment.workers import set_threads

    job = _job()
    try:
        registry.restore(job["names"])
        config = decode(RunConfig, job["config"])
        set_threads(config.threads)
        run(config, Path(job["out"]))
    except Exception as error:
        sentence = explain(error)
        if sentence is None:  # a bug: its traceback is what is said, and the cell is started again
            raise
        _end(sentence, MISTAKE if isinstance(error, HoldfastError) else 1)
    os._exit(0)


__all__ = ["COMMAND", "MISTAKE", "HereProcesses", "Places", "StoppedError"]
