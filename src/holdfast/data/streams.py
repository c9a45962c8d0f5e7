"""A stream file (YAML) -> a Stream of samples. Every key is checked, every path is kept below the data root.

    name: my-stream
    root: ${HOLDFAST_DATA}/mine          # relative to the YAML file; ~ and environment variables are expanded
    tasks:
      - {name: charts, format: llava, train: charts/train.json, test: [charts/test.json, charts/val.json],
         scorer: relaxed_accuracy, max_new_tokens: 16}
    safety:
      - {name: red-team, format: qa, options: {unsafe: harm.jsonl, benign: help.jsonl}}
    safety_calibration: {format: qa, file: own_refusals.jsonl}
    benign_calibration: {format: qa, file: benign_twins.jsonl}

Forks of one benchmark put their folders elsewhere. `layouts` is the table of them: a name, and the folders it may stand
for in order of preference. `{name}` in a task's files, images and options is each of them in turn:

    layouts: {instructions: [Instructions_Original, playground/Instructions_Original, .]}
    tasks: [{name: GQA, train: "{instructions}/GQA/train.json", test: "{instructions}/GQA/{test,val}.json"}]

A run file embeds it under its own key: a mapping such as the above, or the path of a stream file (`stream_spec`).
"""

from __future__ import annotations

import gc
import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from holdfast.config import decode
from holdfast.data.items import refuse_duplicates, rename_duplicates
from holdfast.data.names import refuse_shared_names
from holdfast.data.readers import Source, Split, safety_reader, task_reader
from holdfast.data.source_files import expand_braces, missing, read_text
from holdfast.data.types import SafetySet, Sample, Stream, Task
from holdfast.errors import ConfigError, DataError, HoldfastError, unknown_name
from holdfast.files import parse_yaml
from holdfast.registry import load_plugins

Files = str | tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One task as written in a stream file.

    train, validation, test: the split's file relative to the stream's `root`, or a list of its known names (the first
        that exists is read); `{val,test}.json` stands for both names.
    images: folders, relative to `root`, that image paths may start from. image_search: look an image up by its base
        name where its path leads nowhere.
    options: what the format takes; scorer_options: what the scorer takes.
    limit: at most so many samples of each split, from the front; train_limit and test_limit (also for validation)
        override it.
    duplicate_ids: what a repeated id in a test split does. Training ids are always made unique (`id#2`).
    expected: published number of samples per split; obtain, license: sentences for people; doctor reports them.
    """

    name: str
    format: str = "llava"
    train: Files = ()
    validation: Files = ()
    test: Files = ()
    images: Files = (".",)
    image_search: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    scorer: str = "exact_match"
    scorer_mode: Literal["paper", "strict"] = "strict"
    scorer_options: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int = 64
    limit: int | None = None
    train_limit: int | None = None
    test_limit: int | None = None
    duplicate_ids: Literal["refuse", "rename"] = "refuse"
    expected: Mapping[str, int] = field(default_factory=dict)
    obtain: str = ""
    license: str = ""

    def __post_init__(self) -> None:
        _check_name("task", self.name)
        _check_positive(self, "max_new_tokens", "limit", "train_limit", "test_limit")
        if not _files(self.test):
            raise ConfigError(
                f"task {self.name!r} names no test file; every task needs a `test` split to be scored on."
            )
        unknown = sorted(set(self.expected) - {"train", "validation", "test"})
        if unknown:
            raise ConfigError(f"task {self.name!r}: expected.{unknown[0]} is no split; use train, validation, test.")

    def split_limit(self, split: Split) -> int | None:
        """The most samples to take of `split`, or None for all."""
        own = self.train_limit if split == "train" else self.test_limit
        return self.limit if own is None else own


@dataclass(frozen=True, kw_only=True)
class SafetySpec:
    """One safety set as written in a stream file. root: its own folder, relative to the stream's root."""

    name: str
    format: str
    root: str = "."
    options: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    max_new_tokens: int | None = None  # None: the benchmark's own
    expected: Mapping[str, int] = field(default_factory=dict)
    obtain: str = ""
    license: str = ""

    def __post_init__(self) -> None:
        _check_name("safety set", self.name)
        _check_positive(self, "limit", "max_new_tokens")
        unknown = sorted(set(self.expected) - {"unsafe", "benign"})
        if unknown:
            raise ConfigError(f"safety set {self.name!r}: expected.{unknown[0]} is no side; use unsafe, benign.")


