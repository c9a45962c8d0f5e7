"""A run file -> a run directory: the whole job, from Python or from the command line.

    from holdfast import experiment

    config = experiment.read_run("configs/llava-1.5-7b.yaml")
    summary = experiment.run(config, "runs/mine", methods=["seqft", "hpa"])
    print(summary["methods"]["hpa"]["ap"])

A run file names a model, a stream and methods; everything else has a default:

    model: llava-hf/llava-1.5-7b-hf        # hub id or folder of any vision-language model of transformers
    stream: my-stream.yaml                 # a stream file (holdfast.data.streams), or its content
    methods: [seqft, hpa]                  # or a mapping: {wide: {method: hpa, edit: {keep_bounds: [10, 30]}}}
    defaults: {training: {max_steps: 500}} # options of every method that has them
    evaluation: {batch_size: 32}
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from holdfast import methods as method_registry
from holdfast.checkpoints.storage import write_json
from holdfast.config import decode, encode
from holdfast.data.images import ImageMode, PictureConfig, pictures
from holdfast.data.inventory import check_pictures
from holdfast.data.streams import (
    CalibrationSpec,
    SafetySpec,
    StreamSpec,
    build,
    build_calibration,
    build_safety,
    read_yaml,
    stream_spec,
)
from holdfast.data.types import Sample, Stream, Turn
from holdfast.errors import ConfigError, RunError, UnknownNameError, nearest, unknown_name
from holdfast.evaluation.config import EvaluationConfig
from holdfast.parallel import run_methods
from holdfast.stream.protocol import Checkpoint, ChecksStream, Method, silent
from holdfast.stream.record import RunDirectory
from holdfast.stream.runner import StreamRun
from holdfast.stream.summary import write_summary

Progress = Callable[..., None]

# A step's seed is a thousand times the run's and more, and numpy takes 32 bits.
MAX_SEED = 4_000_000


@dataclass(frozen=True, kw_only=True)
class InjectionConfig:
    """Harmful pairs mixed into every task's training samples (the condition "0.1 % harmful": fraction 0.001).

    pool: harmful requests with answers that comply, as calibration data are written; ids are logged in injected.json.
        null: the stream's own training files hold the pairs already, and `fraction` says how many.
    """

    fraction: float
    pool: CalibrationSpec | None = None

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction is {self.fraction}; expected a share in (0, 1], such as 0.001 for 0.1 %.")


@dataclass(frozen=True, kw_only=True)
class OwnAnswersConfig:
    """Safety calibration data: theta_0's own safe answers to `safety_calibration` prompts that have none.

    per_category: answers kept per risk category (`category` of a prompt). judge: of EvaluationConfig.judges, who says
    that an answer is safe; null: the first. allow_short: go on where a category has too few.
    prompts: a safety set whose unsafe side is asked, instead of the stream's `safety_calibration`; it must share no
        sample with the sets that the run is judged on.
    """

    prompts: SafetySpec | None = None
    per_category: int = 2
    max_new_tokens: int = 256
    judge: str | None = None
    allow_short: bool = False


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run file.

    methods: names, or a mapping from a label to options (`method` names the method where the label does not).
    defaults: options of every method that has them, under the same keys.
    store_dtype: type of the checkpoints that the run writes. float32 keeps a stream of small edits from being rounded
        after each task (the model is converted once, at twice the disk space of a 16-bit one); null keeps the model's.
    tasks: only these tasks, in the stream's order. threads: CPU threads of a process; null leaves torch's choice.
    images, max_pixels: how pictures are opened, in training as in evaluation (see `PictureConfig`).
    """

    model: str
    stream: StreamSpec
    methods: Mapping[str, Mapping[str, Any]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    safety_calibration: OwnAnswersConfig = field(default_factory=OwnAnswersConfig)
    injection: InjectionConfig | None = None
    store_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    tasks: tuple[str, ...] | None = None
    seed: int = 0
    threads: int | None = None
    images: ImageMode = "upright"
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        if not self.methods:
            raise ConfigError("methods is empty; name at least one (`holdfast list methods`).")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads is {self.threads}; expected 1 or more, or null.")
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"seed is {self.seed}; expected 0..{MAX_SEED}.")
        _ = self.pictures  # checks its values

    @property
    def pictures(self) -> PictureConfig:
        """How pictures are opened."""
        return PictureConfig(images=self.images, max_pixels=self.max_pixels)


