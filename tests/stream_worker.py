"""Processes that work on runs together, as a launcher starts them: one that ends in trouble takes the others along.

A job is {"file", "out", "fsdp", "kill"}. kill: [rank, event, step, count]: the process of this rank ends at once when
it hears the event of this step so many times.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from holdfast import experiment

# Written by every process, each its own: answers of an evaluation in the making, the trainer's random numbers.
SHARED = ("predictions", "trainer")


def listener(kill: list[Any] | None) -> Callable[..., None]:
    heard: Counter[tuple[str, Any]] = Counter()

    def progress(event: str, **values: Any) -> None:
        heard[event, values.get("step")] += 1
        if kill and kill[0] == int(os.environ["RANK"]) and heard[kill[1], kill[2]] == kill[3]:
            os._exit(9)

    return progress


def watch_writes(out: Path) -> list[str]:
    """What this process writes below `out`, as it goes on."""
    written: list[str] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if opened or event in ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            path = str(args[1] if event == "os.rename" else args[0])
            if path.startswith(str(out)) and not any(name in path for name in SHARED):
                written.append(f"{event} {path}")

    sys.addaudithook(hook)
    return written


def work(jobs: list[dict[str, Any]]) -> None:
    for job in jobs:
        written = watch_writes(Path(job["out"]))
        config = experiment.read_run(job["file"])
        experiment.run(config, job["out"], shard=job.get("fsdp", False), progress=listener(job.get("kill")))
        if os.environ["RANK"] != "0" and written:
            raise AssertionError(f"not the first process, but it wrote {written[:5]}")


def together(jobs: str, port: int, world: int = 2) -> None:
    """Run `jobs` in `world` forks of this process. Raises RuntimeError: what the first one that failed said."""
    os.environ |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    reading, writing = os.pipe()
    ranks = {}
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            status = 0
            try:
                work(json.loads(jobs))
            except BaseException as error:  # noqa: BLE001 (told to whoever started it)
                os.write(writing, f"rank {rank}: {type(error).__name__}: {error}\n"[:2000].encode())
                status = 1
            os._exit(status)
        ranks[pid] = rank
    os.close(writing)
    failed = ""
    while ranks:
        pid, status = os.wait()
        rank = ranks.pop(pid)
        if status and not failed:
            failed = f"rank {rank} ended with {os.waitstatus_to_exitcode(status)}"
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    with os.fdopen(reading) as said:
        if failed:
            raise RuntimeError(f"{failed}: {said.read()}")
