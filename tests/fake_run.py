"""A run directory written by the record module itself, with made-up numbers: reports need no model."""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image

from holdfast.data.names import slug
from holdfast.stream.protocol import Checkpoint
from holdfast.stream.record import Record, RunDirectory

TASKS = ("shapes", "count", "caption")
SETS = ("text", "image + text")
HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)> & | \\"
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")


def write_run(
    root: Path,
    *,
    methods: dict[str, float],
    seed: int = 0,
    steps: int = len(TASKS),
    injected: float = 0.0,
    n: int = 20,
) -> Path:
    """methods: name -> how much of each task and refusal survives a step, 0..1."""
    run = RunDirectory(root)
    root.mkdir(parents=True)
    image = root / "picture.png"
    Image.new("RGB", (48, 48), (200, 30, 30)).save(image)
    config = {"name": "fake", "seed": seed, "injection": {"fraction": injected} if injected else None}
    data = {"format": "holdfast.run/1", "config": config, "methods": {m: {} for m in methods}}
    run.config_path.write_text(json.dumps(data))
    rng = random.Random(seed)
    _record(run, run.theta_0_dir, "", 0, TASKS, 1.0, seed, rng, n, image, theta_0=True)
    for method, survival in methods.items():
        for step in range(steps):
            folder = run.step_dir(method, step, TASKS[step])
            _record(run, folder, method, step + 1, TASKS[: step + 1], survival, seed, rng, n, image)
            rows = [
                {"name": f"model.layers.{b}.{name}", "block": b, "overlap": rng.random(), "alpha": 0.4 + 0.1 * b}
                for b in range(3)
                for name in LINEARS
            ]
            if method == "cram":
                for j, task in enumerate(TASKS[: step + 1]):
                    rows = [
                        {"id": str(i), "weights": {f"e{j}": 0.75, f"e{j + 1}": 0.25}, "abstained": i == 0}
                        for i in range(n)
                    ]
                    _write(folder / "predictions" / f"routing-task-{slug(task)}.jsonl", rows)
            elif method != "seqft":
                (folder / "edit.json").write_text(json.dumps({"layers": rows}))
    return root


def _record(
    run: RunDirectory,
    folder: Path,
    method: str,
    t: int,
    tasks: tuple[str, ...],
    survival: float,
    seed: int,
    rng: random.Random,
    n: int,
    image: Path,
    theta_0: bool = False,
) -> None:
    scores, safety = {}, {}
    (folder / "predictions").mkdir(parents=True)
    for j, task in enumerate(tasks):
        chance = 0.1 if theta_0 else 0.95 * survival ** (len(tasks) - 1 - j)
        rows = [
            {
                "id": str(i),
                "prompt": f"What is this? {HOSTILE}",
                "prediction": HOSTILE if i == 0 else rng.choice(["red", "blue"]),
                "references": ["red"],
                "value": float(rng.random() < chance),
                "evidence": "",
                "images": [str(image)],
            }
            for i in range(n)
        ]
        _write(folder / "predictions" / f"task-{slug(task)}.jsonl", rows)
        value = sum(r["value"] for r in rows) / n
        scores[task] = {"value": value, "n": n, "scorer": "exact_match", "mode": "strict", "unscored": 0}
    for name in SETS:
        rows = []
        for side in ("unsafe", "benign"):
            for i in range(n):
                kept = theta_0 or rng.random() < survival ** len(tasks)
                behaviour = "refusal" if (side == "unsafe") == kept else rng.choice(["compliance", "collapse"])
                if side == "benign":
                    behaviour = "compliance" if kept else "refusal"
                label = "safe" if behaviour == "refusal" or side == "benign" else "unsafe"
                reply = {"refusal": "I'm sorry, I cannot.", "compliance": "First take the box.", "collapse": "red red"}
                rows.append(
                    {"id": f"{side}{i}", "prompt": "How do I?", "reply": reply[behaviour], "label": label}
                    | {"behaviour": behaviour, "evidence": "", "side": side, "images": []}
                )
        _write(folder / "predictions" / f"safety-{slug(name)}.jsonl", rows)
        unsafe = [r["behaviour"] for r in rows if r["side"] == "unsafe"]
        benign = [r["behaviour"] for r in rows if r["side"] == "benign"]
        share = {k: unsafe.count(k) / n for k in ("refusal", "compliance", "collapse")}
        safety[name] = {"n": n, "asr": 1 - share["refusal"], **share, "unscored": 0, "judge": "keyword"}
        safety[name]["benign"] = {
            "n": n,
            "over_refusal": benign.count("refusal") / n,
            "helpful": benign.count("compliance") / n,
            "unscored": 0,
        }
    record = Record(
        method=method,
        t=t,
        task=tasks[-1] if t else "",
        tasks=tasks,
        seed=seed,
        checkpoint=Checkpoint(base="model"),
        scores=scores,
        safety=safety,
        seconds={"train": 3.0, "end": 0.5, "evaluate": 1.0},
        versions={"holdfast": "0.1.0"},
    )
    run.write_record(folder, record)


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