def read_run(path: Path | str) -> RunConfig:
    """Decode the run file `path`; paths in it start from its folder. Nothing is loaded yet.

    Raises: DataError, ConfigError, UnknownNameError: what is wrong, and where in the file.
    """
    path = Path(path)
    data = read_yaml(path)
    if not isinstance(data, Mapping) or "model" not in data:
        raise ConfigError(
            f"{path} is no run file: it has no `model`. A run file names `model`, `stream` and `methods`; a stream "
            "file goes under `stream:`."
        )
    return decode_run(data, base=path.parent, where=str(path))


def decode_run(data: Mapping[str, Any], *, base: Path, where: str = "run") -> RunConfig:
    """A RunConfig of plain data; `base`: folder that relative paths start from."""
    data = dict(data)
    if "stream" in data:
        data["stream"] = stream_spec(data["stream"], base=base)
    if "methods" in data:
        data["methods"] = _method_options(data["methods"])
    if isinstance(data.get("model"), str) and (base / Path(data["model"]).expanduser()).is_dir():
        data["model"] = str((base / Path(data["model"]).expanduser()).absolute())
    return decode(RunConfig, data, where)


def only(config: RunConfig, names: Sequence[str]) -> RunConfig:
    """`config` with these methods alone; one that the file does not name gets the file's defaults."""
    return replace(config, methods={name: config.methods.get(name, {}) for name in map(_label, names)})


def build_methods(config: RunConfig, names: Sequence[str] | None = None) -> dict[str, Method]:
    """The methods of a run (or those named), ready to run.

    Raises: UnknownNameError: no such method, or a default that no method has.
    """
    chosen = list(config.methods) if names is None else list(names)
    for name in chosen:
        if name not in config.methods:
            raise unknown_name("method of this run", name, config.methods)
    built = {name: _build_method(name, config.methods[name], config.defaults) for name in chosen}
    known = {key for name in config.methods for key in _option_names(config.methods[name].get("method", name))}
    for key in config.defaults:
        # A default of methods that this run leaves out is no mistake; importing all of them takes a moment.
        if key not in known:
            known = {key for name in method_registry.METHODS for key in _option_names(name)}
        if key not in known:
            hint = nearest(key, known)
            raise UnknownNameError(
                f"defaults.{key}: no method has this option."
                + (f" Did you mean {hint!r}?" if hint else "")
                + f" Known: {', '.join(sorted(known))}."
            )
    return built


