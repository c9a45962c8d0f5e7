"""Mean squared gradients of every editable weight on some samples: a diagonal Fisher matrix, dense."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from holdfast.data.types import Sample
from holdfast.functional.distill import squared_gradients
from holdfast.models.encode import encode_training
from holdfast.models.families import editable_linears
from holdfast.models.held import load
from holdfast.stream.protocol import Checkpoint, TaskContext


def mean_squared_gradients(ctx: TaskContext, model: Checkpoint, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Of each sample's loss on its answer, in fp32, one sample at a time. Layer name -> (r, c) on the CPU.

    Meant for small models: as many values as there are weights are held beside them.
    """
    loaded = load(model, dtype="float32")
    weights = {name: linear.weight for name, linear in editable_linears(loaded.model).items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    total = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    for number, sample in enumerate(samples, 1):
        inputs = {k: v.to(loaded.device) for k, v in encode_training(loaded, [sample]).items()}
        loaded.model.zero_grad()
        loaded.model(**inputs).loss.backward()
        for name, square in squared_gradients(weights).items():
            total[name] += square
        ctx.progress("calibrate", done=number, total=len(samples))
    # As it came: a run may hold the model for its next phase.
    loaded.model.requires_grad_(False)
    loaded.model.zero_grad(set_to_none=True)
    return {name: summed.cpu() / len(samples) for name, summed in total.items()}