@dataclass(frozen=True, kw_only=True)
class CalibrationSpec:
    """Own answers of theta_0 (from `holdfast calibrate-data`), or the prompts to make them from."""

    file: Files
    format: str = "qa"
    images: Files = (".",)
    options: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None

    def __post_init__(self) -> None:
        _check_positive(self, "limit")


@dataclass(frozen=True, kw_only=True)
class StreamSpec:
    """A whole stream file.

    root: the data root, relative to the file that it is written in. layouts: name -> the folders below the root that
        `{name}` stands for in what the tasks and the calibration data name; all forks of a benchmark in one table.
    safety_calibration: forbidden requests,
    benign_calibration: benign ones beside them; both with theta_0's own answers, or without (then the run makes them).
    """

    name: str
    tasks: tuple[TaskSpec, ...]
    root: str = "."
    layouts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    safety: tuple[SafetySpec, ...] = ()
    safety_calibration: CalibrationSpec | None = None
    benign_calibration: CalibrationSpec | None = None
    description: str = ""
    obtain: str = ""
    license: str = ""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError(f"stream {self.name!r} has no task; list at least one under `tasks`.")
        for kind, names in (("task", [t.name for t in self.tasks]), ("safety set", [s.name for s in self.safety])):
            refuse_shared_names(kind, names, f"stream {self.name!r}")
        for name, folders in self.layouts.items():
            if not folders or not re.fullmatch(r"\w+", name) or any(set(folder) & set(",{}") for folder in folders):
                raise ConfigError(
                    f"stream {self.name!r}: layouts.{name} is {list(folders)!r}; expected a name of letters, digits "
                    "and '_', and at least one folder below the root, without commas and braces."
                )
        # Written out at once, so that an unknown name shows before any file is looked for.
        object.__setattr__(self, "tasks", tuple(self._written_out(task) for task in self.tasks))
        for name in ("safety_calibration", "benign_calibration"):
            if (calibration := getattr(self, name)) is not None:
                object.__setattr__(self, name, self._written_out(calibration))

    def _written_out(self, spec: Any) -> Any:
        """A task or a calibration with every `{name}` of `layouts` as `{folder,folder,...}`."""
        if not self.layouts:
            return spec
        owner = f"task {spec.name!r}" if isinstance(spec, TaskSpec) else "calibration data"
        values = {f.name: getattr(spec, f.name) for f in fields(spec) if f.name in _LAID_OUT}
        return replace(spec, **{key: _with_layouts(value, self.layouts, owner) for key, value in values.items()})

    @property
    def data_root(self) -> Path:
        """`root` with `~` and environment variables expanded. Raises ConfigError: a variable is not set."""
        return expand_root(self.root)


# What of a task or of calibration data may name a layout.
_LAID_OUT = ("train", "validation", "test", "file", "images", "options")


def _with_layouts(value: Any, layouts: Mapping[str, tuple[str, ...]], owner: str) -> Any:
    """`value` with each `{name}` in its texts replaced by the folders of that layout, as alternatives.

    Raises UnknownNameError: no layout has this name.
    """
    if isinstance(value, str):

        def folders(match: re.Match[str]) -> str:
            name = match.group(1)
            if name not in layouts:
                raise unknown_name(f"layout in {owner}", name, layouts)
            return layouts[name][0] if len(layouts[name]) == 1 else "{" + ",".join(layouts[name]) + "}"

        return re.sub(r"\{(\w+)\}", folders, value)
    if isinstance(value, Mapping):
        return {key: _with_layouts(one, layouts, owner) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_layouts(one, layouts, owner) for one in value)
    return value


def expand_root(root: str) -> Path:
    """A data root with `~` and `${VARIABLE}` expanded. Raises ConfigError that names the variable to set."""
    expanded = os.path.expandvars(root)
    if "$" in expanded:
        raise ConfigError(
            f"root {root!r}: an environment variable in it is not set. Set it (for example "
            "`export HOLDFAST_DATA=/path/to/data`), or give the data root itself."
        )
    return Path(expanded).expanduser()


def read_yaml(path: Path) -> Any:
    """The value of a YAML file. Raises DataError (missing, wrong encoding) or ConfigError (syntax, with the line)."""
    if not path.exists():
        raise DataError(missing(path))
    return parse_yaml(read_text(path), path)