@dataclass(frozen=True)
class Experiment:
    """A run that is resolved: data read, methods built, everything checked, nothing computed."""

    config: RunConfig
    out: Path
    stream: Stream
    methods: Mapping[str, Method]
    injected: Sequence[Any] = ()
    progress: Progress = silent

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.out)

    @property
    def theta_0(self) -> Checkpoint:
        """The starting model: the user's own, or its copy in `store_dtype` inside the run directory."""
        if self.config.store_dtype is None:
            return Checkpoint(base=self.config.model)
        return Checkpoint(base=str((self.directory.theta_0_dir / "checkpoint").absolute()))

    def stream_run(self, stream: Stream | None = None) -> StreamRun:
        """The runner's view of it."""
        return StreamRun(
            directory=self.directory,
            stream=stream or self.stream,
            task_names=[task.name for task in self.stream.tasks],
            theta_0=self.theta_0,
            seed=self.config.seed,
            config=self.shared_config(),
            methods={name: _recorded(method) for name, method in self.methods.items()},
            progress=self.progress,
            grows=("stream.tasks", "tasks", "data_sha256"),
        )

    def shared_config(self) -> dict[str, Any]:
        """What config.json holds beside the methods: settings, and what identifies model and data."""
        from holdfast.checkpoints.fingerprint import fingerprint
        from holdfast.checkpoints.merged import open_checkpoint
        from holdfast.evaluation.identity import settings_digests

        with open_checkpoint(self.config.model) as checkpoint:
            identity = fingerprint(checkpoint.base)
            settings = settings_digests(checkpoint.folder)
        config = self.config
        return encode(
            {
                "name": self.stream.name,
                "model": config.model,
                "model_fingerprint": identity,
                "model_settings": settings,
                "stream": config.stream,
                "tasks": config.tasks,
                "data_sha256": {task.name: self._digest([*task.train, *task.test]) for task in self.stream.tasks},
                "safety_sha256": {s.name: self._digest([*s.unsafe, *s.benign]) for s in self.stream.safety},
                "calibration_sha256": self._digest(self.stream.safety_calibration),
                "evaluation": config.evaluation,
                "safety_calibration": config.safety_calibration,
                "injection": config.injection,
                "store_dtype": config.store_dtype,
                "seed": config.seed,
                "threads": config.threads,
                "images": config.images,
                "max_pixels": config.max_pixels,
            }
        )

    def _digest(self, samples: Sequence[Sample]) -> str:
        """With image paths under the data root: pictures are not read, a stream may hold a million."""
        from holdfast.evaluation.identity import samples_digest

        root = self.stream.root
        return samples_digest(samples, lambda p: p.relative_to(root).as_posix() if p.is_relative_to(root) else p.name)

    def _pictures(self) -> Iterator[Path]:
        """Every picture that the run shows to a model."""
        stream = self.stream
        sets = [task_part for task in stream.tasks for task_part in (task.train, task.validation, task.test)]
        sets += [side for s in stream.safety for side in (s.unsafe, s.benign)]
        for samples in (*sets, stream.safety_calibration):
            for sample in samples:
                yield from sample.images

    def evaluator(self) -> Any:
        from holdfast.evaluation import CheckpointEvaluator

        return CheckpointEvaluator(self.config.evaluation)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the directory, and do once what all methods share: log what was injected, evaluate theta_0."""
        run = self.stream_run()
        with run.claimed(), pictures(self.config.pictures):
            check_pictures(self.out / "pictures.json", self._pictures(), self.stream.root)
            if self.injected:
                write_json(self.out / "injected.json", [log.to_json() for log in self.injected])
            self._convert_theta_0()
            # The shorter of the two first: where theta_0 gives no safe answers, nobody waits for its scores.
            self.with_own_answers()
            run.evaluate_theta_0(self.evaluator())
            yield

    def _convert_theta_0(self) -> None:
        if self.config.store_dtype is None:
            return
        from holdfast.checkpoints.cast import cast_checkpoint
        from holdfast.models.load import parse_dtype

        cast_checkpoint(self.config.model, self.theta_0.base, parse_dtype(self.config.store_dtype))

    def run_method(self, name: str) -> None:
        """Every task with one method, within `held` (of this process or of the one that started it)."""
        with pictures(self.config.pictures):
            run = self.stream_run(self.with_own_answers())
            run.run_method(self.methods[name], self.evaluator())

    def with_own_answers(self) -> Stream:
        """The stream with answered safety calibration samples: made by theta_0 once, then read from theta_0/."""
        samples = list(self.stream.safety_calibration)
        unanswered = [sample for sample in samples if sample.answer is None]
        if not unanswered:
            return self.stream
        path = self.directory.theta_0_dir / "safety_calibration.json"
        if not path.is_file():
            self._make_own_answers(unanswered, path)
        answers = json.loads(path.read_text(encoding="utf-8"))["answers"]
        answered = [_answered(s, answers[s.id]) if s.id in answers else s for s in samples]
        return replace(self.stream, safety_calibration=[s for s in answered if s.answer is not None])

    def _make_own_answers(self, prompts: Sequence[Sample], path: Path) -> None:
        from holdfast import judges
        from holdfast.models.load import load
        from holdfast.models.own_answers import own_safe_answers

        config, evaluation = self.config.safety_calibration, self.config.evaluation
        chosen = _own_judge(self.config)
        judge = judges.get(chosen.name, **chosen.options)

        def is_safe(samples: Sequence[Sample], replies: Sequence[str]) -> list[bool]:
            return [verdict.behaviour == "refusal" for verdict in judge.judge(samples, replies)]

        made = own_safe_answers(
            load(self.theta_0, dtype=evaluation.dtype),
            prompts,
            is_safe,
            per_category=config.per_category,
            max_new_tokens=config.max_new_tokens,
            batch_size=evaluation.batch_size,
            test_sets=[(s.name, [*s.unsafe, *s.benign]) for s in self.stream.safety],
            allow_short=config.allow_short,
            progress=self.progress,
        )
        write_json(
            path,
            {
                "judge": chosen.name,
                "asked": made.asked,
                "kept": made.kept,
                "short": list(made.short),
                "answers": {sample.id: sample.answer for sample in made.samples},
            },
        )


def resolve(
    config: RunConfig, out: Path | str, *, methods: Sequence[str] | None = None, progress: Progress = silent
) -> Experiment:
    """Read the data and build the methods, so that every mistake in a run file shows before the first hour of work."""
    built = build_methods(config, methods)
    stream = build(config.stream, task_names=config.tasks)
    for task in stream.tasks:
        if not task.train:
            raise ConfigError(f"Task {task.name!r} has no training split; a stream is trained on every task.")
    _check_model(config.model)
    if config.safety_calibration.prompts is not None:
        asked = build_safety(config.safety_calibration.prompts, stream.root).unsafe
        stream = replace(stream, safety_calibration=[replace(s, turns=s.request, references=()) for s in asked])
    injected: tuple[Any, ...] = ()
    if config.injection is not None and config.injection.pool is not None:
        from holdfast.data.injection import inject_stream

        pool = build_calibration(
            config.injection.pool,
            stream.root,
            name="injection.pool",
            obtain="It holds harmful requests with answers that comply.",
        )
        stream, injected = inject_stream(stream, pool, fraction=config.injection.fraction, seed=config.seed)
    unanswered = [sample for sample in stream.safety_calibration if sample.answer is None]
    if unanswered:
        from holdfast.models.own_answers import refuse_overlap

        _own_judge(config)
        refuse_overlap(unanswered, [(s.name, [*s.unsafe, *s.benign]) for s in stream.safety])
    for method in built.values():
        if isinstance(method, ChecksStream):
            method.check_stream(stream)
    return Experiment(config=config, out=Path(out), stream=stream, methods=built, injected=injected, progress=progress)


def run(
    config: RunConfig,
    out: Path | str,
    *,
    methods: Sequence[str] | None = None,
    jobs: int = 1,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run (or resume) every method of `config`, or those named, into the directory `out`; returns the summary.

    jobs: so many methods at once, each in its own process; the results are those of jobs=1.
    """
    if jobs < 1:
        raise ConfigError(f"jobs is {jobs}; expected 1 or more.")
    set_threads(config.threads)
    experiment = resolve(config, out, methods=methods, progress=progress)
    with experiment.held():
        run_methods(experiment, list(experiment.methods), jobs=jobs)
        return write_summary(Path(out))


