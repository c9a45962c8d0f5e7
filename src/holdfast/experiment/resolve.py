"""A run file -> an `Experiment`: data read, methods built, every mistake said before the first hour of work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from holdfast import judges, registry, scorers
from holdfast import methods as method_registry
from holdfast.config import current_names, encode, with_defaults
from holdfast.data.images import pictures
from holdfast.data.inventory import check_models, check_pictures
from holdfast.data.streams import build, build_calibration, build_safety
from holdfast.data.types import SafetySet, Sample, Stream
from holdfast.errors import ConfigError, DataError, RunError, unknown_name
from holdfast.experiment.build import build_methods, parts_of
from holdfast.experiment.own import benign_judge, own_judge, with_own_answers
from holdfast.experiment.run_config import RunConfig, is_model
from holdfast.experiment.together import recorded_share, refuse_together
from holdfast.files import write_json
from holdfast.restore.sets import refuse_shared
from holdfast.share import current
from holdfast.stream.protocol import Checkpoint, ChecksStream, Method, silent
from holdfast.stream.record import RunDirectory, unlike
from holdfast.stream.runner import StreamRun

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

        own_judge(config)
        refuse_overlap(unanswered, [(s.name, [*s.unsafe, *s.benign]) for s in stream.safety])
    if stream.benign_calibration:
        from holdfast.calibration.own_answers import refuse_overlap

        refuse_overlap(stream.benign_calibration, [(s.name, [*s.unsafe, *s.benign]) for s in stream.safety])
        if stream.safety_calibration:
            refuse_overlap(stream.benign_calibration, [("safety_calibration", stream.safety_calibration)])
    if any(sample.answer is None for sample in stream.benign_calibration):
        benign_judge(config)
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
        config = self.shared_config()

        def today(label: str | None, recorded: Mapping[str, Any]) -> Mapping[str, Any]:
            if label is None:
                filled = with_defaults(RunConfig, recorded)
                if isinstance(filled.get("stream"), Mapping):  # another program's folder may have none
                    filled["stream"] = _without_layouts(filled["stream"])
                # Plugins are recorded by what they hold, and may come later.
                known = {*recorded, *config} - ({"plugins"} - set(recorded))
                return {key: value for key, value in filled.items() if key in known}
            cls = type(self.methods[label].config)  # type: ignore[attr-defined]
            return with_defaults(cls, current_names(cls, recorded, f"methods.{label}"))

        return StreamRun(
            directory=self.directory,
            stream=stream or self.stream,
            task_names=[task.name for task in self.stream.tasks],
            theta_0=self.theta_0,
            seed=self.config.seed,
            config=config,
            methods=self.recorded,
            progress=self.progress,
            grows=("stream.tasks", "tasks", "data_sha256", "plugins", *(f"plugins.{what}" for what in _PLUGGED)),
            today=today,
            share=current(),
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
                "stream": _without_layouts(encode(config.stream)),
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
                **recorded_share(),
                **({"plugins": self.plugged} if self.plugged else {}),
            }
        )

    def refuse_changed(self) -> None:
        """For a finished run: its options, data, code, models and pictures are those that it was made with.

        Nothing is written; one that goes on is checked when it claims its directory.
        Raises: RunError: something is not, or its records are damaged.
        """
        run = self.stream_run()
        changes = unlike(self.directory, run.config, self.recorded, grows=run.grows, today=run.today)
        if changes:
            raise RunError(
                f"{self.out} is finished, and was made with other options, data, code or weights than there are now "
                f"({'; '.join(changes[:5])}). Choose another --out, or remove it."
            )
        check_pictures(self.out / "pictures.json", self._pictures(), self.stream.root, add=False)
        check_models(self.out / "models.json", self._other_models(), add=False)

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
            if is_model(folder):
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

        refuse_together(self.config, self.methods, current())
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

    def with_own_answers(self) -> Stream:
        """The stream with answered calibration samples: made by theta_0 once, then read from theta_0/."""
        return with_own_answers(
            self.stream, self.config, self.theta_0, self.directory.theta_0_dir, progress=self.progress
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


def _without_layouts(stream: Mapping[str, Any]) -> dict[str, Any]:
    """An encoded stream without its layouts, which are written out in what the tasks name."""
    return {key: value for key, value in stream.items() if key != "layouts"}


def _gate_judge(config: RunConfig) -> Any:
    """The judge of the safety gate: the one named, else the first. Raises UnknownNameError: none of the run's."""
    wanted, known = config.safety_gate.judge if config.safety_gate else None, config.evaluation.judges
    chosen = next((judge for judge in known if wanted in (None, judge.name)), None)
    if chosen is None:
        raise unknown_name("judge of this run", str(wanted), [judge.name for judge in known])
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
