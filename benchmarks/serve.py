"""Load on a running `holdfast serve`, on this machine alone: latency, throughput, memory.

    holdfast serve runs/demo/methods/cram/3-guide/cram --port 8000 &
    python benchmarks/serve.py http://127.0.0.1:8000/v1 --stream runs/demo/data/seed-0-quick/stream.yaml --pid $!

Asks the stream's test requests (texts and pictures of all tasks, mixed by a fixed seed) with 1, 8 and 32 clients, three
ways by turns on the same server, so that all see the same neighbours: routed; by name, of the expert that the router
chose (the same answers without routing); and of the base alone. Prints p50 and p99 in seconds, requests and tokens per
second, and what routing costs against both. `--requests` and `--seconds` bound each run; `--soak N` asks N more and
prints the memory of `--pid` (and its children) along the way, for `--soak-seconds` at most. Only loopback addresses are
taken.
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
    """Seconds of each answer, tokens, who answered which body, and what went wrong."""

    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    wall_s: float = 0.0
    answered_by: dict[int, str] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        ordered = sorted(self.seconds)
        if not ordered:
            return {"requests": 0, "errors": len(self.errors)}
        return {
            "requests": len(ordered),
            "errors": len(self.errors),
            "p50_s": round(statistics.median(ordered), 4),
            "p99_s": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 4),
            "requests_per_s": round(len(ordered) / self.wall_s, 3),
            "tokens_per_s": round(self.tokens / self.wall_s, 2),
        }


def drive(url: urllib.parse.SplitResult, bodies: list[dict[str, Any]], clients: int, count: int, seconds: float) -> Run:
    """`count` requests by `clients` at once, each client one at a time on a connection of its own.

    None is begun after `seconds`. bodies: asked in turn.
    """
    end = time.perf_counter() + seconds
    run, lock, next_one = Run(), threading.Lock(), iter(range(count))

    def client() -> None:
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=300)
        while True:
            with lock:
                number = next(next_one, None)
            if number is None or time.perf_counter() > end:
                return
            body = json.dumps(bodies[number % len(bodies)])
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
                run.answered_by[number % len(bodies)] = reply.get("holdfast", {}).get("answered_by", "")

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
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--kinds", type=int, default=96, help="so many different requests, asked in turn")
    parser.add_argument("--soak", type=int, default=0)
    parser.add_argument("--soak-seconds", type=float, default=600.0)
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
    bodies = [
        {"model": names[0], "messages": to_messages(sample), "max_tokens": asked.max_tokens, "temperature": 0}
        for sample in samples[: asked.kinds]
    ]
    compared = {"routed": bodies}
    # Also warms the server up.
    chosen = drive(url, bodies, 4, len(bodies), 600.0).answered_by
    if base := next((name for name in names if name.endswith(":base")), None):
        compared["by name"] = [body | {"model": f"{names[0]}:{chosen[i]}"} for i, body in enumerate(bodies)]
        compared["base"] = [body | {"model": base} for body in bodies]
        who = sorted(chosen.values())
        print(json.dumps({"answered_by": {name: who.count(name) for name in sorted(set(who))}}), flush=True)
    for clients in (int(part) for part in asked.clients.split(",")):
        runs = {name: Run() for name in compared}
        for _ in range(asked.rounds):
            for name, these in compared.items():
                one, whole = drive(url, these, clients, asked.requests, asked.seconds), runs[name]
                whole.seconds += one.seconds
                whole.errors += one.errors
                whole.tokens += one.tokens
                whole.wall_s += one.wall_s
        for name, run in runs.items():
            print(json.dumps({"clients": clients, "asked": name, **run.figures()}), flush=True)
            if run.errors:
                print(run.errors[:3], flush=True)
        routed = runs["routed"].figures()
        for name in compared:
            if name != "routed" and routed["requests"] and (other := runs[name].figures())["requests"]:
                ratio = {
                    "clients": clients,
                    "routed against": name,
                    "tokens_per_s_ratio": round(routed["tokens_per_s"] / other["tokens_per_s"], 3),
                    "p50_ratio": round(routed["p50_s"] / other["p50_s"], 3),
                    "p99_ratio": round(routed["p99_s"] / other["p99_s"], 3),
                }
                print(json.dumps(ratio), flush=True)
    soak(url, bodies, asked.soak, asked.soak_seconds, asked.pid)


def soak(
    url: urllib.parse.SplitResult, bodies: list[dict[str, Any]], count: int, seconds: float, pid: int | None
) -> None:
    """`count` requests by 16 clients within `seconds`, with the memory of a process after every 500."""
    end, done = time.perf_counter() + seconds, 0
    while done < count and (left := end - time.perf_counter()) > 0:
        run = drive(url, bodies, 16, min(500, count - done), left)
        done += len(run.seconds) + len(run.errors)
        said: dict[str, Any] = {"asked": done, "errors": len(run.errors)}
        if pid:
            said["memory_mb"] = round(memory_mb(pid), 1)
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
