"""SafeAnchor (Guo et al., arXiv 2604.17691): tasks are tuned off what safety is sensitive to, and drift is repaired.

OUR READING, of the abstract: (1) at the start of a task, the directions that the loss on theta_0's safe answers is most
sensitive to are found per layer, as the first eigenvectors of the sums of G G^T (outputs) and G^T G (inputs) over
samples, G a sample's gradient of the weight: a factored Fisher matrix. (2) While the task is learned, the gradient of B
is kept off those outputs and that of A off those inputs (the gradient, not the step: AdamW scales it entry by entry).
(3) Afterwards the loss on the safe answers is compared with theta_0's, so that drift adds up over tasks; where it has
risen by more than a share, the safe answers are learned for a few steps with an adapter of its own. Gradients of whole
weights are taken: meant for small models. What was found is in safety.json of the step.

A program under the paper's name differs: a Fisher matrix of every LoRA factor flattened (16 r^2 c^2 bytes and so on: no
7B model fits), 90 % of its variance, kept from task to task; a projection that gives way where the trace is small; a KL
term on safe answers, whose reference is the model being tuned, so that it is 0; drift of the refusal rate, as a judge
model sees it, by more than 5 %; 200 steps of repair on task and safe answers together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from holdfast.data.types import Sample, Stream
from holdfast.errors import ConfigError
from holdfast.files import atomic_path, write_json
from holdfast.functional.guardspace import unseen
from holdfast.methods._glue.lora_layers import live_factors
from holdfast.methods._glue.refusals import refusals
from holdfast.methods._glue.repair import repaired
from holdfast.methods._glue.sample_gradients import answer_loss, sample_gradients
from holdfast.methods.seqft import SeqFT, SeqFTConfig, draw
from holdfast.models.held import load
from holdfast.models.loaded import LoadedModel
from holdfast.stream.protocol import Checkpoint, TaskContext
from holdfast.training.supervised import lora_adapter
from holdfast.training.training_config import TrainingConfig

_SUBSPACES, _RECORD = "safety-subspaces.safetensors", "safety.json"


@dataclass(frozen=True, kw_only=True)
class SafeAnchorConfig(SeqFTConfig):
    """directions: of a layer's outputs and inputs each that a task must not use. samples: safe answers, drawn by seed.

    tolerance: share by which the loss on the safe answers may be above theta_0's, 0 or more.
    cumulative: false: above that of the model before each task, so that what is tolerated adds up.
    repair_steps: learned beyond it.
    """

    directions: int = 16
    samples: int = 32
    tolerance: float = 0.1
    cumulative: bool = field(default=True, metadata={"before": False})
    repair_steps: int = 10

    def __post_init__(self) -> None:
        for name in ("directions", "samples", "repair_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 1 or more.")
        if not self.tolerance >= 0:
            raise ConfigError(f"tolerance is {self.tolerance}; expected a share, 0 or more.")


class SafeAnchor(SeqFT):
    """SafeAnchor (arXiv 2604.17691, our reading): tuned off what safety is sensitive to, repaired where it drifts."""

    Config = SafeAnchorConfig
    config: SafeAnchorConfig

    def check_stream(self, stream: Stream) -> None:
        """Raises CalibrationError: the stream has no safe answers."""
        refusals(stream, self.name)

    def train_task(self, ctx: TaskContext) -> Checkpoint:
        """The previous checkpoint under the task's adapter, and under that of a repair where one was needed."""
        safe = draw(refusals(ctx.stream, self.name), self.config.samples, ctx.seed)
        path = ctx.scratch_dir / _SUBSPACES
        if not path.is_file():
            found, before = self._subspaces(ctx, safe)
            with atomic_path(path) as temporary:
                save_file(found, temporary, metadata={"loss": json.dumps(before)})
        else:
            before = _stored_loss(path)
        tuned = super().train_task(ctx)
        after = mean_loss(load(tuned, dtype="float32"), safe)  # as `before` was: a drift is smaller than bf16's steps
        first = self._baseline(ctx, safe, before)
        drifted = after > first * (1 + self.config.tolerance)
        write_json(ctx.work_dir / _RECORD, {"baseline": first, "before": before, "after": after, "repaired": drifted})
        if not drifted:
            return tuned
        size = min(self.config.training.batch_size, len(safe))
        return repaired(ctx, tuned, safe, self.config, steps=self.config.repair_steps, batch_size=size)

    def training_options(self, ctx: TaskContext) -> dict[str, Any]:
        """An adapter whose gradients keep off the safety subspaces."""
        subspaces = load_file(ctx.scratch_dir / _SUBSPACES)
        return {"adapter": lambda loaded, config: anchored_adapter(loaded, config, subspaces)}

    def _baseline(self, ctx: TaskContext, safe: Sequence[Sample], before: float) -> float:
        """theta_0's loss on the safe answers: `before` in the first step, and its record from then on."""
        if ctx.previous_work_dir is None or not self.config.cumulative:
            return before
        path = ctx.previous_work_dir / _RECORD
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if "baseline" in record:
            return float(record["baseline"])
        return mean_loss(load(ctx.theta_0, dtype="float32"), safe)  # the step is of an earlier version

    def _subspaces(self, ctx: TaskContext, safe: Sequence[Sample]) -> tuple[dict[str, Tensor], float]:
        outputs: dict[str, Tensor] = {}
        inputs: dict[str, Tensor] = {}
        total = 0.0
        for weights, loss in sample_gradients(ctx, ctx.previous, safe):
            total += loss
            for name, weight in weights.items():
                if name not in outputs:
                    outputs[name], inputs[name] = (weight.new_zeros(size, size) for size in weight.shape)
                if weight.grad is not None:
                    outputs[name] += weight.grad @ weight.grad.T
                    inputs[name] += weight.grad.T @ weight.grad
        found = {f"{name}/out": top_directions(value, self.config.directions) for name, value in outputs.items()}
        found |= {f"{name}/in": top_directions(value, self.config.directions) for name, value in inputs.items()}
        return {name: value.cpu().contiguous() for name, value in found.items()}, total / len(safe)


