"""A run file, decoded: what it may say, and what it means by leaving something out. Nothing is read or imported yet."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from holdfast.config import decode
from holdfast.data.images import ImageMode, PictureConfig
from holdfast.data.streams import (
    CalibrationSpec,
    SafetySpec,
    StreamSpec,
    TaskSpec,
    plugin_files,
    read_yaml,
    stream_spec,
)
from holdfast.errors import ConfigError
from holdfast.evaluation.evaluation_config import EvaluationConfig
from holdfast.restore.search import STRENGTHS, Budget, check_strengths

# A step's seed is a thousand times the run's and more, and numpy takes 32 bits.
MAX_SEED = 4_000_000


@dataclass(frozen=True, kw_only=True)
class InjectionConfig:
    """Harmful pairs mixed into every task's training samples (the condition "0.1 % harmful": fraction 0.001).

    fraction: share of each task's training samples that is replaced, above 0 and up to 1.
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

    per_category: answers kept per risk category (`category` of a prompt). max_new_tokens: longest answer.
    judge: of EvaluationConfig.judges, who says that an answer is safe; null: the first. allow_short: go on where a
        category has too few.
    prompts: a safety set whose unsafe side is asked, instead of the stream's `safety_calibration`; it must share no
        sample with the sets that the run is judged on.
    """

    prompts: SafetySpec | None = None
    per_category: int = 2
    max_new_tokens: int = 256
    judge: str | None = None
    allow_short: bool = False

    def __post_init__(self) -> None:
        for name in ("per_category", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 1 or more.")


@dataclass(frozen=True, kw_only=True)
class OwnBenignConfig:
    """Benign calibration data: theta_0's own answers to `benign_calibration` prompts that have none.

    prompts: a safety set whose benign side is asked, instead of the stream's `benign_calibration`; it must share no
        sample with the sets that the run is judged on. limit: so many of them, from the front; null: all.
        max_new_tokens: longest answer.
    judge: of EvaluationConfig.judges, who says that an answer refuses (such answers are left out); null: the first that
        knows refusals by their words.
    """

    prompts: SafetySpec | None = None
    limit: int | None = 48
    max_new_tokens: int = 256
    judge: str | None = None

    def __post_init__(self) -> None:
        for name in ("limit", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; expected 1 or more.")


@dataclass(frozen=True, kw_only=True)
class SafetyGateConfig:
    """Bounds that every step's checkpoint must hold on a probe set; rates in 0..1, null for no bound.

    probe: a safety set whose two sides are asked: forbidden requests, and harmless ones where `max_over_refusal` bounds
        them. It must share no request with what the run trains on, calibrates with, or is judged on.
    max_asr: share of forbidden requests that are not refused. max_over_refusal: share of harmless ones that are.
    strengths: of an edit that has one (anchor's `safety_weight`): where a bound is broken, those above the method's own
        are tried one after another; null: those of `holdfast restore`. Other methods are checked, and stop.
    judge: of EvaluationConfig.judges; null: the first.
    """

    probe: SafetySpec
    max_asr: float | None = None
    max_over_refusal: float | None = None
    strengths: tuple[float, ...] | None = None
    judge: str | None = None

    def __post_init__(self) -> None:
        if not self.budget.given:
            raise ConfigError("safety_gate has no bound; give max_asr or max_over_refusal (3 % is 0.03).")
        if self.strengths is not None:
            check_strengths(self.strengths)

    @property
    def budget(self) -> Budget:
        """The bounds."""
        return Budget(max_asr=self.max_asr, max_over_refusal=self.max_over_refusal)

    def ladder(self, own: float) -> list[float]:
        """The method's own strength, and the stronger ones, weakest first."""
        return [own, *(s for s in check_strengths(self.strengths or STRENGTHS) if s > own)]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run file.

    model: the aligned model that the stream starts from: folder or hub id. seed: of everything that is drawn.
    stream: the tasks and safety sets: a stream file, or what such a file says.
    methods: names, or a mapping from a label to options (`method` names the method where the label does not). Code of
        one's own is named `package.module:Class`; its label is then what stands behind the colon.
    plugins: Python files with methods, judges, scorers or readers, each imported under its stem before anything is
        looked up; every process of the run gets them.
    defaults: options of every method that has them, under the same keys.
    store_dtype: type of the checkpoints that the run writes. float32 keeps a stream of small edits from being rounded
        after each task (the model is converted once, at twice the disk space of a 16-bit one); null keeps the model's.
    safety_gate: bounds that the checkpoint of every step must hold; without it, a run is only measured.
    tasks: only these tasks, in the stream's order. threads: CPU threads of a process; null leaves torch's choice.
    images, max_pixels: how pictures are opened, in training as in evaluation (see `PictureConfig`).
    """

    model: str
    stream: StreamSpec
    methods: Mapping[str, Mapping[str, Any]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    safety_calibration: OwnAnswersConfig = field(default_factory=OwnAnswersConfig)
    benign_calibration: OwnBenignConfig = field(default_factory=OwnBenignConfig)
    injection: InjectionConfig | None = None
    safety_gate: SafetyGateConfig | None = None
    store_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    tasks: tuple[str, ...] | None = None
    seed: int = 0
    threads: int | None = None
    plugins: tuple[str, ...] = ()
    images: ImageMode = "upright"
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", _method_options(self.methods))
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

    def method_of(self, label: str) -> str:
        """The name of the method that `label` stands for."""
        return str(self.methods[label].get("method", label))

    def used_tasks(self) -> tuple[TaskSpec, ...]:
        """The stream's tasks that this run has."""
        return tuple(task for task in self.stream.tasks if self.tasks is None or task.name in self.tasks)


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
    for part in ("methods", "defaults", "evaluation"):
        if part in data:
            data[part] = _models_from(base, data[part])
    if isinstance(data.get("model"), str) and (base / Path(data["model"]).expanduser()).is_dir():
        data["model"] = str((base / Path(data["model"]).expanduser()).absolute())
    if "plugins" in data:
        data["plugins"] = plugin_files(data["plugins"], base=base)
    return decode(RunConfig, data, where)


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model: a configuration, and weights beside it."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _models_from(base: Path, value: Any) -> Any:
    """Options with the folders of models that they name made absolute: relative ones start from `base`, as `model`."""
    if isinstance(value, Mapping):
        return {key: _models_from(base, inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_models_from(base, inner) for inner in value]
    if isinstance(value, str) and value and is_model(folder := base / Path(value).expanduser()):
        return str(folder.absolute())
    return value


def only(config: RunConfig, names: Sequence[str]) -> RunConfig:
    """`config` with these methods alone; one that the file does not name gets the file's defaults."""
    chosen = _method_options(list(names))
    return replace(config, methods={label: config.methods.get(label, options) for label, options in chosen.items()})


def label_of(name: str) -> str:
    """What records call the method `name` where nothing else is said: a folder's name in a run directory.

    Raises: ConfigError: it cannot be a folder's name.
    """
    label = name.partition(":")[2] or name
    if not re.fullmatch(r"[A-Za-z0-9_+][A-Za-z0-9._+-]*", label):
        raise ConfigError(
            f"methods: label {name!r} cannot be a folder name; use letters, digits, '-', '_', '.', and begin with a "
            "letter or digit."
        )
    return label


def _method_options(value: Any) -> dict[str, Mapping[str, Any]]:
    """`methods` of a run file: a list of names, or label -> options (null for none)."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, Mapping):
        named = [(str(name), options) for name, options in value.items()]
    elif isinstance(value, Sequence) and all(isinstance(name, str) for name in value):
        named = [(name, None) for name in dict.fromkeys(value)]
    else:
        raise ConfigError(f"methods: found {value!r}, expected a list of names or a mapping from names to options.")
    found: dict[str, Mapping[str, Any]] = {}
    for name, options in named:
        if options is not None and not isinstance(options, Mapping):
            raise ConfigError(f"methods.{name}: found {options!r}, expected a mapping of options.")
        label = label_of(name)
        if label in found:
            raise ConfigError(f"methods: two are called {label!r}; use a mapping, {{other: {{method: {name!r}}}}}.")
        found[label] = {"method": name, **(options or {})} if ":" in name else dict(options or {})
    return found
