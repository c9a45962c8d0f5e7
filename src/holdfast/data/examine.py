"""Everything that can be wrong with a stream's data, found before a run: collected, never stopping at the first.

Reads files and picture headers only. What it finds is a list of Findings; an `error` would stop or falsify a run, a
`warning` may change what a number means, an `info` is worth knowing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from holdfast.data.images import image_size, open_image, opening_differs
from holdfast.data.items import MARK, duplicate_ids
from holdfast.data.readers import Source, Split, task_reader
from holdfast.data.source_files import missing
from holdfast.data.streams import (
    SafetySpec,
    StreamSpec,
    TaskSpec,
    build_calibration,
    build_safety,
    source_of,
)
from holdfast.data.types import Sample
from holdfast.errors import ConfigError, DataError, HoldfastError

Level = Literal["error", "warning", "info"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_OPENED_APART = {"turned": "turned by an EXIF tag", "transparent": "with transparency"}
HEADERS = 20_000
NAMED = 5  # how many of a kind a finding names


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing to know. where: the task, set or file; remedy: what to do about it, where there is something."""

    level: Level
    where: str
    message: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """What a split, or a side of a safety set, holds. opened: pictures decoded as a sample of all."""

    name: str
    split: str
    file: str
    samples: int
    expected: int | None = None
    images: int = 0
    text_only: int = 0
    missing_images: int = 0
    opened: int = 0
    unreadable: int = 0
    sizes: tuple[tuple[int, int], ...] = ()