def read_spec(path: Path | str) -> StreamSpec:
    """The decoded stream file `path`, its root made absolute.

    A run file, with the stream under `stream:`, is accepted; its plug-ins are loaded, as its formats may be theirs.
    """
    path = Path(path)
    data = read_yaml(path)
    if isinstance(data, Mapping) and "stream" in data and ("tasks" not in data or "model" in data):
        load_plugins(plugin_files(data.get("plugins", ()), base=path.parent))
        return stream_spec(data["stream"], base=path.parent)
    return _anchored(decode(StreamSpec, data, str(path)), path.parent)


def plugin_files(value: Any, *, base: Path) -> tuple[str, ...]:
    """`plugins` of a run file, a name or a list of them, as absolute paths. Raises ConfigError: something else."""
    files = decode(_Plugins, {"plugins": [value] if isinstance(value, str) else value}).plugins
    return tuple(str((base / Path(file).expanduser()).absolute()) for file in files)


@dataclass(frozen=True, kw_only=True)
class _Plugins:
    plugins: tuple[str, ...]


def stream_spec(value: Any, *, base: Path) -> StreamSpec:
    """The stream of a run file: `value` is its `stream` key, a mapping or the path of a stream file.

    Relative paths start from `base`, the folder of the run file.
    """
    if isinstance(value, StreamSpec):
        return value
    if isinstance(value, str | Path):
        path = base / Path(value).expanduser()
        return read_spec(path)
    return _anchored(decode(StreamSpec, value, "stream"), base)


def load_stream(
    path: Path | str,
    *,
    root: Path | str | None = None,
    task_names: Sequence[str] | None = None,
    parts: Sequence[Split] = ("train", "validation", "test"),
    safety: bool = True,
) -> Stream:
    """The stream of the YAML file `path`, every split read, images left on disk.

    root: use this data root instead of the file's. task_names: only these tasks, in the file's order.
    parts: the splits to read. safety: read the safety sets and their calibration data too.
    Raises ConfigError, UnknownNameError or DataError; the message names file, place and remedy.
    """
    spec = read_spec(path)
    if root is not None:
        spec = replace(spec, root=str(Path(root).absolute()))
    return build(spec, task_names=task_names, parts=parts, safety=safety)


def build(
    spec: StreamSpec,
    *,
    task_names: Sequence[str] | None = None,
    parts: Sequence[Split] = ("train", "validation", "test"),
    safety: bool = True,
) -> Stream:
    """The Stream that `spec` describes. Everything is read now: a fault in the last task must not wait for days.

    Raises: DataError, ConfigError, UnknownNameError: what is wrong, with the task it is wrong in.
    """
    root = spec.data_root
    if not root.is_dir():
        raise DataError(f"Data root of stream {spec.name!r}: {missing(root, obtain=spec.obtain)}")
    chosen = spec.tasks
    if task_names is not None:
        known = {task.name for task in spec.tasks}
        for name in task_names:
            if name not in known:
                raise DataError(f"Stream {spec.name!r} has no task {name!r}; it has {', '.join(sorted(known))}.")
        chosen = tuple(task for task in spec.tasks if task.name in set(task_names))
    return Stream(
        name=spec.name,
        root=root,
        tasks=tuple(build_task(task, root, obtain=spec.obtain, parts=parts) for task in chosen),
        safety=tuple(build_safety(s, root) for s in spec.safety) if safety else (),
        safety_calibration=build_calibration(spec.safety_calibration, root)
        if spec.safety_calibration and safety
        else (),
        benign_calibration=build_calibration(
            spec.benign_calibration,
            root,
            name="benign_calibration",
            obtain="It holds benign requests that resemble forbidden ones; the run lets theta_0 answer them.",
        )
        if spec.benign_calibration and safety
        else (),
    )


def build_task(
    spec: TaskSpec, root: Path, *, obtain: str = "", parts: Sequence[Split] = ("train", "validation", "test")
) -> Task:
    """Reads the splits `parts` of one task; the others stay empty."""
    read = {split: read_split(spec, split, root, obtain=obtain) for split in parts}
    return Task(
        name=spec.name,
        train=read.get("train", ()),
        validation=read.get("validation", ()),
        test=read.get("test", ()),
        scorer=spec.scorer,
        scorer_mode=spec.scorer_mode,
        scorer_options=dict(spec.scorer_options),
        max_new_tokens=spec.max_new_tokens,
    )


