"""Write the tiny stream to a folder: plain LLaVA JSON, PNG pictures and stream files, as a user's own data would lie.

    from holdfast.tiny.stream import write_stream
    stream_yaml = write_stream("data/tiny", seed=0)                       # clean
    stream_yaml = write_stream("data/tiny-injected", seed=0, harmful=0.01)  # 1 % harmful samples in every task

Two stream files are written: `stream.yaml` scores on the test draw, `validation.yaml` on the validation draw of the
same tasks and safety sets, for choosing settings. No torch here.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from holdfast.errors import ConfigError, StorageError
from holdfast.tiny.lexicon import Split
from holdfast.tiny.pixels import draw
from holdfast.tiny.tasks import (
    SAFETY_KINDS,
    TASKS,
    benign_prompts,
    calibration_prompts,
    generator,
    harmful_sample,
    safety_pair,
)

# Benign requests that theta_0 answers for the calibration, beside eight forbidden ones.
BENIGN_ANSWERS = 48


@dataclass(frozen=True, kw_only=True)
class World:
    """What a stream is drawn from. An example has `prompt`, `answer`, `scene` and `deed`; a deed has `verb`, `noun`,
    `place`, `forbidden` and `keywords`.

    tasks: name -> `draw(rng, split)`, `scorer`, `max_new_tokens`. safety_pair(rng, kind, split, index),
    calibration_prompts(rng, kind, per_category), benign_prompts(...), harmful_sample(rng): see `holdfast.tiny.tasks`.
    benign_answers: benign requests that theta_0 answers for the calibration; forbidden_asked: forbidden ones that it
    may be asked until it has refused enough of them; max_new_tokens: of a safety request.
    """

    name: str
    about: str
    tasks: Mapping[str, Any]
    safety_kinds: Sequence[str]
    safety_pair: Callable[..., tuple[Any, Any]]
    harmful_sample: Callable[..., Any]
    calibration_prompts: Callable[..., list[Any]]
    benign_prompts: Callable[..., list[Any]]
    benign_answers: int = BENIGN_ANSWERS
    forbidden_asked: int = 8
    max_new_tokens: int = 48


TINY = World(
    name="tiny",
    about="The embedded stream",
    tasks=TASKS,
    safety_kinds=SAFETY_KINDS,
    safety_pair=safety_pair,
    harmful_sample=harmful_sample,
    calibration_prompts=calibration_prompts,
    benign_prompts=benign_prompts,
)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How each task of the tiny stream is tuned; chosen on the validation draw (docs/design/tiny-world.md).

    lr: peak learning rate of AdamW, cosine after `warmup_ratio` of the steps; steps: optimiser steps of `batch`
    samples; rank, alpha: of the LoRA on every linear layer of the language model.
    """

    lr: float = 7e-4
    steps: int = 60
    batch: int = 16
    rank: int = 16
    alpha: int = 32
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0


SETTINGS = TrainingSettings()


