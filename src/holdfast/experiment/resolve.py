"""A run file -> an `Experiment`: data read, methods built, every mistake said before the first hour of work."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from holdfast import judges, registry, scorers
from holdfast import methods as method_registry
from holdfast.config import current_names, encode
from holdfast.data import readers
from holdfast.data.images import pictures
from holdfast.data.inventory import check_models, check_pictures
from holdfast.data.streams import build, build_calibration, build_safety
from holdfast.data.types import SafetySet, Sample, Stream, Turn
from holdfast.errors import ConfigError, DataError, UnknownNameError, nearest, unknown_name
from holdfast.experiment.run_config import RunConfig, label_of
from holdfast.files import write_json
from holdfast.registry import Registry
from holdfast.restore.sets import refuse_shared
from holdfast.share import Share, current
from holdfast.stream.protocol import Checkpoint, ChecksStream, LearnsTogether, Method, silent
from holdfast.stream.record import RunDirectory
from holdfast.stream.runner import StreamRun
from holdfast.training.training_config import TrainingConfig

Progress = Callable[..., None]

# What config.json names the origin of, beside a method's own.
_PLUGGED = ("files", "judges", "scorers", "readers", "safety_readers")


def resolve(
    config: RunConfig, out: Path | str, *, methods: Sequence[str] | None = None, progress: Progress = silent
) -> Experiment:
    """Read the data and build the methods, so that every mistake in a run file shows before the first hour of work.

    Raises: ConfigError, DataError, UnknownNameError, ModelError: what is wrong, and where in the run file.
    """
    built = build_methods(config, methods)
    for judge in config.evaluation.judges:
        judges.get(judge.name, **judge.options)
    for spec in config.used_tasks():
        scorers.get(spec.scorer, mode=spec.scorer_mode, **spec.scorer_options)
    stream = build(config.stream, task_names=config.tasks)
    for task in stream.tasks:
        if not task.train:
            raise ConfigError(f"Task {task.name!r} has no training split; a stream is trained on every task.")
    _check_model(config.model)
    if config.safety_calibration.prompts is not None:
        asked = build_safety(config.safety_calibration.prompts, stream.root).unsafe
        stream = replace(stream, safety_calibration=[replace(s, turns=s.request, references=()) for s in asked])
    benign = config.benign_calibration
    if benign.prompts is not None:
        helped = build_safety(benign.prompts, stream.root).benign[: benign.limit]
        if not helped:
            raise ConfigError(f"benign_calibration.prompts: safety set {benign.prompts.name!r} has no benign side.")
        stream = replace(stream, benign_calibration=[replace(s, turns=s.request, references=()) for s in helped])
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
        from holdfast.calibration.own_answers import refuse_overlap

        _own_judge(config)
        refuse_overlap(unanswered, [(s.name, [*s.unsafe, *s.benign]) for s in stream.safety])
    if stream.benign_calibration:
        from holdfast.calibration.own_answers import refuse_overlap

        refuse_overlap(stream.benign_calibration, [(s.name, [*s.unsafe, *s.benign]) for s in stream.safety])
        if stream.safety_calibration:
            refuse_overlap(stream.benign_calibration, [("safety_calibration", stream.safety_calibration)])
    if any(sample.answer is None for sample in stream.benign_calibration):
        _benign_judge(config)
    probe = _gate_probe(config, stream)
    for method in built.values():
        if isinstance(method, ChecksStream):
            method.check_stream(stream)
    return Experiment(
        config=config,
        out=Path(out),
        stream=stream,
        methods=built,
        injected=injected,
        gate_probe=probe,
        progress=progress,
    )


def _gate_probe(config: RunConfig, stream: Stream) -> SafetySet | None:
    """The requests of the safety gate. Raises: DataError: they lack a side, or the run uses some of them otherwise."""
    gate = config.safety_gate
    if gate is None:
        return None
    _gate_judge(config)
    probe, what = build_safety(gate.probe, stream.root), "safety_gate.probe"
    if not probe.unsafe:
        raise DataError(f"{what}: safety set {gate.probe.name!r} has no forbidden request; expected at least one.")
    if gate.max_over_refusal is not None and not probe.benign:
        raise DataError(
            f"{what}: safety set {gate.probe.name!r} has no harmless requests, and safety_gate.max_over_refusal bounds "
            "how many of them are refused. Add a benign side, or set the bound to null."
        )
    refuse_shared(probe.unsafe, probe.benign, what=what, first="forbidden", second="harmless")
    asked = [*probe.unsafe, *probe.benign]
    words = {_words(sample) for sample in asked}
    others = [(f"in the test set {s.name!r}", [*s.unsafe, *s.benign]) for s in stream.safety]
    others += [
        ("among safety_calibration", list(stream.safety_calibration)),
        ("among benign_calibration", list(stream.benign_calibration)),
    ]
    for task in stream.tasks:
        parts = (("training", task.train), ("validation", task.validation), ("test", task.test))
        others += [(f"{part} samples of task {task.name!r}", list(samples)) for part, samples in parts]
    for where, samples in others:
        # Pictures are read only where the words are the same: a stream may hold a million.
        alike = [sample for sample in samples if _words(sample) in words]
        refuse_shared(asked, alike, what=what, first="probed with", second=where)
    return probe


def _words(sample: Sample) -> str:
    return " ".join(" ".join(turn.text.split()) for turn in sample.request)


def build_methods(config: RunConfig, names: Sequence[str] | None = None) -> dict[str, Method]:
    """The methods of a run (or those named), ready to run.

    Raises: UnknownNameError: no such method, or a default that no method has.
    """
    registry.load_plugins(config.plugins)
    chosen = list(config.methods) if names is None else [n if n in config.methods else label_of(n) for n in names]
    for label in chosen:
        if label not in config.methods:
            raise unknown_name("method of this run", label, config.methods)
    built = {label: _build_method(config, label) for label in chosen}
    known = {key for label in config.methods for key in _option_names(config.method_of(label))}
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


def _build_method(config: RunConfig, label: str) -> Method:
    name = config.method_of(label)
    own = {key: value for key, value in config.methods[label].items() if key != "method"}
    shared = {key: _members(name, key, value) for key, value in config.defaults.items() if key in _options(name)}
    return method_registry.get(name, label=label, defaults=shared, **own)


def _options(name: str) -> set[str]:
    return set(method_registry.config_of(name).__dataclass_fields__)


def _members(name: str, key: str, value: Any) -> Any:
    """Of a group of defaults (`edit`) those that the method's own kind of the group has.

    What no method has stays, so that it is refused by its name.
    """
    own = _group(name, key)
    others = set(value) - own if isinstance(value, Mapping) and own else set()
    if others:
        everywhere = {member for method in method_registry.METHODS for member in _group(method, key)}
        return {member: v for member, v in value.items() if member not in others & everywhere}
    return value


def _group(name: str, key: str) -> set[str]:
    """Names inside the group `key` of a method's options, old ones too; none where it is no group."""
    hint = typing.get_type_hints(method_registry.config_of(name)).get(key)
    if not (isinstance(hint, type) and is_dataclass(hint)):
        return set()
    return {f.name for f in fields(hint)} | set(getattr(hint, "__old_names__", {}))


