"""What a run will take, before it starts: hours, memory and disk, from the model's shapes and the data's sizes.

Nothing is loaded and nothing runs: config.json, headers of weights and of pictures, and the texts are read, and the
model is built without weights, which tells what is tuned. Figures are for planning: a token is taken for four
characters, a forward pass for 2 floating-point operations per parameter and token, and devices for a share of their
matrix-product speed (`models.speed`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from holdfast.checkpoints.merged import locate, open_checkpoint
from holdfast.checkpoints.value import Source, as_checkpoint
from holdfast.data.examine import Diagnosis, examine
from holdfast.data.streams import SafetySpec, build_safety
from holdfast.data.types import Sample
from holdfast.editing.plan import decoder_layers
from holdfast.errors import ConfigError, DataError
from holdfast.experiment.build import build_methods
from holdfast.experiment.run_config import RunConfig
from holdfast.models.estimate import CHARACTERS_PER_TOKEN, Estimate, ModelShape, estimate, read_shape
from holdfast.models.speed import DECODE_SHARE, FORWARD_SHARE
from holdfast.rules.base import needs_of
from holdfast.rules.keep import KeepUpdate
from holdfast.stream.protocol import LearnsTogether, Method
from holdfast.training.training_config import TrainingConfig

# What several processes lose by waiting for each other.
PARALLEL_SHARE = 0.9
# fp32 value, gradient and two moments of AdamW.
BYTES_PER_TRAINED = 16
# Most replies end before the bound on their length.
REPLY_SHARE = 0.5
# Of what a run's time is made, in its order.
TRAINING, EDIT, EVALUATION = "training", "calibration and edit", "evaluation"
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
        if self.count < 1 or not 0 < self.flops < math.inf:
            raise ConfigError(
                f"{self.count} devices of {self.flops:g} operations a second; expected one device or more, and a "
                "finite number above 0."
            )
        if self.memory_bytes is not None and self.memory_bytes < 1:
            raise ConfigError(f"memory_bytes is {self.memory_bytes}; expected 1 or more, or None.")

    @property
    def speed(self) -> float:
        """Of all of them, what is lost between them taken off."""
        return self.flops * (1 if self.count == 1 else self.count * PARALLEL_SHARE)


@dataclass(frozen=True, kw_only=True)
class MethodPlan:
    """One method. seconds: of a phase -> for the whole stream. training_bytes: on one device, at `micro_batch`.

    devices: that share the work; 1 for a method that a run of several processes refuses.
    fits: the largest micro batch that the devices' memory holds, 0 for none; None where no memory was given, or nothing
        is learned.
    """

    seconds: Mapping[str, float]
    devices: int
    training_bytes: int
    micro_batch: int
    fits: int | None
    disk_bytes: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run. tokens: of a training sample on average, by task.

    before: seconds of a phase that come before any task, once for all methods: theta_0 answers the calibration prompts
        that have no answer, and is asked every task and every safety set in full.
    """

    parameters: int
    tokens: Mapping[str, float]
    before: Mapping[str, float]
    methods: Mapping[str, MethodPlan]
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def seconds(self) -> float:
        """Of the whole run: what comes before any task, and all methods one after another."""
        return sum(self.before.values()) + sum(sum(one.seconds.values()) for one in self.methods.values())

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "parameters": self.parameters,
            "tokens_per_sample": dict(self.tokens),
            "seconds": self.seconds,
            "before_any_task": {"seconds": dict(self.before)},
            "methods": {
                name: {
                    "seconds": dict(one.seconds),
                    "devices": one.devices,
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
        ModelError: it is no vision-language model, or its layers cannot be tuned.
    """
    methods = build_methods(config)  # first: the data may be of a format that a plug-in reads
    diagnosis = examine(config.stream, open_images=pictures)
    if not diagnosis.ok:
        first = next(f for f in diagnosis.findings if f.level == "error")
        raise DataError(
            f"{first.where}: {first.message.removesuffix('.')}. A plan needs the data; `holdfast doctor` lists what is "
            "wrong."
        )
    return _Planner(config, devices, diagnosis).plan(methods)


def tuned_linears(model: Source) -> dict[str, tuple[int, int]]:
    """Name -> (outputs, inputs) of every linear layer that a LoRA is put on and an edit changes.

    They are those of the language model's blocks, fused ones as they are; nothing of a tower or a projector. The model
    is built without weights, and the shapes are those on disk.

    Raises: ModelError: no vision-language model, or a kind that cannot be tuned. CheckpointError: the folder holds no
        such layer.
    """
    checkpoint = as_checkpoint(model)
    with open_checkpoint(checkpoint) as opened:
        keys = {name: opened.names.require(f"{name}.weight") for name in decoder_layers(locate(checkpoint.base)).of}
        shapes = {name: opened.entries[key].shape for name, key in keys.items()}
    return {name: (int(shape[0]), int(shape[1])) for name, shape in shapes.items()}


class _Planner:
    def __init__(self, config: RunConfig, devices: Devices, diagnosis: Diagnosis) -> None:
        self.config, self.devices, self.diagnosis = config, devices, diagnosis
        checkpoint = as_checkpoint(config.model)
        with open_checkpoint(checkpoint) as opened:
            self.parameters = sum(entry.numel for entry in opened.entries.values())
        self.shape: ModelShape = read_shape(locate(checkpoint.base))
        # Of a kind: calibration requests that the run has an answer to, and those that theta_0 is asked.
        self.prompts = {what: self._prompts(what) for what in ("safety", "benign")}
        self.tasks = [task.name for task in config.used_tasks() if (task.name, "train") in diagnosis.samples]
        self.tokens = {name: self._tokens(diagnosis.samples[name, "train"]) for name in self.tasks}

    @cached_property
    def linears(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of what is tuned."""
        return list(tuned_linears(self.config.model).values())

    def plan(self, methods: Mapping[str, Method]) -> Plan:
        count, one = self.devices.count, replace(self.devices, count=1)
        alone = [label for label, method in methods.items() if count > 1 and not self._together(method)]
        on = {label: one if label in alone else self.devices for label in methods}
        planned = {label: self._method(method, on[label]) for label, method in methods.items()}
        return Plan(
            parameters=self.parameters,
            tokens=self.tokens,
            before=self._before(one if len(alone) == len(methods) else self.devices),
            methods=planned,
            notes=self._notes(methods, planned, alone),
        )

    def _together(self, method: Method) -> bool:
        """Whether a run of several processes takes the method (`experiment.together` refuses the others)."""
        return "copies" in _ways(method) and self.config.evaluation.backend != "vllm"

    def _notes(
        self, methods: Mapping[str, Method], planned: Mapping[str, MethodPlan], alone: Sequence[str]
    ) -> list[str]:
        count = self.devices.count
        dealt = [method for label, method in methods.items() if label not in alone]
        uneven = sorted({size for method in dealt if (size := _training_of(method).batch_size) % count})
        notes = [f"A batch of {size} cannot be dealt out evenly over {count} devices." for size in uneven]
        if alone:
            why = (
                "learned in one process alone"
                if self.config.evaluation.backend != "vllm"
                else "answered by vLLM, which takes the devices for itself"
            )
            notes.append(
                f"{', '.join(alone)}: {why}; a run of {count} processes refuses that. Planned with one device: "
                "a run of one process (--method, and an --out of its own, where theta_0 is asked again)."
            )
        if count > 1 and dealt:
            notes.append(
                "Several devices: whole copies of the base learn each task together and share out the requests; a "
                "calibration and an edit are made by the first alone."
            )
        large = [label for label, one in planned.items() if one.fits == 0 and "shards" in _ways(methods[label])]
        if large and self.config.safety_gate is None:
            notes.append(
                f"{', '.join(large)}: no micro batch fits one device; several can share the base out (`--fsdp` behind "
                "the run file, started by `accelerate launch`)."
            )
        return [
            *notes,
            "A method that trains on more than the new task's samples (old ones, refusals) takes more than that.",
            "Checkpoints of three steps of a method (two stay, one is written) are counted as whole models; adapters "
            "take less.",
        ]

    def _before(self, devices: Devices) -> dict[str, float]:
        """theta_0: its own answers to calibrate on, by the first process, and all that it is asked before any task."""
        config = self.config
        own = (
            (self.prompts["safety"][1], config.safety_calibration),
            (self.prompts["benign"][1], config.benign_calibration),
        )
        answers = sum(self._replies(asked, chosen.max_new_tokens) for asked, chosen in own)
        return {
            TRAINING: 0.0,
            EDIT: self._answering(answers, replace(devices, count=1)),
            EVALUATION: self._evaluation(None, devices),
        }

    def _method(self, method: Method, devices: Devices) -> MethodPlan:
        options, training, learns = getattr(method, "config", None), _training_of(method), _learns(method)
        steps = range(len(self.tasks))
        seconds = {
            TRAINING: sum(self._training(training, name, devices) for name in self.tasks) if learns else 0.0,
            EDIT: len(self.tasks) * self._edit(method),
            EVALUATION: sum(self._evaluation(step, devices) for step in steps),
        }
        room, count = devices.memory_bytes, devices.count
        stored = _BYTES.get(self.config.store_dtype or "")
        # The frozen weights as they are loaded; where nothing says otherwise, as they are stored.
        kept = _BYTES.get(getattr(options, "train_dtype", None) or self.config.store_dtype or "")
        weights = self.shape.weight_bytes if kept is None else kept * self.parameters
        # What a run would refuse (`notes`) is planned as if each device had a sample.
        part = 1 if training.batch_size % count else training.part_size(count)
        sizes = _divisors(max(1, training.batch_size // count)) if learns else []
        at = {size: self._training_bytes(training, size, weights) for size in sizes}
        model = self.shape.weight_bytes if stored is None else stored * self.parameters
        # Two steps' checkpoints and the one that is being written.
        written = 3 * model + self._trained(training) * BYTES_PER_TRAINED if learns else 0
        return MethodPlan(
            seconds=seconds,
            devices=count,
            training_bytes=at[part] if learns else 0,
            micro_batch=part,
            fits=max((size for size, need in at.items() if need <= room), default=0) if learns and room else None,
            # theta_0 as it is kept, where it is converted.
            disk_bytes=written + (0 if stored is None else model),
        )

    # Seconds.

    def _training(self, training: TrainingConfig, task: str, devices: Devices) -> float:
        """A frozen base: forward, backward through the activations alone, and forward again with checkpointing."""
        tokens, samples = self.tokens[task], len(self.diagnosis.samples[task, "train"])
        steps = training.max_steps or math.ceil(training.epochs * samples / training.batch_size)
        length = tokens if training.max_length is None else min(tokens, training.max_length)
        passes = 3 if training.gradient_checkpointing else 2
        work = 2 * self.parameters * passes * steps * training.batch_size * length
        return work / (FORWARD_SHARE * devices.speed)

    def _edit(self, method: Method) -> float:
        """One walk over the calibration samples, and one factor per distinct input; 0 for a method without either.

        The first process does it alone, and the others wait (docs/design/stream.md).
        """
        count = self._walked(method)
        if not count:
            return 0.0
        walked = count * sum(self.tokens.values()) / max(1, len(self.tasks))
        # q, k and v see one input, gate and up another: distinct widths are about half of the layers.
        widths = [inputs for _, inputs in self.linears]
        gram = sum(2 * width**2 for width in widths) * walked / 2
        factor = sum(width**3 for width in widths) / 2
        work = 2 * self.parameters * walked / FORWARD_SHARE + gram + factor
        return work / self.devices.flops

    def _walked(self, method: Method) -> int:
        """Samples that a step calibrates on, 0 for a method that makes no calibration.

        Options of a calibration alone do not say so: a control has them for another of its settings. What the method
        says of its safety answers counts, and what its rule needs; one whose edit is no rule's (it keeps all that was
        tuned, or is none of plain tuning's kind) makes its edit in a way of its own, from what its options name.
        """
        options: Any = getattr(method, "config", None)
        count = getattr(options, "task_samples", None)
        if not isinstance(count, int):
            return 0
        make = getattr(method, "rule", None)
        rule = KeepUpdate() if make is None else make()
        safety = bool(getattr(method, "needs_safety_answers", True))
        if not safety and needs_of(rule) == "nothing" and not isinstance(rule, KeepUpdate):
            return 0
        for what in ("safety", "benign") if safety else ():
            there, wanted = sum(map(len, self.prompts[what])), getattr(options, f"{what}_samples", 0)
            count += there if wanted is None else min(wanted, there or wanted)  # null: all that there are
        return count

    def _prompts(self, what: str) -> tuple[list[Sample], list[Sample]]:
        """Calibration requests of a kind that a run has an answer to, and those that theta_0 is asked.

        Of forbidden ones so many of each risk category are asked as are wanted: an aligned model refuses them.
        """
        own = self.config.safety_calibration if what == "safety" else self.config.benign_calibration
        if own.prompts is not None:
            found = self._asked_instead(own.prompts, what)
        else:
            found = self.diagnosis.samples.get((f"{what}_calibration", "train"), [])
        asked = [sample for sample in found if sample.answer is None]
        if what == "safety":
            groups: dict[str, list[Sample]] = {}
            for sample in asked:
                groups.setdefault(str(sample.meta.get("category", "")), []).append(sample)
            most = self.config.safety_calibration.per_category
            asked = [sample for group in groups.values() for sample in group[:most]]
        return [sample for sample in found if sample.answer is not None], asked

    def _asked_instead(self, prompts: SafetySpec, what: str) -> list[Sample]:
        """The side of a safety set that the run file names for its calibration, without answers."""
        read = build_safety(prompts, self.config.stream.data_root)
        side = read.unsafe if what == "safety" else read.benign[: self.config.benign_calibration.limit]
        return [replace(sample, turns=sample.request, references=()) for sample in side]

    def _evaluation(self, step: int | None, devices: Devices) -> float:
        """Replies after one step: the task just learned in full, what is looked at along the way by its own limit.

        step: None for theta_0, which is asked every task and every set in full.
        """
        own = {task.name: task for task in self.config.used_tasks()}
        seen = self.tasks if step is None else self.tasks[: step + 1]
        last = len(seen) == len(self.tasks)
        total = 0.0
        for place, name in enumerate(seen):
            asked = self._asked([(name, "test")], in_full=last or place == step)
            total += self._replies(asked, own[name].max_new_tokens)
        for safety in self.config.stream.safety:
            keys = [key for key in self.diagnosis.samples if key[0] == safety.name]
            total += self._replies(self._asked(keys, in_full=last), safety.max_new_tokens or 128)
        return self._answering(total, devices)

    def _answering(self, work: float, devices: Devices) -> float:
        """Seconds of `_replies`: a batch below what fills a device decodes at the speed of reading the weights."""
        return work / (devices.speed * min(1.0, self.config.evaluation.batch_size / 32))

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

    def _training_bytes(self, training: TrainingConfig, micro_batch: int, weights: int) -> int:
        """The most of any task on one device: the model, one batch of its longest samples, what is trained."""
        narrow = self.devices.bf16 if training.precision == "auto" else training.precision != "fp32"
        itemsize = 2 if narrow else 4
        most = 0
        for name in self.tasks:
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


def _training_of(method: Method) -> TrainingConfig:
    found: TrainingConfig = getattr(getattr(method, "config", None), "training", None) or TrainingConfig()
    return found


def _learns(method: Method) -> bool:
    """Whether a method learns at all; one that does not says so (`learns = False` in its class)."""
    return bool(getattr(method, "learns", True))


def _ways(method: Method) -> frozenset[str]:
    """How several processes may learn with it; see `LearnsTogether`."""
    return method.together if isinstance(method, LearnsTogether) else frozenset()


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


__all__ = ["EDIT", "EVALUATION", "TRAINING", "Devices", "MethodPlan", "Plan", "plan_run", "tuned_linears"]
