"""What a run will take, before it starts: hours, memory and disk, from the model's shapes and the data's sizes.

Nothing is loaded and nothing runs: config.json, headers of weights and of pictures, and the texts are read. Figures are
for planning: a token is taken for four characters, a forward pass for 2 floating-point operations per parameter and
token, and devices for a share of their matrix-product speed (`models.speed`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from holdfast.checkpoints.merged import locate, open_checkpoint
from holdfast.checkpoints.value import as_checkpoint
from holdfast.data.examine import Diagnosis, examine
from holdfast.data.types import Sample
from holdfast.errors import ConfigError, DataError
from holdfast.experiment.build import build_methods
from holdfast.experiment.run_config import OwnBenignConfig, RunConfig
from holdfast.models.estimate import CHARACTERS_PER_TOKEN, Estimate, ModelShape, estimate, read_shape
from holdfast.models.speed import DECODE_SHARE, FORWARD_SHARE
from holdfast.training.training_config import TrainingConfig

# What several processes lose by waiting for each other.
PARALLEL_SHARE = 0.9
# fp32 value, gradient and two moments of AdamW.
BYTES_PER_TRAINED = 16
# Most replies end before the bound on their length.
REPLY_SHARE = 0.5
_LINEAR = "_proj.weight"
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What a run may use. flops: matrix-product speed of one, per second. memory_bytes: of one; None is not judged.

    bf16: whether they have instructions for it, which is what `precision: auto` goes by.
    """

    count: int
    flops: float
    memory_bytes: int | None = None
    bf16: bool = False

    def __post_init__(self) -> None:
        if self.count < 1 or self.flops <= 0:
            raise ConfigError(
                f"{self.count} devices of {self.flops} operations a second; expected more than 0 of both."
            )

    @property
    def speed(self) -> float:
        """Of all of them, what is lost between them taken off."""
        return self.flops * (1 if self.count == 1 else self.count * PARALLEL_SHARE)


