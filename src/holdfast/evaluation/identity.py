"""What a checkpoint and its questions were, by content: a path may hold other weights or samples tomorrow."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from holdfast.checkpoints.contents import require_model_folder, require_safe_adapter
from holdfast.checkpoints.fingerprint import fingerprint
from holdfast.checkpoints.merged import locate
from holdfast.checkpoints.reader import INDEX_FILE, CheckpointReader
from holdfast.checkpoints.value import Checkpoint
from holdfast.data.images import open_image
from holdfast.data.types import Sample, Stream
from holdfast.files import sha256
from holdfast.models.tuner import is_tuner_folder

# Beside the weights: configuration, tokenizer, processor, chat template.
_SETTINGS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")


def checkpoint_digests(checkpoint: Checkpoint) -> dict[str, Any]:
    """{"weights": fingerprint of the base, "settings": of the small files beside it, "adapters": [of each folder]}.

    With "lent", the small files of the folder whose tokenizer and processor serve where the base has none.

    Adapters are small enough to be read whole, their configuration too: it scales the factors.

    Raises: CheckpointError: no such checkpoint.
    """
    folder = locate(checkpoint.base)
    require_model_folder(folder)
    with CheckpointReader(folder) as reader:
        weights = fingerprint(reader)
    # The index is about shards, and the same weights in other shards are the same model.
    settings = [
        path for pattern in _SETTINGS for path in folder.glob(pattern) if path.name != INDEX_FILE and path.is_file()
    ]
    return {
        "weights": weights,
        "settings": _of_files(folder, settings),
        "adapters": [_of_adapter(locate(adapter)) for adapter in checkpoint.adapters],
        **({} if checkpoint.settings is None else {"lent": settings_digests(locate(checkpoint.settings))}),
    }


def settings_digests(folder: Path) -> dict[str, str]:
    """File name -> digest of the small files beside the weights: configuration, tokenizer, processor, chat template."""
    found = {
        path
        for pattern in _SETTINGS
        for path in folder.glob(pattern)
        if path.name not in (INDEX_FILE, "README.md") and path.is_file()
    }
    prose = ("license", "notice", "requirements")
    return {p.name: _of_file(p)[:16] for p in sorted(found) if not p.name.lower().startswith(prose)}


def data_digests(stream: Stream, limit: int | None = None) -> dict[str, dict[str, Any]]:
    """{"tasks": {name: digest}, "safety": {name: {side: digest}}} of the test samples and requests that are asked.

    limit: as in `EvaluationConfig`; what lies behind it is not asked. Images count by content.

    Raises: DataError: an image is missing.
    """
    picture = cache(_of_picture)  # many questions share one

    def of(samples: Sequence[Sample]) -> str:
        return samples_digest(samples[:limit], picture)

    return {
        "tasks": {task.name: of(task.test) for task in stream.tasks},
        "safety": {s.name: {"unsafe": of(s.unsafe), "benign": of(s.benign)} for s in stream.safety},
    }


def samples_digest(samples: Iterable[Sample], picture: Callable[[Path], str]) -> str:
    """Of ids, words, references and what else a file says of a sample. picture: what an image counts as."""
    digest = hashlib.sha256()
    for s in samples:
        turns, pictures = [t.said for t in s.turns], [picture(path) for path in s.images]
        digest.update(repr((s.id, turns, pictures, s.references, dict(s.meta))).encode())
    return digest.hexdigest()[:16]


def _of_adapter(folder: Path) -> str:
    # A tuner's folder holds experts in folders of their own; below a plain one may lie a trainer's checkpoints.
    if not is_tuner_folder(folder):
        require_safe_adapter(folder)
    find = folder.rglob if is_tuner_folder(folder) else folder.glob
    return _of_files(
        folder, [path for pattern in ("*.safetensors", "*.bin", "*.json") for path in find(pattern) if path.is_file()]
    )


def _of_files(folder: Path, paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for name, path in sorted((path.relative_to(folder).as_posix(), path) for path in paths):
        digest.update(f"{name}\0{_of_file(path)}\0".encode())
    return digest.hexdigest()


def _of_picture(path: Path) -> str:
    try:
        return _of_file(path)
    except OSError:
        open_image(path)  # says which image is missing, and what to do
        raise


def _of_file(path: Path) -> str:
    digest: str = sha256(path).hexdigest()
    return digest