def _option_names(name: str) -> set[str]:
    """Option names of a method, none of one that does not exist: another run of the file may leave it out."""
    try:
        return _options(name)
    except UnknownNameError:
        return set()


def parts_of(config: RunConfig, labels: Sequence[str] | None = None) -> list[tuple[str, Registry, str]]:
    """(what, registry, name) of everything that a run looks up by name, each once.

    labels: of the methods that count; None: all of the file.
    """
    stream, injected = config.stream, config.injection
    tasks = config.used_tasks()
    pools = [
        pool
        for pool in (stream.safety_calibration, stream.benign_calibration, injected.pool if injected else None)
        if pool
    ]
    formats = [*(task.format for task in tasks), *(pool.format for pool in pools)]
    asked = (config.safety_calibration.prompts, config.benign_calibration.prompts)
    sets = [*stream.safety, *(prompts for prompts in asked if prompts)]
    if config.safety_gate is not None:
        sets.append(config.safety_gate.probe)
    found = [
        *(("methods", method_registry.REGISTRY, config.method_of(label)) for label in labels or config.methods),
        *(("judges", judges.REGISTRY, judge.name) for judge in config.evaluation.judges),
        *(("scorers", scorers.REGISTRY, task.scorer) for task in tasks),
        *(("readers", readers.REGISTRY, name) for name in formats),
        *(("safety_readers", readers.SAFETY_REGISTRY, spec.format) for spec in sets),
    ]
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Experiment:
    """A run that is resolved: data read, methods built, everything checked, nothing computed.

    recorded: what config.json holds of each method. plugged: of which code the plug-in files and the judges, scorers
    and readers are that are not holdfast's own. Both are of the code as it was when it was loaded.
    """

    config: RunConfig
    out: Path
    stream: Stream
    methods: Mapping[str, Method]
    injected: Sequence[Any] = ()
    gate_probe: SafetySet | None = None
    progress: Progress = silent
    recorded: Mapping[str, Mapping[str, Any]] = field(init=False)
    plugged: Mapping[str, Mapping[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        named = {label: self.config.method_of(label) for label in self.methods}
        recorded = {label: _recorded(self.methods[label], name) for label, name in named.items()}
        object.__setattr__(self, "recorded", recorded)
        object.__setattr__(self, "plugged", _plugged(self.config, list(self.methods)))

    @property
    def directory(self) -> RunDirectory:
        """Paths of the run directory, and its records."""
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
            methods=self.recorded,
            progress=self.progress,
            grows=("stream.tasks", "tasks", "data_sha256", "plugins", *(f"plugins.{what}" for what in _PLUGGED)),
            renamed=self._renamed,
            share=current(),
        )

    def _renamed(self, label: str, recorded: Mapping[str, Any]) -> Mapping[str, Any]:
        method: Any = self.methods[label]
        return current_names(type(method.config), recorded, f"methods.{label}")

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
                # Its layouts are written out in what the tasks name; directories of before know of none.
                "stream": {key: value for key, value in encode(config.stream).items() if key != "layouts"},
                "tasks": config.tasks,
                "data_sha256": {task.name: self._digest([*task.train, *task.test]) for task in self.stream.tasks},
                "safety_sha256": {s.name: self._digest([*s.unsafe, *s.benign]) for s in self.stream.safety},
                "calibration_sha256": self._digest(self.stream.safety_calibration),
                "benign_sha256": self._digest(self.stream.benign_calibration),
                "evaluation": config.evaluation,
                "safety_calibration": config.safety_calibration,
                "benign_calibration": config.benign_calibration,
                "injection": config.injection,
                "store_dtype": config.store_dtype,
                "seed": config.seed,
                "threads": config.threads,
                "images": config.images,
                "max_pixels": config.max_pixels,
                **self._recorded_gate(),
                **_recorded_share(),
                **({"plugins": self.plugged} if self.plugged else {}),
            }
        )

    def _recorded_gate(self) -> dict[str, Any]:
        """Nothing where there is none: directories of before know of no gate."""
        if self.gate_probe is None:
            return {}
        asked = [*self.gate_probe.unsafe, *self.gate_probe.benign]
        return {"safety_gate": self.config.safety_gate, "safety_gate_sha256": self._digest(asked)}

    def gated(self, method: Method) -> Any:
        """`method` behind the run's safety gate; itself where there is none."""
        gate, probe, evaluation = self.config.safety_gate, self.gate_probe, self.config.evaluation
        if gate is None or probe is None:
            return method
        from holdfast.experiment.gated import Gated
        from holdfast.restore.measure import Probe

        chosen = _gate_judge(self.config)
        return Gated(
            method=method,
            gate=gate,
            probe=Probe(
                safety=tuple(probe.unsafe),
                benign=tuple(probe.benign),
                task=(),
                judge=judges.get(chosen.name, **chosen.options),
                scorer=None,
                max_new_tokens=probe.max_new_tokens,
                batch_size=evaluation.batch_size,
            ),
            probe_identity={
                "name": probe.name,
                "sha256": self._digest([*probe.unsafe, *probe.benign]),
                "forbidden": len(probe.unsafe),
                "harmless": len(probe.benign),
                "judge": encode(chosen),
            },
            dtype=evaluation.dtype,
        )

    def _digest(self, samples: Sequence[Sample]) -> str:
        """With image paths under the data root: pictures are not read, a stream may hold a million."""
        from holdfast.evaluation.identity import samples_digest

        root = self.stream.root
        return samples_digest(samples, lambda p: p.relative_to(root).as_posix() if p.is_relative_to(root) else p.name)

    def _pictures(self) -> Iterator[Path]:
        """Every picture that the run shows to a model."""
        stream = self.stream
        sets = [part for task in stream.tasks for part in (task.train, task.validation, task.test)]
        sets += [side for s in stream.safety for side in (s.unsafe, s.benign)]
        if self.gate_probe is not None:
            sets += [self.gate_probe.unsafe, self.gate_probe.benign]
        for samples in (*sets, stream.safety_calibration, stream.benign_calibration):
            for sample in samples:
                yield from sample.images

    def _other_models(self) -> dict[str, str]:
        """Folder -> fingerprint of every model that the options of methods and judges name (an unaligned one, a guard).

        The model that is tuned is in config.json.
        """
        from holdfast.checkpoints.fingerprint import fingerprint
        from holdfast.checkpoints.reader import CheckpointReader

        options = [*self.recorded.values(), *(judge.options for judge in self.config.evaluation.judges)]
        found = {}
        for place in sorted(set(_texts(encode(options))) - {self.config.model}):
            folder = Path(place).expanduser()
            if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
                with CheckpointReader(folder) as reader:
                    found[place] = fingerprint(reader)
        return found

    def evaluator(self) -> Any:
        """What asks a checkpoint every task and every safety set, as the run file says."""
        from holdfast.evaluation import CheckpointEvaluator

        return CheckpointEvaluator(self.config.evaluation, share=current())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the directory, and do once what all methods share: log what was injected, evaluate theta_0."""
        from holdfast.models.held import holding

        self.refuse_together(current())
        run = self.stream_run()
        with run.claimed(), pictures(self.config.pictures), holding():
            current().by_chief(self._prepare)
            # The shorter of the two first: where theta_0 gives no safe answers, nobody waits for its scores.
            self.with_own_answers()
            run.evaluate_theta_0(self.evaluator())
            yield

    def _prepare(self) -> None:
        check_pictures(self.out / "pictures.json", self._pictures(), self.stream.root)
        check_models(self.out / "models.json", self._other_models())
        if self.injected:
            write_json(self.out / "injected.json", [log.to_json() for log in self.injected])
        self._convert_theta_0()

    def refuse_together(self, share: Share) -> None:
        """Raises ConfigError: something of this run is not made for the processes that were started for it."""
        if share.world == 1:
            return
        if self.config.evaluation.backend == "vllm":
            raise ConfigError(
                f"evaluation.backend is vllm, which takes the devices for itself, and {share.world} processes were "
                "started for the run. Set it to transformers, or run in one process."
            )
        if share.sharded and self.config.safety_gate is not None:
            raise ConfigError(
                "safety_gate asks every checkpoint on one device, and this run shares the base out over several "
                "(FSDP2). Leave one of the two out; `holdfast gate` asks a finished checkpoint."
            )
        for label, method in self.methods.items():
            ways = method.together if isinstance(method, LearnsTogether) else frozenset()
            if share.way in ways:
                training = getattr(getattr(method, "config", None), "training", None)
                if isinstance(training, TrainingConfig):
                    training.refuse_uneven(share.world)
                continue
            able = (
                "it can learn with a base that is whole in each process: leave --fsdp out"
                if ways
                else "it learns in one process alone: start one"
            )
            what = "with a base that is shared out over them (FSDP2)" if share.sharded else "together"
            raise ConfigError(
                f"Method {label!r} cannot learn in {share.world} processes {what}; {able}, or run the other methods "
                "with --method."
            )

    def _convert_theta_0(self) -> None:
        if self.config.store_dtype is None:
            return
        from holdfast.checkpoints.cast import cast_checkpoint
        from holdfast.models.precision import parse_dtype

        cast_checkpoint(self.config.model, self.theta_0.base, parse_dtype(self.config.store_dtype))

    def run_method(self, name: str) -> None:
        """Every task with one method, within `held` (of this process or of the one that started it)."""
        from holdfast.models.held import holding

        with pictures(self.config.pictures), holding():
            run = self.stream_run(self.with_own_answers())
            run.run_method(self.gated(self.methods[name]), self.evaluator())

    def with_own_answers(self) -> Stream:
        """The stream with answered calibration samples: made by theta_0 once, then read from theta_0/."""
        stream = self.stream
        return replace(
            stream,
            safety_calibration=self._answered(stream.safety_calibration, "safety_calibration.json", self._safe_answers),
            benign_calibration=self._answered(
                stream.benign_calibration, "benign_calibration.json", self._helpful_answers
            ),
        )

    def _answered(
        self, samples: Sequence[Sample], file: str, make: Callable[[Sequence[Sample]], dict[str, Any]]
    ) -> Sequence[Sample]:
        """`samples`, those without an answer given theta_0's own, or left out where it has none that is kept."""
        unanswered = [sample for sample in samples if sample.answer is None]
        if not unanswered:
            return samples
        path = self.directory.theta_0_dir / file
        current().once(path, lambda: make(unanswered), write_json)
        answers = json.loads(path.read_text(encoding="utf-8"))["answers"]
        answered = [_answered(s, answers[s.id]) if s.id in answers else s for s in samples]
        return [s for s in answered if s.answer is not None]

    def _helpful_answers(self, prompts: Sequence[Sample]) -> dict[str, Any]:
        from holdfast.calibration.own_answers import own_helpful_answers
        from holdfast.models.held import load

        config, evaluation = self.config.benign_calibration, self.config.evaluation
        chosen = _benign_judge(self.config)
        judge = judges.get(chosen.name, **chosen.options)

        def is_refusal(samples: Sequence[Sample], replies: Sequence[str]) -> list[bool]:
            return [verdict.behaviour == "refusal" for verdict in judge.judge(samples, replies, side="benign")]

        made = own_helpful_answers(
            load(self.theta_0, dtype=evaluation.dtype),
            prompts,
            current().told(is_refusal),
            max_new_tokens=config.max_new_tokens,
            batch_size=evaluation.batch_size,
            test_sets=[(s.name, [*s.unsafe, *s.benign]) for s in self.stream.safety],
            progress=self.progress,
        )
        return {
            "judge": chosen.name,
            "asked": made.asked,
            "kept": made.kept,
            "answers": {sample.id: sample.answer for sample in made.samples},
        }

    def _safe_answers(self, prompts: Sequence[Sample]) -> dict[str, Any]:
        from holdfast.calibration.own_answers import own_safe_answers
        from holdfast.models.held import load

        config, evaluation = self.config.safety_calibration, self.config.evaluation
        chosen = _own_judge(self.config)
        judge = judges.get(chosen.name, **chosen.options)

        def is_safe(samples: Sequence[Sample], replies: Sequence[str]) -> list[bool]:
            return [verdict.behaviour == "refusal" for verdict in judge.judge(samples, replies)]

        made = own_safe_answers(
            load(self.theta_0, dtype=evaluation.dtype),
            prompts,
            current().told(is_safe),
            per_category=config.per_category,
            max_new_tokens=config.max_new_tokens,
            batch_size=evaluation.batch_size,
            test_sets=[(s.name, [*s.unsafe, *s.benign]) for s in self.stream.safety],
            allow_short=config.allow_short,
            progress=self.progress,
        )
        return {
            "judge": chosen.name,
            "asked": made.asked,
            "kept": made.kept,
            "short": list(made.short),
            "answers": {sample.id: sample.answer for sample in made.samples},
        }


