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


def look_at_shards(model: str, adapter: str) -> None:
    """A process holds its half of every block, and the answers are those of the whole model."""
    import torch

    from holdfast.checkpoints.value import Checkpoint
    from holdfast.data.types import Sample
    from holdfast.models import held
    from holdfast.models.encode import encode_request
    from holdfast.models.families import decoder_blocks
    from holdfast.models.generate import generate
    from holdfast.models.load import load
    from holdfast.models.processes import joined
    from holdfast.models.shards import is_sharded

    with joined(shard=True) as share:
        source = Checkpoint(base=model, adapters=(adapter,))
        loaded, whole = held.load(source), load(source, device="cpu")
        assert is_sharded(loaded.model) and not is_sharded(whole.model)
        for (name, block), (_, other) in zip(decoder_blocks(loaded.model), decoder_blocks(whole.model), strict=True):
            mine = sum(p.to_local().numel() for p in block.parameters())
            parts = share.total(mine)
            assert parts == sum(p.numel() for p in other.parameters()) and 0.4 < mine / parts < 0.6, name
        asked = [Sample.single(f"s{i}", f"Which colour, number {i}?") for i in range(3)]
        with torch.no_grad():
            logits = [m.model(**encode_request(m, asked)).logits for m in (loaded, whole)]
        assert torch.equal(*logits)
        assert generate(loaded, asked, max_new_tokens=4) == generate(whole, asked, max_new_tokens=4)
        # Each with as many passes as the other, over requests of its own.
        assert len(generate(loaded, asked[share.rank : share.rank + 1], max_new_tokens=2)) == 1


def work(jobs: list[dict[str, Any]]) -> None:
    for job in jobs:
        if "shards" in job:
            look_at_shards(**job["shards"])
            continue
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
