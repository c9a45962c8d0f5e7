"""SeqFT: plain sequential tuning, the method that every other is measured against, and the frame of those that edit.

A fresh LoRA per task on the merged model, merged in fp32, and on to the next task. A method that edits weights after a
task is this class with another `rule`; one that learns in another way overrides `train_task`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from holdfast import judges
from holdfast.calibration.curvature import CalibrationConfig, collect_curvature
from holdfast.calibration.screening import Screened, screen
from holdfast.checkpoints.curvature_file import Curvature
from holdfast.checkpoints.merged import weight_bytes
from holdfast.data.types import Sample, Stream
from holdfast.editing.editor import edit_checkpoint
from holdfast.errors import CalibrationError, ConfigError, unknown_name
from holdfast.files import require_space, write_json
from holdfast.judges.base import finds_refusals
from holdfast.methods._glue.refusals import refusals
from holdfast.models.held import load
from holdfast.rules.base import EditRule
from holdfast.rules.keep import KeepUpdate
from holdfast.share import current
from holdfast.stream.protocol import Checkpoint, TaskContext
from holdfast.training.supervised import train
from holdfast.training.training_config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class ScreeningConfig:
    """How theta_0 is asked what it refuses.

    judge, options: who says that a reply is a refusal (`holdfast list judges`). max_new_tokens: of a reply; its
        beginning decides. dtype: of theta_0's weights; null keeps the checkpoint's.
    """

    judge: str = "keyword_strict"
    options: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int = 32
    batch_size: int = 16
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    def __post_init__(self) -> None:
        if self.judge not in judges.JUDGES:
            raise unknown_name("judge", self.judge, judges.JUDGES)
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 1 or more.")


@dataclass(frozen=True, kw_only=True)
class SeqFTConfig:
    """Options that every method which tunes a LoRA per task has.

    train_dtype: of the frozen weights while a task is learned; null keeps the checkpoint's.
    screening: how theta_0 is asked what it refuses, for `training.screen` and for a calibration that screens.
    """

    training: TrainingConfig = field(default_factory=TrainingConfig)
    train_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    screening: ScreeningConfig = field(default_factory=ScreeningConfig)


@dataclass(frozen=True, kw_only=True)
class EditingConfig(SeqFTConfig):
    """Options of a method that edits weights after a task with a calibration.

    task_samples: training samples of the task just learned that its Gram matrices are taken from, drawn by seed.
    safety_samples: safety calibration samples (theta_0's own safe answers); null: all that the stream has.
    benign_samples: answers of theta_0 to benign requests that the safety set holds beside them, of the stream's
        `benign_calibration`; 0: none; null: all that the stream has.
    screen: leave out task samples whose request theta_0 refuses; with its own refusal as the answer they are part of
        the safety set. Listed in the step's screen.json.
    calibration_dtype: of the weights while calibrating; null keeps the checkpoint's.
    """

    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    task_samples: int = 128
    safety_samples: int | None = None
    benign_samples: int | None = 0
    screen: bool = False
    calibration_dtype: Literal["float32", "bfloat16", "float16"] | None = None

    def __post_init__(self) -> None:
        for name in ("task_samples", "safety_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; expected 1 or more.")
        if self.benign_samples is not None and self.benign_samples < 0:
            raise ConfigError(f"benign_samples is {self.benign_samples}; expected 0 or more, or null for all.")


class SeqFT:
    """Plain sequential tuning: tune a LoRA, merge it, go on.

    Files in the step's folder: training.json, and edit.json of a method that edits.
    """

    Config: type[SeqFTConfig] = SeqFTConfig

    def __init__(self, config: SeqFTConfig | None = None, *, name: str = "seqft") -> None:
        self.config = config or self.Config()
        self.name = name

    def rule(self) -> EditRule:
        """What is done to the weights after a task."""
        return KeepUpdate()

    def step_rule(self, ctx: TaskContext) -> EditRule:
        """The rule of one step, for an edit that depends on more than options."""
        return self.rule()

    @property
    def needs_safety_answers(self) -> bool:
        """Whether a step calibrates on theta_0's own safe answers."""
        return self.rule().needs_curvature

    @property
    def together(self) -> frozenset[str]:
        """How several processes may learn a task (`holdfast.stream.protocol.LearnsTogether`).

        What learns in a way of its own has to say so itself. A base that one device cannot hold is learned with an
        ordinary LoRA and edited by a rule whose calibration streams it: nothing else reads it whole.
        """
        cls = type(self)
        if cls.train_task is not SeqFT.train_task or cls.begin_task is not SeqFT.begin_task:
            return frozenset()
        if isinstance(self.config, EditingConfig) and self.config.screen:
            return frozenset({"copies"})  # the calibration asks theta_0, in the first process alone
        plain = (cls.training_options, cls.end_task, cls.curvature, cls.step_rule)
        own = (SeqFT.training_options, SeqFT.end_task, SeqFT.curvature, SeqFT.step_rule)
        return frozenset({"copies", "shards"} if plain == own else {"copies"})

    def check_stream(self, stream: Stream) -> None:
        """Raises CalibrationError: the stream has no safety calibration samples, and a step needs them."""
        if self.needs_safety_answers:
            safety_set(stream, self._editing(), self.name)

    def begin_task(self, ctx: TaskContext) -> None:
        """Nothing to prepare; what will be read is looked at."""
        self.require(ctx)

    def require(self, ctx: TaskContext) -> None:
        """Raises ConfigError: something that the end of the step reads is not there. Before hours of tuning."""

    def train_task(self, ctx: TaskContext) -> Checkpoint:
        """The previous checkpoint under this task's adapter.

        Raises: StorageError: the disk has no room for the whole checkpoint that follows; TrainingError: as `train`.
        """
        require_space(ctx.work_dir, weight_bytes(ctx.previous.base), "After the tuning, the edited checkpoint")
        return self.learn(ctx)

    def learn(self, ctx: TaskContext) -> Checkpoint:
        """The previous checkpoint under what the training gave; the record of it is training.json.

        Called again after it, when something that came later was killed, it learns nothing anew.

        Raises: TrainingError: as `train`.
        """
        record_file, whole = ctx.work_dir / "training.json", self.learned_folder(ctx)
        if record_file.is_file() and whole.is_dir():
            return Checkpoint(base=ctx.previous.base, adapters=(*ctx.previous.adapters, str(whole)))
        samples = self.learned(ctx)  # first: screening asks theta_0
        result = train(
            load(ctx.previous, dtype=self.config.train_dtype),
            samples,
            self.training_config(ctx),
            work_dir=ctx.scratch_dir,
            seed=step_seed(ctx),
            progress=ctx.progress,
            **self.training_options(ctx),
        )
        record = {
            "steps": result.steps,
            "samples": result.samples,
            "cut": result.cut,
            "precision": result.precision,
            "history": [dict(row) for row in result.history],
        }
        current().by_chief(lambda: write_json(record_file, record))
        return Checkpoint(base=ctx.previous.base, adapters=(*ctx.previous.adapters, str(result.adapter)))

    def end_task(self, ctx: TaskContext, trained: Checkpoint) -> Checkpoint:
        """The edited weights as one plain checkpoint."""
        rule = self.step_rule(ctx)
        curvature = self.curvature(ctx, trained) if rule.needs_curvature else None
        out = ctx.work_dir / "checkpoint"
        report = edit_checkpoint(
            ctx.previous,
            trained,
            rule=rule,
            curvature=curvature,
            out=out,
            seed=step_seed(ctx),
            # A clean process that loads the result costs more than all else here; `holdfast edit` does it.
            verify=False,
            progress=lambda event, done, total, **rest: ctx.progress("edit", done=done, total=total),
        )
        if not isinstance(rule, KeepUpdate):
            report.save(ctx.work_dir / "edit.json")
        return Checkpoint(base=str(out))

    def samples(self, ctx: TaskContext) -> Sequence[Sample]:
        """What the task has to learn from."""
        return ctx.stream.tasks[ctx.step].train

    def learned(self, ctx: TaskContext) -> Sequence[Sample]:
        """What the task is learned from: `samples`, without those that `training.screen: drop` leaves out."""
        return training_samples(ctx, self.config, self.samples(ctx))

    def learned_folder(self, ctx: TaskContext) -> Path:
        """Where the training publishes what it learned."""
        return ctx.scratch_dir / "adapter"

    def training_config(self, ctx: TaskContext) -> TrainingConfig:
        """How the step's task is learned."""
        return self.config.training

    def training_options(self, ctx: TaskContext) -> dict[str, Any]:
        """Further arguments of `training.supervised.train`: a penalty, an adapter."""
        return {}

    def safety_samples(self, ctx: TaskContext) -> list[Sample]:
        """theta_0's own safe answers. Raises CalibrationError: the stream has none."""
        return safety_answers(ctx.stream, self._editing(), self.name)

    def curvature(self, ctx: TaskContext, trained: Checkpoint) -> Curvature:
        """The step's calibration: H_s before and H_t after the task by default; kept as curvature.safetensors."""
        return step_curvature(
            ctx, self._editing(), self.name, before=ctx.previous, after=trained, samples=self.learned(ctx)
        )

    def _editing(self) -> EditingConfig:
        if not isinstance(self.config, EditingConfig):
            raise ConfigError(
                f"{type(self).__name__}.Config must derive from EditingConfig: its edit needs a calibration."
            )
        return self.config


def safety_answers(stream: Stream, config: EditingConfig, name: str) -> list[Sample]:
    """theta_0's own safe answers, as many as `config` wants. Raises CalibrationError: the stream has none.

    name: of the method that asks.
    """
    return refusals(stream, name)[: config.safety_samples]


def safety_set(stream: Stream, config: EditingConfig, name: str) -> list[Sample]:
    """theta_0's own safe answers, and its answers to benign requests, as many as `config` wants of each.

    Raises CalibrationError: the stream has none of what is wanted.
    """
    return [*safety_answers(stream, config, name), *benign_answers(stream, config, name)]


def benign_answers(stream: Stream, config: EditingConfig, name: str) -> list[Sample]:
    """theta_0's own answers to benign requests. Raises CalibrationError: a number is wanted and the stream has none."""
    found = list(stream.benign_calibration)[: config.benign_samples]
    if config.benign_samples and not found:
        raise CalibrationError(
            f"{name} wants {config.benign_samples} benign calibration samples, and stream {stream.name!r} has none. "
            "Give the stream `benign_calibration` prompts (theta_0 answers them itself), or set benign_samples to 0."
        )
    return found


def calibration_sets(
    ctx: TaskContext, config: EditingConfig, name: str, samples: Sequence[Sample], *, benign: bool = True
) -> tuple[list[Sample], list[Sample]]:
    """(safety, task) samples of a step's calibration: `config.task_samples` of `samples`, drawn by the step's seed.

    benign: theta_0's answers to benign requests are part of the safety set.

    With `config.screen` the task samples that theta_0 refuses are in the safety set, answered by its refusal; they are
    listed in screen.json. Raises CalibrationError: the stream has no safety answers, or theta_0 refuses every sample.
    """
    safety = (safety_set if benign else safety_answers)(ctx.stream, config, name)
    task = draw(samples, config.task_samples, step_seed(ctx))
    if not config.screen:
        return safety, task
    found = screened(ctx, config.screening, task, "screen.json")
    if not found.kept:
        raise CalibrationError(
            f"theta_0 refuses all {found.asked} calibration samples of task {ctx.task_name!r}; nothing is left that "
            "says what the task needs. Look at screen.json, or set screen to false."
        )
    return [*safety, *found.refused], list(found.kept)


def training_samples(ctx: TaskContext, config: SeqFTConfig, samples: Sequence[Sample]) -> Sequence[Sample]:
    """`samples` after `training.screen`; what theta_0 refuses is listed in screen_training.json.

    Raises CalibrationError: theta_0 refuses all of them, and they were to be dropped.
    """
    if config.training.screen == "off":
        return samples
    found = screened(ctx, config.screening, samples, "screen_training.json")
    if config.training.screen == "report":
        return samples
    if not found.kept:
        raise CalibrationError(
            f"theta_0 refuses all {found.asked} training samples of task {ctx.task_name!r}; nothing is left to learn. "
            "Look at screen_training.json, or set training.screen to report."
        )
    return found.kept


def screened(ctx: TaskContext, config: ScreeningConfig, samples: Sequence[Sample], record: str) -> Screened:
    """Which of `samples` theta_0 refuses: asked once a step, then read from its file `record`."""
    path = ctx.work_dir / record

    def ask() -> dict[str, Any]:
        found = screen(
            load(ctx.theta_0, dtype=config.dtype),
            samples,
            current().told(finds_refusals(judges.get(config.judge, **config.options))),
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            progress=ctx.progress,
        )
        return {"task": ctx.task_name, "judge": config.judge, **found.to_json()}

    current().once(path, ask, write_json)
    return Screened.from_json(json.loads(path.read_text(encoding="utf-8")), samples)


def step_curvature(
    ctx: TaskContext,
    config: EditingConfig,
    name: str,
    *,
    before: Checkpoint,
    after: Checkpoint,
    samples: Sequence[Sample],
) -> Curvature:
    """A step's calibration, H_s on `before` and H_t on `after` by default; kept as curvature.safetensors.

    name: of the method that asks. samples: of the task, from which `config.task_samples` are drawn by the step's seed.
    """
    path = ctx.work_dir / "curvature.safetensors"
    if path.is_file():
        return Curvature.load(path)
    safety, task = calibration_sets(ctx, config, name, samples)
    found = collect_curvature(
        before,
        after,
        safety,
        task,
        config=config.calibration,
        adapted_only=True,
        dtype=config.calibration_dtype,
        cut_at=config.training.max_length,
        progress=lambda event, done, total, **rest: ctx.progress("calibrate", done=done, total=total),
    )
    found.save(path)
    return found


def step_seed(ctx: TaskContext) -> int:
    """Seed of one step: the same for every method, so that the first task is learned alike by all."""
    return ctx.seed * 1000 + ctx.step


def draw(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """At most `count` samples, drawn without replacement by `seed`, in their order."""
    chosen = random.Random(f"calibration\0{seed}").sample(range(len(samples)), min(count, len(samples)))
    return [samples[i] for i in sorted(chosen)]


__all__ = [
    "EditingConfig",
    "KeepUpdate",
    "SeqFT",
    "SeqFTConfig",
    "benign_answers",
    "calibration_sets",
    "draw",
    "safety_answers",
    "safety_set",
    "screened",
    "step_curvature",
    "step_seed",
    "training_samples",
]
