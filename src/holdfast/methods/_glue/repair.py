"""Safe answers learned on top of a tuned model, with an adapter of their own: how `one_shot`, `safe_anchor` repair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from holdfast.data.types import Sample
from holdfast.methods.seqft import SeqFTConfig, step_seed
from holdfast.models.held import load
from holdfast.stream.protocol import Checkpoint, TaskContext
from holdfast.training.supervised import train


def repaired(
    ctx: TaskContext,
    tuned: Checkpoint,
    samples: Sequence[Sample],
    config: SeqFTConfig,
    *,
    steps: int,
    batch_size: int,
    **changes: Any,
) -> Checkpoint:
    """`tuned` under one adapter more, which learned `samples` for `steps` steps at a constant learning rate.

    No forward pass is larger than one of the task's tuning. config: of the method; changes: what of its `training` the
    repair has otherwise, such as `learning_rate`.
    """
    size = max(k for k in range(1, batch_size + 1) if batch_size % k == 0 and k <= config.training.forward_size)
    training = replace(
        config.training,
        max_steps=steps,
        batch_size=batch_size,
        micro_batch_size=size,
        schedule="constant",
        warmup_ratio=0.0,
        save_steps=None,
        max_length=None,  # the task's; theta_0's answers stay whole
        **changes,
    )
    result = train(
        load(tuned, dtype=config.train_dtype),
        samples,
        training,
        work_dir=ctx.scratch_dir / "repair",
        seed=step_seed(ctx),
        progress=ctx.progress,
    )
    return Checkpoint(base=tuned.base, adapters=(*tuned.adapters, str(result.adapter)))