def source_of(spec: TaskSpec, split: Split, root: Path, *, obtain: str = "") -> Source:
    """What the task's reader is asked for `split`."""
    return Source(
        name=spec.name,
        split=split,
        root=root,
        files=_files({"train": spec.train, "validation": spec.validation, "test": spec.test}[split]),
        images=_files(spec.images),
        image_search=spec.image_search,
        options=spec.options,
        obtain=spec.obtain or obtain,
    )


def read_split(spec: TaskSpec, split: Split, root: Path, *, obtain: str = "") -> tuple[Sample, ...]:
    """Samples of one split, ids unique; () for a split that the task does not name.

    Raises DataError: an empty split, a repeated test id, a training sample without a target.
    """
    source = source_of(spec, split, root, obtain=obtain)
    if not source.files:
        return ()
    limit = spec.split_limit(split)
    with _without_collection():
        samples = task_reader(spec.format)(replace(source, limit=limit))[:limit]
    where = f"Task {spec.name!r}, {split} split ({source.shown()})"
    if not samples:
        raise DataError(f"{where} is empty; expected at least one sample.")
    if split == "train":
        for sample in samples:
            if sample.turns[-1].role != "assistant" or not sample.turns[-1].text.strip():
                raise DataError(f"{where}: sample {sample.id!r} has no answer to learn; drop it or add its answer.")
    if split == "train" or spec.duplicate_ids == "rename":
        samples = rename_duplicates(samples)
    else:
        refuse_duplicates(samples, where)
    return tuple(samples)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Python's search for cycles visits every object made so far again and again; samples have none to find."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def build_safety(spec: SafetySpec, root: Path) -> SafetySet:
    """Reads one safety set through its format's reader and applies the limit to each side.

    Raises: ConfigError: options that the format does not take. DataError: what its reader says.
    """
    base = root / expand_root(spec.root)
    reader = safety_reader(spec.format)
    try:
        inspect.signature(reader).bind(base, name=spec.name, **spec.options)
    except TypeError as error:
        takes = [name for name, p in inspect.signature(reader).parameters.items() if p.kind is p.KEYWORD_ONLY]
        raise ConfigError(
            f"safety set {spec.name!r}: format {spec.format!r} refused its options {dict(spec.options)}: {error}. "
            f"It takes {', '.join(name for name in takes if name != 'name')}."
        ) from error
    try:
        loaded = reader(base, name=spec.name, **spec.options)
    except HoldfastError as error:
        if not spec.obtain or spec.obtain in str(error):
            raise
        raise type(error)(f"{error} {spec.obtain}") from error
    return replace(
        loaded,
        unsafe=tuple(loaded.unsafe[: spec.limit]),
        benign=tuple(loaded.benign[: spec.limit]),
        max_new_tokens=spec.max_new_tokens or loaded.max_new_tokens,
    )


def build_calibration(
    spec: CalibrationSpec,
    root: Path,
    *,
    name: str = "safety_calibration",
    obtain: str = "Make it with `holdfast calibrate-data`.",
) -> tuple[Sample, ...]:
    """Reads the safety calibration data, ids made unique.

    name, obtain: what errors call it, and say of where it comes from.

    Raises: DataError: the file is missing, empty, or holds something else.
    """
    source = Source(
        name=name,
        split="train",
        root=root,
        files=_files(spec.file),
        images=_files(spec.images),
        options=spec.options,
        obtain=obtain,
        limit=spec.limit,
    )
    samples = rename_duplicates(task_reader(spec.format)(source))
    if not samples:
        raise DataError(f"{name}: {source.path()} is empty; expected at least one sample.")
    return tuple(samples[: spec.limit])


def _anchored(spec: StreamSpec, base: Path) -> StreamSpec:
    """`spec` with a root that no longer depends on where the file lies; an unset variable is left for later."""
    if "$" in os.path.expandvars(spec.root):
        return spec
    return replace(spec, root=str((base / expand_root(spec.root)).absolute()))


def _files(value: Files) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else value
    return tuple(dict.fromkeys(name for pattern in patterns for name in expand_braces(pattern)))


def _check_name(kind: str, name: str) -> None:
    """Names become folder names of a run directory."""
    if not name or name != name.strip() or name.startswith(".") or any(c in '/\\:*?"<>|\0\n' for c in name):
        raise ConfigError(f"{kind} name {name!r} cannot be a folder name; use letters, digits, '-', '_'.")


def _check_positive(spec: Any, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; expected 1 or more, or no such key.")
