"""CRAM: one expert per task with a rank of its own, found by centroids, on ordinary PEFT LoRA adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from holdfast.models.loaded import LoadedModel
    from holdfast.tuners.cram.model import Cram


def attach(loaded: LoadedModel, folder: Path) -> Cram:
    """Attach the experts of a CRAM folder to their loaded base (the entry that `holdfast.models.tuner` calls)."""
    from holdfast.tuners.cram.folder import from_pretrained

    return from_pretrained(folder, loaded)