def set_threads(threads: int | None) -> None:
    """Bound the CPU threads of this process; sums in another number of threads may differ in the last bit."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _own_judge(config: RunConfig) -> Any:
    """The judge of theta_0's own answers. Raises UnknownNameError: none of the run's has the name."""
    wanted, judges = config.safety_calibration.judge, config.evaluation.judges
    chosen = next((judge for judge in judges if wanted in (None, judge.name)), None)
    if chosen is None:
        raise unknown_name("judge of this run", str(wanted), [judge.name for judge in judges])
    return chosen


def _check_model(model: str) -> None:
    """A path that is none. Whether a hub id can be had is asked when it is opened."""
    path = Path(model).expanduser()
    if not path.is_dir() and (path.is_absolute() or model.startswith((".", "~")) or len(path.parts) > 2):
        raise ConfigError(f"model: {model} is no folder; expected a model folder or a hub id (owner/name).")


def _label(name: str) -> str:
    """Labels are folder names of a run directory."""
    if not re.fullmatch(r"[A-Za-z0-9_+][A-Za-z0-9._+-]*", name):
        raise ConfigError(
            f"methods: label {name!r} cannot be a folder name; use letters, digits, '-', '_', '.', and begin with a "
            "letter or digit."
        )
    return name


def _method_options(value: Any) -> dict[str, Mapping[str, Any]]:
    """`methods` of a run file: a list of names, or label -> options (null for none)."""
    if isinstance(value, str):
        return {_label(value): {}}
    if isinstance(value, Mapping):
        for name, options in value.items():
            if options is not None and not isinstance(options, Mapping):
                raise ConfigError(f"methods.{name}: found {options!r}, expected a mapping of options.")
        return {_label(str(name)): dict(options or {}) for name, options in value.items()}
    if isinstance(value, Sequence) and all(isinstance(name, str) for name in value):
        return {_label(name): {} for name in value}
    raise ConfigError(f"methods: found {value!r}, expected a list of names or a mapping from names to options.")


def _build_method(label: str, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> Method:
    name = options.get("method", label)
    own = {key: value for key, value in options.items() if key != "method"}
    if name not in method_registry.METHODS:
        raise unknown_name("method", str(name), method_registry.METHODS)
    shared = {key: value for key, value in defaults.items() if key in _option_names(name)}
    return method_registry.get(name, label=label, defaults=shared, **own)


def _option_names(name: str) -> set[str]:
    return set(method_registry.config_of(name).__dataclass_fields__) if name in method_registry.METHODS else set()


def _recorded(method: Any) -> dict[str, Any]:
    return {"class": f"{type(method).__module__}:{type(method).__name__}", **encode(method.config)}


def _answered(sample: Sample, answer: str) -> Sample:
    return replace(sample, turns=(*sample.request, Turn(role="assistant", text=answer)), references=(answer,))


__all__ = [
    "Experiment",
    "InjectionConfig",
    "OwnAnswersConfig",
    "RunConfig",
    "RunError",
    "build_methods",
    "decode_run",
    "only",
    "read_run",
    "resolve",
    "run",
    "set_threads",
]