@dataclass(frozen=True, kw_only=True)
class MethodPlan:
    """One method. seconds: of a phase -> for the whole stream. training_bytes: on one device, at `micro_batch`.

    fits: the largest micro batch that the devices' memory holds, 0 for none; None where no memory was given.
    """

    seconds: Mapping[str, float]
    training_bytes: int
    micro_batch: int
    fits: int | None
    disk_bytes: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run. tokens: of a training sample on average, by task."""

    parameters: int
    tokens: Mapping[str, float]
    methods: Mapping[str, MethodPlan]
    notes: Sequence[str] = field(default_factory=tuple)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "parameters": self.parameters,
            "tokens_per_sample": dict(self.tokens),
            "methods": {
                name: {
                    "seconds": dict(one.seconds),
                    "training_bytes": one.training_bytes,
                    "micro_batch_size": one.micro_batch,
                    "largest_micro_batch_size": one.fits,
                    "disk_bytes": one.disk_bytes,
                }
                for name, one in self.methods.items()
            },
            "notes": list(self.notes),
        }


def plan_run(config: RunConfig, devices: Devices, *, pictures: int = 100) -> Plan:
    """What `config` takes on `devices`. pictures: so many of a split are opened for their sizes.

    Raises: DataError: the data are not there or damaged (`holdfast doctor` says more), or the model's config.json names
        no sizes. ConfigError, UnknownNameError: as `build_methods`. CheckpointError: the model is not a folder here.
    """
    diagnosis = examine(config.stream, open_images=pictures)
    if not diagnosis.ok:
        first = next(f for f in diagnosis.findings if f.level == "error")
        raise DataError(
            f"{first.where}: {first.message}. A plan needs the data; `holdfast doctor` lists what is wrong."
        )
    return _Planner(config, devices, diagnosis).plan()


class _Planner:
    def __init__(self, config: RunConfig, devices: Devices, diagnosis: Diagnosis) -> None:
        self.config, self.devices, self.diagnosis = config, devices, diagnosis
        checkpoint = as_checkpoint(config.model)
        with open_checkpoint(checkpoint) as opened:
            entries = dict(opened.entries)
        self.shape: ModelShape = read_shape(locate(checkpoint.base))
        self.parameters = sum(entry.numel for entry in entries.values())
        # Linear layers of the language model: (outputs, inputs). Towers name theirs alike, and are not tuned.
        self.linears = [
            (int(entry.shape[0]), int(entry.shape[1]))
            for key, entry in entries.items()
            if key.endswith(_LINEAR) and "vision" not in key and len(entry.shape) == 2
        ]

    def plan(self) -> Plan:
        tasks = [task.name for task in self.config.used_tasks() if (task.name, "train") in self.diagnosis.samples]
        tokens = {name: self._tokens(self.diagnosis.samples[name, "train"]) for name in tasks}
        options = {label: getattr(method, "config", None) for label, method in build_methods(self.config).items()}
        methods = {label: self._method(chosen, tasks, tokens) for label, chosen in options.items()}
        count = self.devices.count
        uneven = sorted({size for o in options.values() if (size := _training_of(o).batch_size) % count})
        several = [
            "Several devices: whole copies of the base learn each task together and share out the requests; a "
            "calibration and an edit are made by the first alone."
        ]
        notes = [
            *(f"A batch of {size} cannot be dealt out evenly over {count} devices." for size in uneven),
            *(several if count > 1 else []),
            "A method that trains on more than the new task's samples (old ones, refusals) takes more than that.",
            "Checkpoints of three steps of a method (two stay, one is written) are counted as whole models; adapters "
            "take less.",
        ]
        return Plan(parameters=self.parameters, tokens=tokens, methods=methods, notes=notes)

    def _method(self, options: Any, tasks: Sequence[str], tokens: Mapping[str, float]) -> MethodPlan:
        training = _training_of(options)
        seconds = {
            "training": sum(self._training(training, name, tokens[name]) for name in tasks),
            "calibration and edit": len(tasks) * self._edit(options, tasks, tokens),
            "evaluation": sum(
                self._evaluation(tasks[: step + 1], last=step == len(tasks) - 1) for step in range(len(tasks))
            ),
        }
        room = self.devices.memory_bytes
        stored = _BYTES.get(self.config.store_dtype or "")
        # The frozen weights as they are loaded; where nothing says otherwise, as they are stored.
        kept = _BYTES.get(getattr(options, "train_dtype", None) or self.config.store_dtype or "")
        weights = self.shape.weight_bytes if kept is None else kept * self.parameters
        count = self.devices.count
        # What a run would refuse (`notes`) is planned as if each device had a sample.
        part = 1 if training.batch_size % count else training.part_size(count)
        sizes = _divisors(max(1, training.batch_size // count))
        at = {size: self._training_bytes(training, tasks, size, weights) for size in sizes}
        model = self.shape.weight_bytes if stored is None else stored * self.parameters
        return MethodPlan(
            seconds=seconds,
            training_bytes=at[part],
            micro_batch=part,
            fits=None if room is None else max((size for size, need in at.items() if need <= room), default=0),
            # Two steps' checkpoints and the one that is being written; theta_0 as it is kept, where it is converted.
            disk_bytes=(3 if stored is None else 4) * model + self._trained(training) * BYTES_PER_TRAINED,
        )

    # Seconds.

    def _training(self, training: TrainingConfig, task: str, tokens: float) -> float:
        """A frozen base: forward, backward through the activations alone, and forward again with checkpointing."""
        samples = len(self.diagnosis.samples[task, "train"])
        steps = training.max_steps or math.ceil(training.epochs * samples / training.batch_size)
        length = tokens if training.max_length is None else min(tokens, training.max_length)
        passes = 3 if training.gradient_checkpointing else 2
        work = 2 * self.parameters * passes * steps * training.batch_size * length
        return work / (FORWARD_SHARE * self.devices.speed)

    def _edit(self, options: Any, tasks: Sequence[str], tokens: Mapping[str, float]) -> float:
        """One walk over the calibration samples, and one factor per distinct input; 0 for a method without either.

        The first process does it alone, and the others wait (docs/design/stream.md).
        """
        if not isinstance(getattr(options, "task_samples", None), int):
            return 0.0
        count = options.task_samples
        for name, there in (("safety_samples", self._prompts("safety")), ("benign_samples", self._prompts("benign"))):
            wanted = getattr(options, name, 0)
            count += there if wanted is None else min(wanted, there or wanted)  # null: all that there are
        walked = count * sum(tokens.values()) / max(1, len(tasks))
        # q, k and v see one input, gate and up another: distinct widths are about half of the layers.
        widths = [inputs for _, inputs in self.linears]
        gram = sum(2 * width**2 for width in widths) * walked / 2
        factor = sum(width**3 for width in widths) / 2
        work = 2 * self.parameters * walked / FORWARD_SHARE + gram + factor
        return work / self.devices.flops

    def _prompts(self, what: str) -> int:
        """How many calibration answers a run has of a kind: those of the stream, or those that theta_0 is asked for."""
        own = self.config.safety_calibration if what == "safety" else self.config.benign_calibration
        prompts = own.prompts.name if own.prompts is not None else f"{what}_calibration"
        limit = own.limit if isinstance(own, OwnBenignConfig) else None
        return max((len(v[:limit]) for k, v in self.diagnosis.samples.items() if k[0] == prompts), default=0)

    def _evaluation(self, tasks: Sequence[str], *, last: bool) -> float:
        """Replies after one step: the task just learned in full, what is looked at along the way by its own limit."""
        evaluation = self.config.evaluation
        own = {task.name: task for task in self.config.used_tasks()}
        total = 0.0
        for place, name in enumerate(tasks):
            in_full = last or place == len(tasks) - 1
            asked = self._asked([(name, "test")], in_full=in_full)
            total += self._replies(asked, own[name].max_new_tokens)
        for safety in self.config.stream.safety:
            keys = [key for key in self.diagnosis.samples if key[0] == safety.name]
            total += self._replies(self._asked(keys, in_full=last), safety.max_new_tokens or 128)
        # A batch below what fills the device decodes at the speed of reading the weights.
        return total / (self.devices.speed * min(1.0, evaluation.batch_size / 32))

    def _asked(self, keys: Iterable[tuple[str, str]], *, in_full: bool) -> list[Sample]:
        evaluation = self.config.evaluation
        found: list[Sample] = []
        for key in keys:
            samples = self.diagnosis.samples.get(key, [])[: evaluation.limit]
            found += samples if in_full or evaluation.limit_between is None else samples[: evaluation.limit_between]
        return found

    def _replies(self, samples: Sequence[Sample], longest: int) -> float:
        """Operations over the speed of a matrix product."""
        read = len(samples) * self._tokens(samples, request_only=True) / FORWARD_SHARE
        written = len(samples) * longest * REPLY_SHARE / DECODE_SHARE
        return 2 * self.parameters * (read + written)

    # Sizes.

    def _tokens(self, samples: Sequence[Sample], *, request_only: bool = False) -> float:
        """Mean tokens of a sample; a picture whose size is not known counts as the mean of those that are."""
        if not samples:
            return 0.0
        known: list[int] = []
        unknown = characters = 0
        for sample in samples:
            characters += sum(len(turn.text) for turn in (sample.request if request_only else sample.turns))
            for path in sample.images:
                size = self.diagnosis.sizes.get(path) or self.diagnosis.headers.get(path)
                if size is None:
                    unknown += 1
                else:
                    known.append(self.shape.image_tokens(*size))
        mean = sum(known) / len(known) if known else float(self.shape.image_tokens(336, 336))
        return (characters / CHARACTERS_PER_TOKEN + sum(known) + unknown * mean) / len(samples)

    def _trained(self, training: TrainingConfig) -> int:
        return sum(training.rank * (outputs + inputs) for outputs, inputs in self.linears)

    def _training_bytes(self, training: TrainingConfig, tasks: Sequence[str], micro_batch: int, weights: int) -> int:
        """The most of any task on one device: the model, one batch of its longest samples, what is trained."""
        narrow = self.devices.bf16 if training.precision == "auto" else training.precision != "fp32"
        itemsize = 2 if narrow else 4
        most = 0
        for name in tasks:
            samples = self.diagnosis.samples[name, "train"]
            found = self._estimate(samples, micro_batch)
            held = found.checkpointed_bytes if training.gradient_checkpointing else found.training_bytes
            # Estimates of activations are those of 16 bits; logits are fp32 already.
            activations = (held - found.weight_bytes - found.logit_bytes) * itemsize // 2
            most = max(most, weights + found.logit_bytes + activations)
        return most + self._trained(training) * BYTES_PER_TRAINED

    def _estimate(self, samples: Sequence[Sample], batch_size: int) -> Estimate:
        sizes = self.diagnosis.headers | self.diagnosis.sizes
        known = [sample for sample in samples if all(path in sizes for path in sample.images)]
        return estimate(
            self.shape,
            [[sizes[path] for path in sample.images] for sample in known],
            [sum(len(turn.text) for turn in sample.turns) for sample in known],
            batch_size=batch_size,
        )


def _training_of(options: Any) -> TrainingConfig:
    found: TrainingConfig = getattr(options, "training", None) or TrainingConfig()
    return found


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


__all__ = ["Devices", "MethodPlan", "Plan", "plan_run"]
