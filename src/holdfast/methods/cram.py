"""CRAM: one expert per task on a frozen base, as large as the task needs, found by centroids (arXiv 2606.02502).

Nothing learned is ever overwritten: a task adds a LoRA of adaptive rank and a card to the router. The released
checkpoint is theta_0 under one folder of experts. The tuner is `holdfast.tuners.cram`; here it meets the training loop
and the stream. Options of `training` that make a LoRA (rank, alpha, dropout) are `cram`'s business here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from holdfast.data.types import Sample, Stream
from holdfast.errors import CalibrationError, ConfigError
from holdfast.files import write_json
from holdfast.methods.seqft import SeqFTConfig, draw, step_seed, training_samples
from holdfast.models.held import load
from holdfast.models.loaded import LoadedModel
from holdfast.models.tuner import is_tuner_folder
from holdfast.share import current
from holdfast.stream.protocol import Checkpoint, TaskContext
from holdfast.training.supervised import total_steps, train
from holdfast.training.training_config import TrainingConfig
from holdfast.tuners.cram.cram_config import CramConfig
from holdfast.tuners.cram.folder import load_expert
from holdfast.tuners.cram.guard import Guard, begin_guard, fit, see_task
from holdfast.tuners.cram.objective import BatchFeatures, CramTraining
from holdfast.tuners.cram.phases import Loop, Phase, Steps, TaskLearning, read_group, read_ranks


@dataclass(frozen=True, kw_only=True)
class CramMethodConfig(SeqFTConfig):
    """Options of CRAM in a stream: the tuner's, over those of tuning.

    guard: what theta_0 would refuse goes to theta_0 alone, told by the probability of its own refusal openings or by a
        linear probe on its last prompt state; needs safety calibration samples.
    guard_false_alarm: share of the tasks' requests that may go to theta_0 by mistake; sets the threshold.
    guard_requests: training requests of each task that set it, drawn by seed.
    """

    cram: CramConfig = field(default_factory=CramConfig)
    guard: Literal["off", "openings", "probe"] = "off"
    guard_false_alarm: float = 0.005
    guard_requests: int = 200

    def __post_init__(self) -> None:
        # `CramHpaConfig` has this class and another one with checks as bases.
        if post_init := getattr(super(), "__post_init__", None):
            post_init()
        if not 0 < self.guard_false_alarm < 1:
            raise ConfigError(
                f"guard_false_alarm is {self.guard_false_alarm}; expected a share between 0 and 1, such as 0.005."
            )
        if self.guard_requests < 4:
            raise ConfigError(
                f"guard_requests is {self.guard_requests}; expected 4 or more: half of them fit a probe, half set "
                "the threshold."
            )


class Cram:
    """One LoRA expert per task on a frozen base, as large as the task needs, found by centroids without a task id.

    Files in the step's folder: cram/ (the checkpoint's adapter folder), cram.json, training-<phase>.json, and with a
    guard guard.json.
    """

    Config: type[CramMethodConfig] = CramMethodConfig

    def __init__(self, config: CramMethodConfig | None = None, *, name: str = "cram") -> None:
        self.config = config or self.Config()
        self.name = name

    @property
    def together(self) -> frozenset[str]:
        """How several processes may learn a task: each with a copy of the base, which the router's features need."""
        cls = type(self)
        same = cls.train_task is Cram.train_task and cls.begin_task is Cram.begin_task
        return frozenset({"copies"} if same else ())

    def check_stream(self, stream: Stream) -> None:
        """Raises CalibrationError: a guard is wanted and the stream has no safety calibration samples."""
        if self.config.guard != "off" and not stream.safety_calibration:
            raise CalibrationError(
                f"{self.name} has guard {self.config.guard!r}, which needs safety calibration samples, and stream "
                f"{stream.name!r} has none. Give the stream `safety_calibration` prompts (theta_0 answers them "
                "itself), or set guard to off."
            )

    def begin_task(self, ctx: TaskContext) -> None:
        """Nothing to prepare."""

    def train_task(self, ctx: TaskContext) -> Checkpoint:
        """theta_0 under the new expert alone, an ordinary LoRA."""
        learning = self.learning(ctx)
        expert = learning.learn(self._loop(ctx, learning))
        return Checkpoint(base=ctx.theta_0.base, adapters=(*ctx.theta_0.adapters, str(expert)))

    def end_task(self, ctx: TaskContext, trained: Checkpoint) -> Checkpoint:
        """theta_0 under the folder of all experts so far."""
        out = ctx.work_dir / "cram"
        # The expert first: an edit measures theta_0 under it, which takes the held model for itself.
        expert = self.final_expert(ctx, trained)
        learning = self.learning(ctx)
        guard = self.guard(ctx, learning) if self.config.guard != "off" and not out.exists() else None
        card = learning.publish(out, expert=expert, guard=guard)
        if guard is not None:
            write_json(ctx.work_dir / "guard.json", guard.describe())
        write_json(
            ctx.work_dir / "cram.json",
            {
                "expert": card.name,
                "group": card.group,
                "group_decision": read_group(learning.work_dir),
                "samples": card.samples,
                "parameters": sum(a.numel() + b.numel() for a, b in load_expert(expert).values()),
                "ranks": read_ranks(learning.work_dir),
            },
        )
        return Checkpoint(base=ctx.theta_0.base, adapters=(*ctx.theta_0.adapters, str(out)))

    def final_expert(self, ctx: TaskContext, trained: Checkpoint) -> Path:
        """The expert's folder that is released: the trained one. A method that edits experts overrides this."""
        del ctx
        return Path(trained.adapters[-1])

    def guard(self, ctx: TaskContext, learning: TaskLearning) -> Guard:
        """The guard after this task: that of the folder before, or a new one, with this task's requests in it.

        Raises: CalibrationError: what `begin_guard` and `fit` say.
        """
        self.check_stream(ctx.stream)
        before, form = learning.previous_guard(), self.config.guard
        assert form != "off"
        if before is None or before.form != form:
            before = begin_guard(learning.loaded, form, list(ctx.stream.safety_calibration))
            tasks = ctx.stream.tasks[: ctx.step]
        else:
            tasks = [task for task in ctx.stream.tasks[: ctx.step] if task.name not in before.tasks]
        requests = {task.name: task.train for task in tasks} | {ctx.task_name: self.learned(ctx)}
        for name, samples in requests.items():
            before = see_task(before, learning.loaded, name, draw(samples, self.config.guard_requests, ctx.seed))
        return fit(before, false_alarm=self.config.guard_false_alarm)

    def learned(self, ctx: TaskContext) -> Sequence[Sample]:
        """What the task is learned from: its training split, without what `training.screen: drop` leaves out."""
        return training_samples(ctx, self.config, ctx.stream.tasks[ctx.step].train)

    def learning(self, ctx: TaskContext) -> TaskLearning:
        """This step's task, in whatever phase a killed run left it."""
        samples = self.learned(ctx)
        last = Path(ctx.previous.adapters[-1]) if ctx.previous.adapters else None
        return TaskLearning(
            load(ctx.theta_0, dtype=self.config.train_dtype),
            ctx.task_name,
            samples,
            self.config.cram,
            steps=Steps.of(total_steps(len(samples), self.config.training), self.config.cram.warmup_fraction),
            previous=last if last is not None and is_tuner_folder(last) else None,
            work_dir=ctx.scratch_dir,
            seed=step_seed(ctx),
        )

    def _loop(self, ctx: TaskContext, learning: TaskLearning) -> Loop:
        samples = self.learned(ctx)

        def loop(
            phase: Phase, *, steps: Steps, adapter: Callable[[], CramTraining], extras: BatchFeatures, out: Path
        ) -> None:
            made: list[CramTraining] = []

            def make(loaded: LoadedModel, config: TrainingConfig) -> Any:
                del loaded, config
                made.append(adapter())
                return made[-1]

            result = train(
                learning.loaded,
                samples,
                phase_config(self.config.training, steps, phase),
                work_dir=ctx.scratch_dir / phase.value,
                # The stable phase draws an order of its own: with the warm-up's it would see the same first samples.
                seed=2 * step_seed(ctx) + (phase is Phase.STABLE),
                out=out,
                adapter=make,
                penalty=lambda model, inputs, outputs: made[-1].penalty(model, inputs, outputs),
                extras=extras,
                progress=ctx.progress,
            )
            record = {"steps": result.steps, "cut": result.cut, "history": [dict(row) for row in result.history]}
            current().by_chief(lambda: write_json(ctx.work_dir / f"training-{phase.value}.json", record))

        return loop


def phase_config(config: TrainingConfig, steps: Steps, phase: Phase) -> TrainingConfig:
    """The training configuration of one phase of a task.

    The warm-up climbs to the learning rate as the whole task would and stays there: a cosine has hardly begun to fall
    by its end. The stable phase starts a schedule of its own, because its optimizer state is fresh.
    """
    if phase is Phase.STABLE:
        return replace(config, max_steps=steps.stable)
    climb = min(math.ceil(config.warmup_ratio * steps.total), steps.warmup - 1)
    # The loop rounds ratio * steps up; half a step less comes back to `climb` whatever the division rounds to.
    ratio = max(0.0, climb - 0.5) / steps.warmup
    return replace(config, max_steps=steps.warmup, schedule="constant_with_warmup", warmup_ratio=ratio)


__all__ = ["Cram", "CramMethodConfig", "phase_config"]
