"""Load on a running `holdfast serve`, on this machine alone: latency, throughput, memory.

    holdfast serve runs/demo/methods/cram/3-guide/cram --port 8000 &
    python benchmarks/serve.py http://127.0.0.1:8000/v1 --stream runs/demo/data/seed-0-quick/stream.yaml --pid $!

Asks the stream's test requests (texts and pictures of all tasks, mixed by a fixed seed) with 1, 8 and 32 clients,
routed and then of the base alone on the same server, alternately, so that both see the same neighbours. Prints p50 and
p99 in seconds, requests and tokens per second, and what routing costs. `--requests` bounds each run; `--soak N` asks N
more and prints the memory of `--pid` (and its children) along the way. Only loopback addresses are taken.
"""

from __future__ import annotations

import argparse
import http.client
import ipaddress
import json
import random
import statistics
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from holdfast.data.streams import load_stream
from holdfast.serving.check import to_messages


@dataclass
class Run:
    """Seconds of each answer, tokens, and what went wrong."""

    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    wall_s: float = 0.0

    def figures(self) -> dict[str, Any]:
        ordered = sorted(self.seconds)
        return {
            "requests": len(ordered),
            "errors": len(self.errors),
            "p50_s": round(statistics.median(ordered), 4),
            "p99_s": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 4),
            "requests_per_s": round(len(ordered) / self.wall_s, 3),
            "tokens_per_s": round(self.tokens / self.wall_s, 2),
        }


def drive(url: urllib.parse.SplitResult, model: str, bodies: list[dict[str, Any]], clients: int, count: int) -> Run:
    """`count` requests by `clients` at once, each client one at a time on a connection of its own."""
    run, lock, next_one = Run(), threading.Lock(), iter(range(count))

    def client() -> None:
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=300)
        while True:
            with lock:
                number = next(next_one, None)
            if number is None:
                return
            body = json.dumps({**bodies[number % len(bodies)], "model": model})
            began = time.perf_counter()
            try:
                connection.request("POST", f"{url.path}/chat/completions", body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                reply = json.loads(response.read())
            except (OSError, ValueError, http.client.HTTPException) as error:
                connection.close()
                with lock:
                    run.errors.append(repr(error))
                continue
            with lock:
                if response.status != 200:
                    run.errors.append(f"{response.status}: {reply['error']['message'][:100]}")
                    continue
                run.seconds.append(time.perf_counter() - began)
                run.tokens += reply["usage"]["completion_tokens"]

    threads = [threading.Thread(target=client) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run.wall_s = time.perf_counter() - began
    return run


def memory_mb(pid: int) -> float:
    """Resident megabytes of a process and its children."""
    process = psutil.Process(pid)
    return sum(p.memory_info().rss for p in [process, *process.children(recursive=True)]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--stream", type=Path, required=True)
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--soak", type=int, default=0)
    parser.add_argument("--pid", type=int)
    asked = parser.parse_args()
    url = urllib.parse.urlsplit(asked.url.rstrip("/"))
    host = url.hostname or ""
    if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
        raise SystemExit(f"{host} is not this machine; load is made on loopback addresses only.")
    with_models = http.client.HTTPConnection(host, url.port, timeout=60)
    with_models.request("GET", f"{url.path}/models")
    names = [row["id"] for row in json.loads(with_models.getresponse().read())["data"]]
    stream = load_stream(asked.stream, parts=("test",), safety=False)
    samples = [sample for task in stream.tasks for sample in task.test]
    random.Random(0).shuffle(samples)
    bodies = [{"messages": to_messages(sample), "max_tokens": asked.max_tokens, "temperature": 0} for sample in samples]
    compared = [names[0], *[name for name in names if name.endswith(":base")]]
    for name in compared:
        drive(url, name, bodies, 4, 8)  # warm
    for clients in (int(part) for part in asked.clients.split(",")):
        runs = {name: Run() for name in compared}
        for _ in range(asked.rounds):
            for name in compared:
                one, whole = drive(url, name, bodies, clients, asked.requests), runs[name]
                whole.seconds += one.seconds
                whole.errors += one.errors
                whole.tokens += one.tokens
                whole.wall_s += one.wall_s
        for name, run in runs.items():
            print(json.dumps({"clients": clients, "model": name, **run.figures()}), flush=True)
            if run.errors:
                print(run.errors[:3])
        if len(compared) > 1:
            routed, base = (runs[name].figures() for name in compared)
            ratio = {
                "clients": clients,
                "tokens_per_s_ratio": round(routed["tokens_per_s"] / base["tokens_per_s"], 3),
                "p99_ratio": round(routed["p99_s"] / base["p99_s"], 3),
            }
            print(json.dumps(ratio), flush=True)
    for done in range(0, asked.soak, 500):
        run = drive(url, names[0], bodies, 16, min(500, asked.soak - done))
        said: dict[str, Any] = {"asked": done + len(run.seconds), "errors": len(run.errors)}
        if asked.pid:
            said["memory_mb"] = round(memory_mb(asked.pid), 1)
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
