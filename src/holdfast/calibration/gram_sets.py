"""A model and samples in, Gram matrices on disk out: what the anchored edit is calibrated with."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from holdfast.calibration.curvature import Source, model_identity, open_model, samples_sha256
from holdfast.calibration.walk import Progress, Tokens, walk_grams
from holdfast.checkpoints.gram_store import INDEX_FILE, GramStore, GramWriter
from holdfast.data.types import Sample
from holdfast.errors import CalibrationError
from holdfast.models.families import editable_linears
from holdfast.models.loaded import LoadedModel


@dataclass(frozen=True, kw_only=True)
class GramSets:
    """What one edit is calibrated with: inputs on the new task, on safety, and on earlier tasks.

    benign: answers to benign requests, where they are weighed apart; otherwise they are part of `safety`.
    """

    task: GramStore
    safety: GramStore
    past: GramStore | None = None
    benign: GramStore | None = None

    def __post_init__(self) -> None:
        # The past may have more layers than one task changed.
        for name in ("safety", "benign", "past"):
            store = getattr(self, name)
            missing = [] if store is None else sorted(set(self.task.modules) - set(store.modules))
            if missing:
                raise CalibrationError(
                    f"The {name} Gram matrices ({store.folder}) have no layer {missing[0]}, which those of the task "
                    f"({self.task.folder}) have ({len(missing)} such layer(s)); both must be of one model."
                )

    @classmethod
    def open(cls, folder: Path | str) -> GramSets:
        """The sets in the sub-folders `task`, `safety`, and where they are there `past` and `benign`, of `folder`.

        Raises: CalibrationError: `task` or `safety` is missing, unfinished or damaged, or they are of two models.
        """
        folder = Path(folder)
        names = [name for name in ("past", "benign") if (folder / name).is_dir()]
        return cls(**{name: GramStore.open(folder / name) for name in ("task", "safety", *names)})

    @property
    def stores(self) -> dict[str, GramStore]:
        """The stores of Gram matrices, by set."""
        found = {"task": self.task, "safety": self.safety, "past": self.past, "benign": self.benign}
        return {name: store for name, store in found.items() if store is not None}

    def digests(self) -> dict[str, str]:
        """What identifies each set of samples."""
        return {name: store.digest() for name, store in self.stores.items()}


def collect_grams(
    source: Source,
    samples: Sequence[Sample],
    out: Path | str,
    *,
    tokens: Tokens = "all",
    batch_size: int = 16,
    blocks: Collection[int] | None = None,
    changed: Any = None,
    memory_bytes: int | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    cut_at: int | None = None,
    progress: Progress | None = None,
) -> GramStore:
    """Mean 2 x x^T per token of every editable layer's input, written to the folder `out` layer by layer.

    Killed and called again, it walks only to the layers that are missing; what is finished is returned as it is.

    Args:
        source: folder, hub id, checkpoint value, or a loaded model. samples: see `walk_grams`.
        changed: names of linear layers -> those to measure (`adapted_layers`); None: all.
        cut_at: see `walk_grams`.
        memory_bytes: bound on what the process (or the GPU) holds: one layer's matrix at a time is all that is needed.

    Raises: CalibrationError: `out` holds something else; as `walk_grams`.
    """
    out = Path(out)
    meta = {
        "model": model_identity(source),
        "samples_sha256": samples_sha256(samples),
        "samples": len(samples),
        "tokens": tokens,
        "normalization": "token",
    }
    if (out / INDEX_FILE).is_file():
        return GramStore.open(out, expected=meta)
    writer = GramWriter(out, meta)
    loaded = (
        source
        if isinstance(source, LoadedModel)
        else open_model(source, dtype=dtype, device=device, memory_bytes=memory_bytes)
    )
    linears = editable_linears(loaded.model, blocks)
    wanted = set(linears if changed is None else changed(linears)) - writer.finished
    if wanted:
        walk_grams(
            loaded,
            samples,
            writer,
            tokens=tokens,
            normalization="token",
            batch_size=batch_size,
            memory_bytes=memory_bytes,
            blocks=blocks,
            linears=wanted,
            workspace_bytes=writer.workspace_bytes(max(linears[name].in_features for name in wanted)),
            cut_at=cut_at,
            progress=progress,
        )
    return writer.finish()


__all__ = ["GramSets", "collect_grams"]
