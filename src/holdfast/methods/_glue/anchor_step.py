"""Glue of the anchored edit in a stream: Gram matrices of one step on disk, and what is kept of them for the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from holdfast.calibration.curvature import adapted_layers, model_identity
from holdfast.calibration.gram_sets import GramSets, collect_grams
from holdfast.checkpoints.gram_store import GramStore, require_same, running_mean
from holdfast.data.types import Sample
from holdfast.methods.seqft import EditingConfig, benign_answers, calibration_sets
from holdfast.rules.anchor import AnchorConfig
from holdfast.stream.protocol import Checkpoint, TaskContext

PAST_FOLDER = "past-grams"


@dataclass(frozen=True, kw_only=True)
class AnchorMethodConfig(EditingConfig):
    """Options of the anchored edit in a stream: the edit's, over those of tuning and calibration.

    Of `calibration` only `tokens` and `batch_size` are used: the edit has a damping of its own, and every Gram is a
    mean per token.
    """

    edit: AnchorConfig = field(default_factory=lambda: AnchorConfig(benign_share=0.6))
    benign_samples: int | None = None
    screen: bool = True


def step_grams(
    ctx: TaskContext,
    config: AnchorMethodConfig,
    name: str,
    *,
    before: Checkpoint,
    after: Checkpoint,
    samples: Sequence[Sample],
) -> GramSets:
    """The Gram matrices of one step: safety on `before`, the task on `after`, earlier tasks as their steps kept them.

    The task's are kept for the next step (in its mean with those of earlier tasks), second moments alone; the others go
    with the step's scratch folder. name: of the method that asks. samples: of the task, to draw from.

    Raises: CalibrationError: what the edit rests on is not there.
    """
    apart = config.edit.benign_share is not None
    safety, task = calibration_sets(ctx, config, name, samples, benign=not apart)
    benign = benign_answers(ctx.stream, config, name) if apart else []
    folder = ctx.scratch_dir / "grams"

    def collect(what: str, source: Checkpoint, samples: Sequence[Sample], cut_at: int | None = None) -> GramStore:
        return collect_grams(
            source,
            samples,
            folder / what,
            tokens=config.calibration.tokens,
            batch_size=config.calibration.batch_size,
            changed=adapted_layers(before, after),
            dtype=config.calibration_dtype,
            cut_at=cut_at,
            progress=lambda event, done, total, **rest: ctx.progress("calibrate", done=done, total=total),
        )

    found = {
        "safety": collect("safety", before, safety),
        "task": collect("task", after, task, config.training.max_length),
    }
    if benign:
        found["benign"] = collect("benign", before, benign)
    if not config.edit.past_weight:
        return GramSets(**found)
    past = _past(ctx)
    running_mean(past, found["task"], ctx.carry_dir / PAST_FOLDER, _past_meta(ctx, ctx.task_names))
    return GramSets(**found, past=past)


def _past(ctx: TaskContext) -> GramStore | None:
    """The mean Gram matrices of the tasks before this one. Raises CalibrationError: of another stream, or gone."""
    if ctx.previous_carry_dir is None:
        return None
    store = GramStore.open(ctx.previous_carry_dir / PAST_FOLDER)
    kept = {key: value for key, value in store.meta.items() if key != "steps"}
    require_same(kept, _past_meta(ctx, ctx.task_names[:-1]), store.folder)
    return store


def _past_meta(ctx: TaskContext, tasks: Sequence[str]) -> Mapping[str, Any]:
    identity = model_identity(ctx.theta_0)
    return {
        "of": "tasks",
        "tasks": list(tasks),
        "stream": ctx.stream.name,
        "theta_0": [identity["fingerprint"], *(a["fingerprint"] for a in identity["adapters"])],
        "seed": ctx.seed,
        "normalization": "token",
    }


__all__ = ["PAST_FOLDER", "AnchorMethodConfig", "step_grams"]