def _own_judge(config: RunConfig) -> Any:
    """The judge of theta_0's own answers. Raises UnknownNameError: none of the run's has the name."""
    wanted, judges = config.safety_calibration.judge, config.evaluation.judges
    chosen = next((judge for judge in judges if wanted in (None, judge.name)), None)
    if chosen is None:
        raise unknown_name("judge of this run", str(wanted), [judge.name for judge in judges])
    return chosen


def _gate_judge(config: RunConfig) -> Any:
    """The judge of the safety gate: the one named, else the first. Raises UnknownNameError: none of the run's."""
    wanted, known = config.safety_gate.judge if config.safety_gate else None, config.evaluation.judges
    chosen = next((judge for judge in known if wanted in (None, judge.name)), None)
    if chosen is None:
        raise unknown_name("judge of this run", str(wanted), [judge.name for judge in known])
    return chosen


def _benign_judge(config: RunConfig) -> Any:
    """The judge of theta_0's own benign answers: the one named, else the first that finds refusals by their words."""
    wanted, judges = config.benign_calibration.judge, config.evaluation.judges
    if wanted is None:
        return next((judge for judge in judges if judge.name.startswith("keyword")), judges[0])
    chosen = next((judge for judge in judges if judge.name == wanted), None)
    if chosen is None:
        raise unknown_name("judge of this run", wanted, [judge.name for judge in judges])
    return chosen


