"""The user's prompts, split into what is calibrated on and what is probed: disjoint, always alike. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from holdfast.data.types import Sample
from holdfast.errors import DataError
from holdfast.files import sha256

# Below this many probes a rate moves in steps of more than five points.
FEW_PROBES = 20


@dataclass(frozen=True, kw_only=True)
class Split:
    """One kind of requests. calibration: what the edit is made from. probe: what its figures are measured on."""

    calibration: tuple[Sample, ...] = ()
    probe: tuple[Sample, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.calibration or self.probe)


@dataclass(frozen=True, kw_only=True)
class RestoreSets:
    """All that a restore reads beside the two models.

    safety: forbidden requests. benign: harmless ones. task: requests of the task with answers. past: samples of earlier
    tasks (calibration only).
    """

    safety: Split
    benign: Split
    task: Split
    past: tuple[Sample, ...] = ()

    def unprotected(self) -> list[str]:
        """A sentence for everything that nothing was given for."""
        found = []
        if not self.benign:
            found.append(
                "No harmless requests (--benign): over-refusal is neither measured nor held down, and an edit that "
                "restores refusals may refuse too much."
            )
        if not self.task:
            found.append(
                "No task samples (--task): the task's own inputs are not protected, and its score is not measured; "
                "agreement with the tuned model on the harmless requests stands in for it."
                if self.benign
                else "No task samples (--task): nothing protects what was tuned, and its score is not measured."
            )
        return found

    def warnings(self) -> list[str]:
        """A sentence for each probe set that is too small for a fine figure."""
        return [
            f"{len(split.probe)} {name} requests to probe with: a rate moves in steps of {100 / len(split.probe):.0f} "
            "points. Give more for a finer figure."
            for name, split in (("forbidden", self.safety), ("harmless", self.benign), ("task", self.task))
            if 0 < len(split.probe) < FEW_PROBES
        ]


def split(
    samples: Sequence[Sample], probe: Sequence[Sample] | None, *, calibrate: int, probes: int, seed: int, what: str
) -> Split:
    """At most `calibrate` samples for calibration and `probes` others for probing, spread over the categories.

    probe: samples to probe with, where the user names them; otherwise at most half of `samples` calibrate and the rest
    probe. The draw depends on `seed` and the samples' ids, not on their order in the file.

    Raises: DataError: too few samples for both, or a request that is in both.
    """
    ordered = _in_turn(samples, seed)
    if probe is not None:
        refuse_shared(ordered, probe, what=what, first="calibrated on", second="probed with")
        return Split(calibration=tuple(ordered[:calibrate]), probe=tuple(_in_turn(probe, seed)[:probes]))
    distinct = _distinct(ordered)
    if len(distinct) < 2:
        raise DataError(
            f"{what}: {len(distinct)} different request; expected at least 2, one to calibrate on and one to probe "
            "with. Figures measured on what the edit was made from would mean nothing."
        )
    count = min(calibrate, len(distinct) // 2)
    return Split(calibration=tuple(distinct[:count]), probe=tuple(distinct[count : count + probes]))


def refuse_shared(one: Sequence[Sample], other: Sequence[Sample], *, what: str, first: str, second: str) -> None:
    """Raise DataError where a request is in both lists: by its text and pictures."""
    known = {content(sample): sample.id for sample in one}
    same = [(known[c], sample.id) for sample in other if (c := content(sample)) in known]
    if same:
        shown = ", ".join(repr(a) if a == b else f"{a!r} and {b!r}" for a, b in same[:5])
        raise DataError(
            f"{what}: {len(same)} request(s) are both {first} and {second}: {shown}{', ...' if len(same) > 5 else ''}. "
            "Remove them from one of the two."
        )


def own_ids(samples: Sequence[Sample], prefix: str) -> list[Sample]:
    """The samples under ids that no other file has; a run keeps all of them in one table."""
    return [replace(sample, id=f"{prefix}/{sample.id}") for sample in samples]


def content(sample: Sample) -> str:
    """What makes two requests the same: roles, words (white space apart), and the bytes of the pictures."""
    words = [(turn.role, " ".join(turn.text.split())) for turn in sample.request]
    digest = hashlib.sha256(repr(words).encode())
    for path in sample.images:
        # A picture that is missing has no content to compare; encoding it says so with the sample's name.
        digest.update(sha256(path).digest() if Path(path).is_file() else str(path).encode())
    return digest.hexdigest()


def digest(samples: Sequence[Sample]) -> str:
    """Content hash of requests and answers, in order; paths do not count."""
    found = hashlib.sha256()
    for sample in samples:
        found.update(repr((content(sample), sample.answer, sample.references)).encode())
    return found.hexdigest()


def _in_turn(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """A seeded order that takes the categories in turn, so that few samples still show all of them."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(_category(sample.meta, bool(sample.images)), []).append(sample)
    shuffled = [
        sorted(groups[name], key=lambda s: hashlib.sha256(f"{seed}\0{s.id}\0{s.prompt}".encode()).digest())
        for name in sorted(groups)
    ]
    ordered = []
    for place in range(max(map(len, shuffled), default=0)):
        ordered += [group[place] for group in shuffled if place < len(group)]
    return ordered


def _category(meta: Mapping[str, object], pictured: bool) -> str:
    return f"{meta.get('category', '')}\0{meta.get('kind', '')}\0{pictured}"


def _distinct(samples: Sequence[Sample]) -> list[Sample]:
    found: dict[str, Sample] = {}
    for sample in samples:
        found.setdefault(content(sample), sample)
    return list(found.values())