def top_directions(square: Tensor, count: int) -> Tensor:
    """Eigenvectors of a symmetric (n, n) with the `count` largest eigenvalues, as columns; fewer where it has none.

    One direction at least is left to learn with. Returns: (n, k).
    """
    values, vectors = torch.linalg.eigh(square.double())
    # What the sums were rounded to is no direction.
    rounding = square.shape[0] * torch.finfo(square.dtype).eps
    real = int((values > rounding * values.abs().max()).sum())
    kept = min(count, real, square.shape[0] - 1)
    return vectors[:, vectors.shape[1] - kept :].flip(1).to(square)


def anchored_adapter(loaded: LoadedModel, config: TrainingConfig, subspaces: Mapping[str, Tensor]) -> PeftModel:
    """A fresh LoRA whose gradients keep off `subspaces`: `<layer>/out` (r, k) and `<layer>/in` (c, k), orthonormal."""
    adapter = lora_adapter(loaded, config)
    for factors in live_factors(adapter):
        written, read = (subspaces[f"{factors.name}/{side}"].to(factors.a) for side in ("out", "in"))
        factors.a.register_hook(lambda gradient, seen=read: unseen(gradient, seen))
        factors.b.register_hook(lambda gradient, seen=written: unseen(gradient.T, seen).T)
    return adapter


def mean_loss(loaded: LoadedModel, samples: Sequence[Sample]) -> float:
    """Mean over samples of the loss on the answer."""
    with torch.no_grad():
        return sum(float(answer_loss(loaded, sample)) for sample in samples) / len(samples)


def _stored_loss(path: Path) -> float:
    with safe_open(path, framework="pt") as file:
        return float(json.loads(file.metadata()["loss"]))


__all__ = ["SafeAnchor", "SafeAnchorConfig", "anchored_adapter", "mean_loss", "top_directions"]