def _check_model(model: str) -> None:
    """A path that is none. Whether a hub id can be had is asked when it is opened."""
    path = Path(model).expanduser()
    if not path.is_dir() and (path.is_absolute() or model.startswith((".", "~")) or len(path.parts) > 2):
        raise ConfigError(f"model: {model} is no folder; expected a model folder or a hub id (owner/name).")


def _plugged(config: RunConfig, labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of which code everything is that is not holdfast's own; a method's stands with its options."""
    files = {plugin.path.name: {"sha256": plugin.sha256} for plugin in registry.load_plugins(config.plugins)}
    found = registry.origins(part for part in parts_of(config, labels) if part[0] != "methods")
    return {**({"files": files} if files else {}), **found}


def _recorded_share() -> dict[str, Any]:
    """Sums over another number of processes differ in the last bits, so it is part of what a directory belongs to."""
    share = current()
    return {"processes": {"number": share.world, "base": share.way}} if share.world > 1 else {}


def _recorded(method: Any, name: str) -> dict[str, Any]:
    """What config.json holds of a method: class and options, and of code from elsewhere what tells a change of it."""
    names = method_registry.REGISTRY
    origin = names.origin(name) if names.find(name).source != "builtin" else {}
    place = f"{type(method).__module__}:{type(method).__name__}"
    came_from = {key: value for key, value in origin.items() if key != "class"}
    return {"class": place, **({"class_from": came_from} if came_from else {}), **encode(method.config)}


def _texts(value: Any) -> Iterator[str]:
    """Every text in plain data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _answered(sample: Sample, answer: str) -> Sample:
    return replace(sample, turns=(*sample.request, Turn(role="assistant", text=answer)), references=(answer,))
