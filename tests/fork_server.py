"""Processes to be killed, without an import of torch for each: one server imports once and forks a child per call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

_LOOP = """
import json, os, signal, sys, time
import torch
torch.set_num_threads(1)  # a forked child has no OpenMP workers to hand work to
print("ready", flush=True)
for line in sys.stdin:
    arguments, kill_after_s = json.loads(line)
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            main(*arguments)
        except BaseException as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
            code = 1
        os._exit(code)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(pid, signal.SIGKILL)  # not waited for yet, so the number is still the child's
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps({"status": status}), flush=True)
"""


class ForkServer:
    """`program` defines main(*arguments), given as strings and numbers; each call runs it in a fresh fork."""

    def __init__(self, program: str) -> None:
        # After this folder whatever the tests themselves import from.
        path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-c", program + _LOOP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def run(self, *arguments: object, kill_after_s: float | None = None) -> tuple[int, str]:
        """Exit status (negative: the signal) and the error's text; SIGKILL after a while where asked for."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([arguments, kill_after_s], default=str) + "\n")
        self._process.stdin.flush()
        error = ""
        while line := self._process.stdout.readline():
            message = json.loads(line)
            error = message.get("error", error)
            if "status" in message:
                return message["status"], error
        raise RuntimeError("the server ended")

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.communicate()
