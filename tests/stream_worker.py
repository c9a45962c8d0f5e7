"""One of several processes that work on runs together, as a launcher starts them.

`python stream_worker.py JOBS`, JOBS a JSON list of {"file", "out", "fsdp", "kill"}. kill: [rank, event, step, count]:
the process of this rank ends at once when it hears the event of this step so many times.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from holdfast import experiment


def listener(kill: list[Any] | None) -> Callable[..., None]:
    heard: Counter[tuple[str, Any]] = Counter()

    def progress(event: str, **values: Any) -> None:
        heard[event, values.get("step")] += 1
        if kill and kill[0] == int(os.environ["RANK"]) and heard[kill[1], kill[2]] == kill[3]:
            os._exit(9)

    return progress


def main() -> None:
    for job in json.loads(sys.argv[1]):
        config = experiment.read_run(job["file"])
        experiment.run(config, job["out"], shard=job.get("fsdp", False), progress=listener(job.get("kill")))


if __name__ == "__main__":
    main()