@dataclass
class Diagnosis:
    """The outcome. samples: the split's samples as read, for further checks (scorers, memory).

    sizes: of the pictures that were opened; headers: of all, as their headers say, up to HEADERS of a split.
    """

    stream: str
    root: str
    splits: list[SplitReport] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    samples: dict[tuple[str, str], list[Sample]] = field(default_factory=dict)
    sizes: dict[Path, tuple[int, int]] = field(default_factory=dict)
    headers: dict[Path, tuple[int, int]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether a run can start: no error."""
        return not any(finding.level == "error" for finding in self.findings)

    def add(self, level: Level, where: str, message: str, remedy: str = "") -> None:
        """Note a finding: how grave, where, what is wrong, and what to do about it."""
        self.findings.append(Finding(level=level, where=where, message=message, remedy=remedy))


def examine(spec: StreamSpec, *, open_images: int | None = 200) -> Diagnosis:
    """Check a stream: root, files, aliases, shapes, ids, counts, answers, leaks, pictures, licences.

    open_images: decode at most so many pictures of each split, evenly spread (None: all). Whether a picture is there is
    checked for every one.
    """
    diagnosis = Diagnosis(stream=spec.name, root=spec.root)
    _licences(spec, diagnosis)
    try:
        root = spec.data_root
    except ConfigError as error:
        diagnosis.add("error", "root", str(error))
        return _to_obtain(spec, diagnosis)
    if not root.is_dir():
        diagnosis.add("error", "root", missing(root), "Create it, or set `root` (--root) to where the data lies.")
        return _to_obtain(spec, diagnosis)
    for task in spec.tasks:
        for split in SPLITS:
            _split(task, split, root, spec.obtain, diagnosis, open_images)
        _leaks(task, diagnosis)
        if not source_of(task, "train", root).files:
            diagnosis.add("info", task.name, "no training split: the task is evaluated and never trained")
    for safety in spec.safety:
        _safety(safety, root, diagnosis, open_images)
    for name, calibration in (
        ("safety_calibration", spec.safety_calibration),
        ("benign_calibration", spec.benign_calibration),
    ):
        if calibration is None:
            continue
        try:
            found = list(build_calibration(calibration, root, name=name))
        except HoldfastError as error:
            diagnosis.add("error", name, str(error))
        else:
            _report(name, "train", "", found, None, diagnosis, open_images)
    return diagnosis


def _split(
    task: TaskSpec, split: Split, root: Path, obtain: str, diagnosis: Diagnosis, open_images: int | None
) -> None:
    source = source_of(task, split, root, obtain=obtain)
    if not source.files:
        return
    where = f"{task.name}, {split}"
    try:
        samples = task_reader(task.format)(source)
    except HoldfastError as error:
        diagnosis.add("error", where, str(error))
        return
    if not samples:
        diagnosis.add("error", where, f"{source.shown()} is empty", "Every split that is named needs a sample.")
        return
    _alias(source, where, diagnosis)
    _ids(task, split, samples, where, diagnosis)
    _answers(split, samples, where, diagnosis)
    _turns(split, samples, where, diagnosis)
    limit = task.split_limit(split)
    expected = task.expected.get(split)
    if expected is not None and expected != len(samples):
        diagnosis.add(
            "warning",
            where,
            f"{len(samples)} samples; the published split has {expected}",
            "Figures on another number of samples do not compare with published ones.",
        )
    if limit is not None and limit < len(samples):
        diagnosis.add("info", where, f"the first {limit} of {len(samples)} samples are used (limit)")
        samples = samples[:limit]
    _report(task.name, split, source.shown(), samples, expected, diagnosis, open_images)


def _alias(source: Source, where: str, diagnosis: Diagnosis) -> None:
    there = [name for name in source.files if (source.root / name).exists()]
    if len(there) > 1:
        diagnosis.add("warning", where, f"{there[0]} is read; {', '.join(there[1:])} is there too and is not")
    elif there and there[0] != source.files[0]:
        diagnosis.add("info", where, f"read from {there[0]} (a known other name of {source.files[0]})")


def _ids(task: TaskSpec, split: Split, samples: Sequence[Sample], where: str, diagnosis: Diagnosis) -> None:
    double = duplicate_ids(samples)
    if not double:
        return
    text = f"{len(double)} id(s) occur more than once: {_named(double)}"
    if split == "train" or task.duplicate_ids == "rename":
        diagnosis.add("warning" if split != "train" else "info", where, f"{text}; they are numbered (id#2, ...)")
    else:
        diagnosis.add("error", where, text, "Correct the file, or set `duplicate_ids: rename` on the task.")


def _answers(split: Split, samples: Sequence[Sample], where: str, diagnosis: Diagnosis) -> None:
    if split == "train":
        mute = [s.id for s in samples if s.turns[-1].role != "assistant" or not s.turns[-1].text.strip()]
        if mute:
            diagnosis.add("error", where, f"{len(mute)} sample(s) have no answer to learn: {_named(mute)}")
    else:
        unknown = [s.id for s in samples if not any(reference.strip() for reference in s.references)]
        if unknown:
            diagnosis.add(
                "warning",
                where,
                f"{len(unknown)} sample(s) have no gold answer and will be unscored: {_named(unknown)}",
                "Name the annotation file in the task's options.",
            )


def _turns(split: Split, samples: Sequence[Sample], where: str, diagnosis: Diagnosis) -> None:
    """Conversations that no template renders, or that leave nothing to learn from."""
    found: dict[str, list[str]] = {}
    begun = [s.id for s in samples if [turn.role for turn in s.turns[:2]] == ["system", "assistant"]]
    if begun:
        diagnosis.add(
            "warning",
            where,
            f"{len(begun)} sample(s) have an answer right after the system text, which many chat templates refuse: "
            f"{_named(begun)}",
            "Where a run file or --model is given, its own template is asked.",
        )
    for sample in samples:
        spoken = [turn for turn in sample.turns if turn.role != "system"]
        learned = [turn for turn in spoken if turn.role == "assistant" and turn.loss]
        if spoken and sample.turns[0].role == "assistant":
            found.setdefault("begin with an answer; a conversation begins with the user", []).append(sample.id)
        if any(MARK in turn.text for turn in sample.turns if turn.role != "user"):
            found.setdefault(f"have {MARK} in an answer or a system text; only a user shows images", []).append(
                sample.id
            )
        if split == "train" and any(not turn.text.strip() for turn in learned[:-1]):
            found.setdefault("have an empty answer before the last one", []).append(sample.id)
        if split == "train" and any(turn.role == "assistant" for turn in spoken) and not learned:
            found.setdefault("have `loss` off in every answer", []).append(sample.id)
    for text, ids in found.items():
        diagnosis.add("error", where, f"{len(ids)} sample(s) {text}: {_named(ids)}", "Correct or drop them.")


def _leaks(task: TaskSpec, diagnosis: Diagnosis) -> None:
    seen = {(s.images, s.prompt) for s in diagnosis.samples.get((task.name, "train"), [])}
    test = diagnosis.samples.get((task.name, "test"), [])
    leaked = [s.id for s in test if (s.images, s.prompt) in seen]
    if leaked:
        diagnosis.add(
            "warning",
            task.name,
            f"{len(leaked)} of {len(test)} test samples (images and prompt) also stand in training: {_named(leaked)}",
        )


def _safety(spec: SafetySpec, root: Path, diagnosis: Diagnosis, open_images: int | None) -> None:
    try:
        found = build_safety(spec, root)
    except HoldfastError as error:
        diagnosis.add("error", spec.name, str(error))
        return
    for side, samples in (("unsafe", found.unsafe), ("benign", found.benign)):
        expected = spec.expected.get(side)
        if expected is not None and expected != len(samples) and spec.limit is None:
            diagnosis.add(
                "warning", f"{spec.name}, {side}", f"{len(samples)} requests; the published set has {expected}"
            )
        if samples:
            _report(spec.name, side, spec.root, list(samples), expected, diagnosis, open_images)
    if not found.benign:
        diagnosis.add("info", spec.name, "no benign side: over-refusal cannot be reported on this set")


def _report(
    name: str,
    split: str,
    file: str,
    samples: list[Sample],
    expected: int | None,
    diagnosis: Diagnosis,
    open_images: int | None,
) -> None:
    where = f"{name}, {split}"
    paths = list(dict.fromkeys(path for sample in samples for path in sample.images))
    absent = [path for path in paths if not path.is_file()]
    if absent:
        diagnosis.add(
            "error",
            where,
            f"{len(absent)} of {len(paths)} images are missing: {_named(absent)}",
            f"Image {missing(absent[0])}",
        )
    there = [path for path in paths if path not in set(absent)] if absent else paths
    chosen = there if open_images is None else _spread(there, open_images)
    for path in _spread(there, HEADERS) if open_images != 0 else ():
        with suppress(DataError, OSError):  # what cannot be read is told below, where it is opened
            diagnosis.headers.setdefault(path, image_size(path))
    broken, sizes = [], []
    differs: Counter[str] = Counter()
    for path in chosen:
        try:
            if path not in diagnosis.sizes:
                diagnosis.sizes[path] = image_size(path)
                open_image(path)  # a truncated file shows its size and fails here
            differs.update(opening_differs(path))
        except DataError as error:
            diagnosis.sizes.pop(path, None)
            broken.append(str(error))
        else:
            sizes.append(diagnosis.sizes[path])
    if broken:
        diagnosis.add("error", where, f"{len(broken)} of {len(chosen)} opened images cannot be read", broken[0])
    if differs:
        kinds = ", ".join(f"{differs[kind]} {word}" for kind, word in _OPENED_APART.items() if differs[kind])
        diagnosis.add(
            "warning",
            where,
            f"of {len(chosen)} opened images the published pipelines see some differently: {kinds}",
            "They open pictures plainly; `images: published` in the run file does so too.",
        )
    diagnosis.samples[name, split] = samples
    diagnosis.splits.append(
        SplitReport(
            name=name,
            split=split,
            file=file,
            samples=len(samples),
            expected=expected,
            images=len(paths),
            text_only=sum(not sample.images for sample in samples),
            missing_images=len(absent),
            opened=len(chosen),
            unreadable=len(broken),
            sizes=tuple(sizes),
        )
    )


def _licences(spec: StreamSpec, diagnosis: Diagnosis) -> None:
    for where, text in [("stream", spec.license), *((t.name, t.license) for t in spec.tasks)]:
        if text:
            diagnosis.add("info", where, f"licence: {text}")
    for safety in spec.safety:
        if safety.license:
            diagnosis.add("info", safety.name, f"licence: {safety.license}")


def _to_obtain(spec: StreamSpec, diagnosis: Diagnosis) -> Diagnosis:
    """Without a root there is nothing to read: say what to get for each task and set."""
    if spec.obtain:
        diagnosis.add("info", "stream", f"to obtain: {spec.obtain}")
    for task in spec.tasks:
        if task.obtain:
            diagnosis.add("info", task.name, f"to obtain: {task.obtain}")
    for safety in spec.safety:
        if safety.obtain:
            diagnosis.add("info", safety.name, f"to obtain: {safety.obtain}")
    return diagnosis


def _spread(paths: Sequence[Path], count: int) -> list[Path]:
    """At most `count` of `paths`, evenly spread, the first and the last among them."""
    if len(paths) <= count:
        return list(paths)
    if count <= 1:
        return list(paths[:count])
    return [paths[round(i * (len(paths) - 1) / (count - 1))] for i in range(count)]


def _named(names: Iterable[object] | Mapping[str, int]) -> str:
    listed = list(names)
    return ", ".join(map(str, listed[:NAMED])) + (", ..." if len(listed) > NAMED else "")
