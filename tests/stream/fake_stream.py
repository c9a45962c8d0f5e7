"""A stream with a fake method and evaluator: slow, journalled, resumable work, no torch. Also a script to be killed."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from holdfast.files import write_json
from holdfast.stream.protocol import Checkpoint, TaskContext
from holdfast.stream.record import RunDirectory
from holdfast.stream.runner import StreamRun

TASKS = ("count", "read aloud", "caption")


class FakeMethod:
    """Weights are a chain of digests over (seed, task, chunk): any lost or repeated piece of work changes the bytes."""

    def __init__(self, name: str = "fake", *, pause_s: float = 0.0, journal: Path | None = None) -> None:
        self.name, self.pause_s, self.journal = name, pause_s, journal

    def note(self, line: str) -> None:
        if self.journal is not None:
            with self.journal.open("a") as file:
                file.write(line + "\n")

    def begin_task(self, ctx: TaskContext) -> None:
        self.note(f"{self.name} {ctx.step} begin")
        time.sleep(self.pause_s)
        write_json(ctx.carry_dir / "state.json", {"after": ctx.step})
        if ctx.previous_carry_dir is not None:
            assert json.loads((ctx.previous_carry_dir / "state.json").read_text()) == {"after": ctx.step - 1}

    def train_task(self, ctx: TaskContext) -> Checkpoint:
        self.note(f"{self.name} {ctx.step} train")
        start = Path(ctx.previous.base, "weights").read_bytes()
        digest = hashlib.sha256(start + f"{ctx.seed} {ctx.task_name}".encode()).digest()
        chunks = b""
        for i in range(10):
            time.sleep(self.pause_s)
            digest = hashlib.sha256(digest + bytes([i])).digest()
            chunks += digest
            ctx.progress("train", done=i + 1, total=10)
        folder = ctx.scratch_dir / "trained"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weights").write_bytes(chunks)
        return Checkpoint(base=str(folder))

    def end_task(self, ctx: TaskContext, trained: Checkpoint) -> Checkpoint:
        self.note(f"{self.name} {ctx.step} end")
        folder = ctx.work_dir / "checkpoint"
        folder.mkdir(parents=True, exist_ok=True)
        time.sleep(self.pause_s)
        (folder / "weights").write_bytes(Path(trained.base, "weights").read_bytes()[::-1])
        write_json(ctx.work_dir / "edit.json", {"step": ctx.step})
        return Checkpoint(base=str(folder))


class FakeEvaluator:
    """Appends one answer per line; goes on after the lines that are there."""

    def __init__(self, pause_s: float = 0.0) -> None:
        self.pause_s = pause_s

    def __call__(self, checkpoint: Checkpoint, *, stream: Any, step: int | None, out_dir: Path, progress: Any) -> Any:
        weights = Path(checkpoint.base, "weights").read_bytes()
        tasks = stream[: len(stream) if step is None else step + 1]
        scores = {}
        out_dir.mkdir(parents=True, exist_ok=True)
        for task in tasks:
            path = out_dir / f"task-{task}.jsonl"
            done = len(path.read_text().splitlines()) if path.exists() else 0
            with path.open("a") as file:
                for i in range(done, 3):
                    time.sleep(self.pause_s)
                    file.write(hashlib.sha256(weights + task.encode() + bytes([i])).hexdigest() + "\n")
                    file.flush()
            value = int(path.read_text()[:4], 16) / 0xFFFF
            scores[task] = {"value": value, "n": 3, "scorer": "fake", "mode": "strict", "unscored": 0}
        asr = {"n": 10, "asr": 0.1, "refusal": 0.9, "compliance": 0.1, "collapse": 0.0, "unscored": 0}
        return {"scores": scores, "safety": {"forbidden": {**asr, "benign": {"n": 10, "over_refusal": 0.0}}}}


def make_run(out: Path, **changes: Any) -> StreamRun:
    theta_0 = changes.pop("start", out.parent / "start")
    theta_0.mkdir(parents=True, exist_ok=True)
    (theta_0 / "weights").write_bytes(b"start")
    values = {
        "directory": RunDirectory(out),
        "stream": TASKS,
        "task_names": TASKS,
        "theta_0": Checkpoint(base=str(theta_0)),
        "seed": 0,
        "config": {"stream": {"name": "fake", "tasks": list(TASKS)}, "training": {"lr": 0.001}},
        "methods": {"fake": {"rank": 4}},
    }
    return StreamRun(**{**values, **changes})


def main(out: Path, start: Path, pause_s: float) -> None:
    run = make_run(out, start=start)
    evaluator = FakeEvaluator(pause_s)
    with run.claimed():
        print("running", flush=True)
        run.evaluate_theta_0(evaluator)
        run.run_method(FakeMethod(pause_s=pause_s, journal=out.parent / "journal"), evaluator)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
