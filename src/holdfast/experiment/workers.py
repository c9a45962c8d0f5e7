"""Methods of one run side by side, each in its own process; results are those of running them one after another.

The calling process is one of the workers. The others are told which method is next on their standard input, and tell
their progress on their standard output, one JSON object a line. A worker whose parent is gone sees its input end and
stops at once, so that a killed run leaves nothing behind that still writes.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from holdfast import errors, registry
from holdfast.config import decode, encode
from holdfast.errors import HoldfastError, RunError
from holdfast.experiment.resolve import Experiment, Progress, resolve
from holdfast.experiment.run_config import RunConfig
from holdfast.failures import explain, keep, keep_traceback, report_bug


def run_methods(experiment: Experiment, names: Sequence[str], *, jobs: int) -> None:
    """Run `names` in at most `jobs` processes, this one included, while `experiment.held()`.

    Raises: what a method raised, in whichever process; the others are stopped, and resume on the next call.
    """
    queue = deque(names)
    lock = threading.Lock()

    def take() -> str | None:
        with lock:
            return queue.popleft() if queue else None

    workers = [_Worker(experiment, take) for _ in range(min(jobs, len(names)) - 1)]
    try:
        while (name := take()) is not None and not any(w.error for w in workers):
            experiment.run_method(name)
        for worker in workers:
            worker.join()
        for worker in workers:
            if worker.error is not None:
                raise worker.error
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """One process, and the thread that feeds it methods and passes on its progress."""

    def __init__(self, experiment: Experiment, take: Callable[[], str | None]) -> None:
        self.error: HoldfastError | None = None
        self._progress = experiment.progress
        self._take = take
        self._said = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from holdfast.experiment.workers import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            bufsize=1,
        )
        job = {
            "names": encode(registry.export()),
            "config": encode(experiment.config),
            "out": str(experiment.out),
            "methods": list(experiment.methods),
        }
        self._thread = threading.Thread(target=self._feed, args=(job,), daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def stop(self) -> None:
        """End the process; a run that stops because of an error does not wait for the others."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._thread.join()
        for pipe in (self._process.stdin, self._process.stdout, self._said):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _feed(self, job: dict[str, Any]) -> None:
        try:
            self._send(job)
            while (name := self._take()) is not None:
                self._send({"method": name})
                if not self._follow():
                    return
            self._send({"method": None})
        except (BrokenPipeError, ValueError):
            self.error = self.error or self._died()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _follow(self) -> bool:
        """Pass on progress until the method is done; False when it failed."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            if "event" in message:
                self._progress(message.pop("event"), **message)
            elif "error" in message:
                kind = getattr(errors, message["error"], RunError)
                self.error = kind(message["message"])
                return False
            else:
                return True
        self.error = self._died()
        return False

    def _died(self) -> RunError:
        self._process.wait()
        self._said.seek(0)
        said = self._said.read().strip()
        last = said.splitlines()[-1:] or ["it said nothing"]
        code = self._process.returncode
        how = "was killed (by the system, where the memory is used up)" if code == -9 else f"ended with status {code}"
        where = keep(said, "All it said", "nothing of it is kept") if "\n" in said else ""
        return RunError(f"A worker process {how}: {last[0]:.300}. {where}".rstrip())


def main() -> None:
    """A worker: jobs in, progress out. Nothing else may write to the standard output, so it is moved away first."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def tell(**message: Any) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    commands: deque[str | None] = deque()
    ready = threading.Semaphore(0)

    def listen() -> None:
        for line in sys.stdin:
            commands.append(json.loads(line)["method"])
            ready.release()
        os._exit(1)  # the parent is gone; whatever is half done resumes

    job = json.loads(sys.stdin.readline())
    threading.Thread(target=listen, daemon=True).start()
    try:
        experiment = _prepare(job, lambda event, **values: tell(event=event, **values))
        while True:
            ready.acquire()
            name = commands.popleft()
            if name is None:
                os._exit(0)
            experiment.run_method(name)
            tell(done=name)
    except HoldfastError as error:
        tell(error=type(error).__name__, message=str(error))
        os._exit(2)
    except Exception as error:  # noqa: BLE001 (the worker's boundary: its parent shows the sentence)
        said = explain(error)
        tell(error="RunError", message=report_bug(error) if said is None else f"{said}\n{keep_traceback(error)}")
        os._exit(1)


def _prepare(job: dict[str, Any], progress: Progress) -> Experiment:
    registry.restore(job["names"])
    config = decode(RunConfig, job["config"])
    set_threads(config.threads)
    return resolve(config, Path(job["out"]), methods=job["methods"], progress=progress)


def set_threads(threads: int | None) -> None:
    """Bound the CPU threads of this process; sums in another number of threads may differ in the last bit."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