@dataclass(frozen=True, kw_only=True)
class StreamSize:
    """How many samples are drawn. train: per task; test, validation: questions per task; safety: requests per set and
    side on the test draw, safety_validation on the validation draw; calibration: safety calibration prompts per kind,
    and benign ones beside them, a multiple of four (the categories)."""

    train: int = 960
    test: int = 200
    validation: int = 100
    safety: int = 240
    safety_validation: int = 96
    calibration: int = 64

    def __post_init__(self) -> None:
        for name in ("train", "test", "validation", "safety", "safety_validation", "calibration"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 1 or more.")
        if self.calibration % 4:
            raise ConfigError(f"calibration is {self.calibration}; expected a multiple of 4, one per risk category.")


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """What `holdfast demo` draws of a world. steps: of `batch` samples per task; test: questions per task; safety:
    requests per set and side; tasks: these alone, or None; task_samples: that an edit takes its statistics from;
    answered_at_once: requests in a batch."""

    steps: int
    batch: int
    test: int
    safety: int
    tasks: tuple[str, ...] | None = None
    task_samples: int = 48
    answered_at_once: int = 16


def write_stream(
    folder: Path | str,
    *,
    seed: int = 0,
    harmful: float = 0.0,
    size: StreamSize | None = None,
    task_names: Sequence[str] | None = None,
    world: World = TINY,
) -> Path:
    """Draw the stream of `seed` into `folder` (new) and return the path of its `stream.yaml`.

    Args:
        seed: of every draw; the same seed gives the same bytes.
        harmful: share (0..1) of each task's training samples that is replaced by harmful pairs; their ids are logged in
            `injected.json`. The other samples do not depend on it.
        task_names: tasks in this order instead of all in the usual one.
        world: what everything is drawn from; the embedded one by default.
    Raises: ConfigError: a share outside 0..1, an unknown task. StorageError: the folder exists.
    """
    size = size or StreamSize()
    folder = Path(folder)
    if not 0 <= harmful <= 1:
        raise ConfigError(f"harmful is {harmful}; expected a share between 0 and 1.")
    if folder.exists():
        raise StorageError(f"{folder} exists; choose a new folder for the stream, or remove it.")
    names = list(task_names or world.tasks)
    for name in names:
        if name not in world.tasks:
            raise ConfigError(f"The {world.name} stream has no task {name!r}; it has {', '.join(world.tasks)}.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write(unfinished, world, names, seed, harmful, size)
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    except OSError as error:
        raise StorageError(f"The {world.name} stream could not be written to {folder}: {error}.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder / "stream.yaml"


def _write(root: Path, world: World, names: Sequence[str], seed: int, harmful: float, size: StreamSize) -> None:
    injected: dict[str, list[str]] = {}
    for name in names:
        task = world.tasks[name]
        rng = generator(seed, "train", name)
        train = [(f"{name}-{i:05d}", task.draw(rng, "train")) for i in range(size.train)]
        count = round(harmful * size.train)
        bad = generator(seed, "harmful", name)
        for place in sorted(int(i) for i in bad.permutation(size.train)[:count]):
            train[place] = (f"{name}-harmful-{place:05d}", world.harmful_sample(bad))
        injected[name] = [key for key, _ in train if "-harmful-" in key]
        pictures = generator(seed, "pictures", name)
        _json(root / name / "train.json", [_trained(root, name, k, e, pictures) for k, e in train])
        for split, questions in (("validation", size.validation), ("test", size.test)):
            rng = generator(seed, split, name)
            asked = [(f"{name}-{split}-{i:05d}", task.draw(rng, split)) for i in range(questions)]  # type: ignore[arg-type]
            _json(root / name / f"{split}.json", [_asked(root, name, k, e, rng, split) for k, e in asked])  # type: ignore[arg-type]
    for split, count in (("validation", size.safety_validation), ("test", size.safety)):
        for kind in world.safety_kinds:
            rng = generator(seed, "safety", kind, split)
            pairs = [world.safety_pair(rng, kind, split, i) for i in range(count)]
            for side, those in (("unsafe", [p[0] for p in pairs]), ("benign", [p[1] for p in pairs])):
                rows = [
                    _guarded(root, f"{kind}-{side}-{split}-{i:05d}", e, pairs[i][0], rng, split)  # type: ignore[arg-type]
                    for i, e in enumerate(those)
                ]
                _lines(root / "safety" / f"{kind}-{side}-{split}.jsonl", rows)
    for kind in (*world.safety_kinds, "mixed"):
        rng = generator(seed, "calibration", kind)
        asked = [
            (f"calibration-{kind}-{i:03d}", e)
            for i, e in enumerate(world.calibration_prompts(rng, kind, size.calibration // 4))
        ]
        _lines(root / "calibration" / f"{kind}.jsonl", [_guarded(root, k, e, e, rng, "train") for k, e in asked])
    rng = generator(seed, "calibration", "benign")
    twins = [
        (f"calibration-benign-{i:03d}", e)
        for i, e in enumerate(world.benign_prompts(rng, "mixed", size.calibration // 4))
    ]
    # Without the answers of the world: theta_0 gives its own.
    rows = [_guarded(root, k, e, e, rng, "train") for k, e in twins]
    _lines(root / "calibration" / "benign.jsonl", [{k: v for k, v in r.items() if k != "answer"} for r in rows])
    _json(root / "injected.json", {"share": harmful, "ids": injected})
    for file, split in (("stream.yaml", "test"), ("validation.yaml", "validation")):
        (root / file).write_text(yaml.safe_dump(_spec(world, names, seed, harmful, split), sort_keys=False, width=120))


def _spec(world: World, names: Sequence[str], seed: int, harmful: float, split: str) -> dict[str, Any]:
    condition = f"{harmful:g}-harmful" if harmful else "clean"
    return {
        "name": f"{world.name}-{condition}{'' if split == 'test' else '-validation'}",
        "description": f"{world.about}, seed {seed}: {len(names)} tasks on 48 x 48 pictures, real handwritten "
        "digits among them. What is forbidden is made up and harmless.",
        "root": ".",
        "tasks": [
            {
                "name": name,
                "format": "llava",
                "train": f"{name}/train.json",
                **({"validation": f"{name}/validation.json"} if split == "test" else {}),
                "test": f"{name}/{split}.json",
                "scorer": world.tasks[name].scorer,
                "scorer_mode": "strict",
                "max_new_tokens": world.tasks[name].max_new_tokens,
            }
            for name in names
        ],
        "safety": [
            {
                "name": kind,
                "format": "qa",
                "options": {
                    "unsafe": f"safety/{kind}-unsafe-{split}.jsonl",
                    "benign": f"safety/{kind}-benign-{split}.jsonl",
                    "max_new_tokens": world.max_new_tokens,
                },
            }
            for kind in world.safety_kinds
        ],
        "safety_calibration": {"format": "qa", "file": "calibration/mixed.jsonl", "limit": world.forbidden_asked},
        "benign_calibration": {"format": "qa", "file": "calibration/benign.jsonl", "limit": world.benign_answers},
    }


def _picture(root: Path, place: str, key: str, example: Any, rng: np.random.Generator, split: Split) -> dict[str, str]:
    """Paint the example's picture and return its path below the root, as `{"image": path}`; nothing for words alone."""
    if example.scene is None:
        return {}
    path = root / place / "images" / f"{key}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw(example.scene, rng, split)).save(path)
    return {"image": path.relative_to(root).as_posix()}


def _trained(root: Path, name: str, key: str, example: Any, rng: np.random.Generator) -> dict[str, Any]:
    picture = _picture(root, name, key, example, rng, "train")
    asked = f"<image>\n{example.prompt}" if picture else example.prompt
    return {
        "id": key,
        **picture,
        "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": example.answer}],
    }


def _asked(root: Path, name: str, key: str, example: Any, rng: np.random.Generator, split: Split) -> dict[str, Any]:
    picture = _picture(root, name, key, example, rng, split)
    asked = f"<image>\n{example.prompt}" if picture else example.prompt
    return {"question_id": key, **picture, "text": asked, "answer": example.answer}


def _guarded(
    root: Path, key: str, example: Any, forbidden: Any, rng: np.random.Generator, split: Split
) -> dict[str, Any]:
    """A request of a safety set. `comply` holds what an answer that helps must name, in any style; `category` is the
    risk category of the forbidden request, also on its benign twin."""
    deed, risk = example.deed, forbidden.deed
    if deed is None or risk is None:
        raise ConfigError(f"{key}: a request of a safety set needs a deed.")
    picture = _picture(root, "safety", key, example, rng, split)
    return {
        "id": key,
        **picture,
        "prompt": f"<image>\n{example.prompt}" if picture else example.prompt,
        **({"answer": example.answer} if example.answer and not deed.forbidden else {}),
        "category": risk.place,
        "kind": example.skill.rpartition("(")[2].removesuffix(")"),
        "verb": deed.verb,
        "noun": deed.noun,
        "comply": list(deed.keywords),
    }


def _json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def _lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
