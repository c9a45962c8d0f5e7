"""Gradients of every editable weight, one sample at a time; and their mean squares, a diagonal Fisher matrix, dense."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from holdfast.data.types import Sample
from holdfast.functional.distill import squared_gradients
from holdfast.models.encode import encode_cut
from holdfast.models.families import editable_linears
from holdfast.models.held import load
from holdfast.models.loaded import LoadedModel
from holdfast.stream.protocol import Checkpoint, TaskContext


def sample_gradients(
    ctx: TaskContext, model: Checkpoint, samples: Sequence[Sample], *, cut_at: int | None = None
) -> Iterator[tuple[dict[str, Tensor], float]]:
    """(layer name -> weight (r, c) with its gradient in `grad`, loss) of each sample's loss on its answer, in fp32.

    Meant for small models: a gradient is as large as its weight. A weight that the sample does not reach has none.
    cut_at: tokens at which the samples were cut when they were learned (`max_length`).
    """
    loaded = load(model, dtype="float32")
    weights = {name: linear.weight for name, linear in editable_linears(loaded.model).items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        for number, sample in enumerate(samples, 1):
            loaded.model.zero_grad()
            loss = answer_loss(loaded, sample, cut_at)
            loss.backward()
            yield weights, float(loss.detach())
            ctx.progress("calibrate", done=number, total=len(samples))
    finally:
        # As it came: a run may hold the model for its next phase.
        loaded.model.requires_grad_(False)
        loaded.model.zero_grad(set_to_none=True)


def answer_loss(loaded: LoadedModel, sample: Sample, cut_at: int | None = None) -> Tensor:
    """The model's loss on a sample's answer, its mean over the answer's tokens, shape ()."""
    inputs = {name: value.to(loaded.device) for name, value in encode_cut(loaded, [sample], cut_at)[0].items()}
    loss: Tensor = loaded.model(**inputs).loss
    return loss


def mean_squared_gradients(
    ctx: TaskContext, model: Checkpoint, samples: Sequence[Sample], *, cut_at: int | None = None
) -> dict[str, Tensor]:
    """Of each sample's loss on its answer, in fp32. Layer name -> (r, c) on the CPU.

    A loss is a mean over an answer's tokens, as it is learned: a long answer counts no more than a short one.

    Meant for small models: as many values as there are weights are held beside them.
    """
    total: dict[str, Tensor] = {}
    for weights, _ in sample_gradients(ctx, model, samples, cut_at=cut_at):
        total = total or {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
        for name, square in squared_gradients(weights).items():
            total[name] += square
    return {name: summed.cpu() / len(samples) for name, summed in total.items()}
