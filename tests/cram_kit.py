"""What CRAM's tests share: requests, a configuration for narrow models, experts made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import model_zoo
from holdfast.data.types import Sample
from holdfast.functional.cram import RankRule
from holdfast.models.loaded import LoadedModel
from holdfast.stream.protocol import Checkpoint, TaskContext
from holdfast.tuners.cram.cram_config import CramConfig
from holdfast.tuners.cram.model import Cram, find_targets
from holdfast.tuners.cram.router import Router, card_from_features

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "grey": (90, 90, 90)}


def config(**changes: Any) -> CramConfig:
    return CramConfig(**{"buffer_rank": 12, "rank": RankRule(r_min=2, r_max=4), "dropout": 0.0, **changes})


def requests(folder: Path) -> dict[str, list[Sample]]:
    """Per task name a few samples: two tasks that differ in their images, one that differs in its instruction."""
    shown = {name: model_zoo.picture(folder / f"{name}.png", rgb) for name, rgb in COLOURS.items()}

    def samples(task: str, prompt: str, colours: str, count: int = 12) -> list[Sample]:
        names = colours.split()
        return [
            Sample.single(f"{task}-{i}", f"{prompt} {i}", names[i % len(names)], images=[shown[names[i % len(names)]]])
            for i in range(count)
        ]

    return {
        "warm": samples("warm", "What colour is it?", "red green"),
        "cold": samples("cold", "What colour is it?", "blue grey"),
        "maths": [Sample.single(f"maths-{i}", f"1 + {i} = ... 0123456789", str(i)) for i in range(12)],
    }


def factors(loaded: LoadedModel, cfg: CramConfig, seed: int, scale: float = 0.3) -> dict[str, tuple[Tensor, Tensor]]:
    """An expert with another rank in every linear."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for i, (name, (_, linear)) in enumerate(find_targets(loaded.model, cfg).items()):
        r = 1 + (i + seed) % 4
        made[name] = (
            torch.randn(r, linear.in_features, generator=g) * scale,
            torch.randn(linear.out_features, r, generator=g) * scale,
        )
    return made


def with_experts(
    loaded: LoadedModel,
    samples: dict[str, list[Sample]] | None = None,
    groups: tuple[int, ...] | None = None,
    **changes: Any,
) -> Cram:
    """A CRAM whose experts are random factors, placed by `samples` (task name -> training samples)."""
    cfg = config(**{"held_out": 0.25, **changes})
    tasks = samples or {}
    experts = [factors(loaded, cfg, seed) for seed in range(len(tasks))]
    empty = Cram(loaded, Router(cfg))
    try:
        router = Router(cfg)
        for i, (name, rows) in enumerate(tasks.items()):
            features = empty.features(rows)
            card, held = card_from_features(name, 0, features, cfg, seed=0)
            decision = router.decide(features.text[~held])
            group = router.group_count if decision.group is None else decision.group
            if groups is not None:
                group = groups[i]
            ranks = {linear: a.shape[0] for linear, (a, _) in experts[i].items()}
            router = router.adding(replace(card, group=group, ranks=ranks))
    finally:
        empty.detach()
    return Cram(loaded, router, experts)


def loop_reference(cram: Cram, weights: Tensor, x: Tensor, name: str) -> Tensor:
    """`W x + sum_e pi_e B_e A_e x`, expert by expert."""
    linear = dict(cram.loaded.model.named_modules())[name]
    y = torch.nn.functional.linear(x, linear.weight, linear.bias)
    for e, expert in enumerate(cram.experts):
        a, b = (t.to(x) for t in expert[name])
        y = y + weights[:, e, None, None] * (x @ a.T @ b.T)
    return y


def context(
    stream: Any, base: Path, folder: Path, step: int, previous: Checkpoint | None = None, **changes: Any
) -> TaskContext:
    """Task `step` of `stream`, as the runner would hand it to a method; files go below `folder`."""
    theta_0 = Checkpoint(base=str(base))
    work_dir = folder / str(step)
    work_dir.mkdir(parents=True, exist_ok=True)
    return TaskContext(
        stream=stream,
        step=step,
        task_names=tuple(t.name for t in stream.tasks[: step + 1]),
        theta_0=theta_0,
        previous=previous or theta_0,
        work_dir=work_dir,
        previous_work_dir=folder / str(step - 1) if step else None,
        seed=5,
        **changes,
    )


def rewrite(folder: Path, change: Callable[[dict], object]) -> None:
    """Change router.json."""
    data = json.loads((folder / "router.json").read_text())
    change(data)
    (folder / "router.json").write_text(json.dumps(data))


def rewrite_tensors(folder: Path, change: Callable[[dict], object]) -> None:
    """Change router.safetensors."""
    tensors = load_file(folder / "router.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "router.safetensors")
