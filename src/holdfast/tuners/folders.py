"""Folders of a tuner: made whole or not at all, and the base that they name."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from holdfast.checkpoints.value import Checkpoint
from holdfast.errors import StorageError
from holdfast.files import fsync, fsync_folder, storage_error
from holdfast.models.loaded import LoadedModel
from holdfast.models.tuner import is_tuner_folder


def base_of(loaded: LoadedModel) -> dict[str, Any]:
    """The checkpoint that experts sit on, as plain data: {"base": folder or hub id, "adapters": [folders]}."""
    source = loaded.source
    if source is None:
        return Checkpoint(base=loaded.name).to_json()
    # A tuner's folder on top is what is being saved, not what it sits on.
    return {"base": source.base, "adapters": [a for a in source.adapters if not is_tuner_folder(a)]}


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`; renamed onto it when the block ends well, removed when it does not.

    Raises: StorageError: `folder` exists, or cannot be written.
    """
    if folder.exists():
        raise StorageError(f"{folder} exists; choose another folder, or remove it.")
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in sorted(temporary.rglob("*"), reverse=True):
            if path.is_dir():
                fsync_folder(path)
            else:
                with path.open("rb") as written:
                    fsync(written.fileno())
        temporary.replace(folder)
        fsync_folder(folder.parent)
    except OSError as error:
        raise storage_error(error, folder) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
