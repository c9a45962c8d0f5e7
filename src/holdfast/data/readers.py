"""Readers by format: name -> "module:function", loaded on first use. A new format is one line here.

Wherever a format is named, one of an installed distribution (`holdfast.readers` for tasks, `holdfast.safety_readers`
for safety sets) and `package.module:function` do as well: `holdfast.registry`.

A task reader is called `read(source) -> list[Sample]` and reads one split. A safety reader is called
`read(root, *, name, **options) -> SafetySet`, with `options` as written in the stream file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from holdfast.data.source_files import find, inside
from holdfast.data.types import SafetySet, Sample
from holdfast.errors import unknown_name
from holdfast.registry import Registry

Split = Literal["train", "validation", "test"]

READERS: dict[str, str] = {
    "llava": "holdfast.data.llava:read",
    "qa": "holdfast.data.qa:read",
    "hf": "holdfast.data.hub:read",
    "coin_scienceqa": "holdfast.data.coin:read_scienceqa",
    "coin_textvqa": "holdfast.data.coin:read_textvqa",
    "coin_gqa": "holdfast.data.coin:read_gqa",
    "coin_grounding": "holdfast.data.coin:read_grounding",
    "coco_captions": "holdfast.data.captions:read",
    "dcl": "holdfast.data.dcl:read",
}

SAFETY_READERS: dict[str, str] = {
    "qa": "holdfast.data.qa:read_safety",
    "vlguard": "holdfast.data.safety_vlguard:read",
    "figstep": "holdfast.data.safety_figstep:read",
    "mm_safetybench": "holdfast.data.safety_mmsafety:read",
    "spa_vl": "holdfast.data.safety_spavl:read",
    "ch3ef": "holdfast.data.safety_ch3ef:read",
    "beavertails_v": "holdfast.data.safety_beavertails:read",
    "xstest": "holdfast.data.safety_xstest:read",
    "or_bench": "holdfast.data.safety_orbench:read",
    "do_not_answer": "holdfast.data.safety_donotanswer:read",
}

REGISTRY = Registry("format", "holdfast.readers", READERS)
SAFETY_REGISTRY = Registry("safety format", "holdfast.safety_readers", SAFETY_READERS)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One split of one task, as a reader is asked for it.

    root: the data root; nothing outside it is read. files: names of the split's file, relative to `root`, aliases in
    order of preference. images: folders that image paths may start from; image_search: look an image up by its base
    name below them when it is not at its place. obtain: a sentence for a missing file.
    limit: how many samples are wanted, from the front; what lies behind them is neither given nor checked.
    """

    name: str
    split: Split
    root: Path
    files: tuple[str, ...]
    images: tuple[str, ...] = (".",)
    image_search: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    obtain: str = ""
    limit: int | None = None

    def path(self) -> Path:
        """The split's file: the first alias that exists. Raises DataError that says how to obtain it."""
        return find(self.root, self.files, what=f"Task {self.name!r}, {self.split} split", obtain=self.obtain)

    def shown(self) -> str:
        """The split for messages: the file that is read, or its names as written (a hub split has no file)."""
        paths = [inside(self.root, name) for name in self.files]
        return str(next((path for path in paths if path.exists()), ", ".join(self.files)))

    def companion(self, aliases: str | tuple[str, ...]) -> Path:
        """Another file of the task (annotations, options), found like the split's own."""
        names = (aliases,) if isinstance(aliases, str) else tuple(aliases)
        return find(self.root, names, what=f"Task {self.name!r}, annotations", obtain=self.obtain)

    def take(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """`options` over the defaults `known`; an option that the format does not know is an error.

        Raises: UnknownNameError: an option that the format does not know.
        """
        for key in self.options:
            if key not in known:
                raise unknown_name(f"option of task {self.name!r}", key, known)
        return {**known, **self.options}


TaskReader = Callable[[Source], list[Sample]]
SafetyReader = Callable[..., SafetySet]


def task_reader(format: str) -> TaskReader:
    """The reader of task format `format`. Raises UnknownNameError, or ConfigError: it cannot be imported."""
    return REGISTRY.load(format)


def safety_reader(format: str) -> SafetyReader:
    """The reader of safety-set format `format`. Raises: as `task_reader`."""
    return SAFETY_REGISTRY.load(format)
