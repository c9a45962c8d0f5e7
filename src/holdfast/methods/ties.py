"""TIES (Yadav et al., NeurIPS 2023) over a stream: trim each change, elect a sign per entry, average what agrees.

Tasks are learned one after another, as by SeqFT; the released model is theta_0 plus the merge of all task vectors so
far, and the next task starts from it. A task vector is W_t - theta_0, W_t the model tuned on the task before it is
merged: it has in it what the model started the task with, as TIES means it (the tuning's own change alone is a
residual, and averaging residuals undoes what was learned). They are kept dense, 4 bytes a tuned parameter and task, and
read layer by layer. The edit of a layer: `holdfast.rules.ties`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from holdfast.checkpoints.merged import open_checkpoint
from holdfast.files import atomic_path
from holdfast.methods._glue.lora_layers import read_adapter
from holdfast.methods._glue.rule_options import part_of
from holdfast.methods.seqft import SeqFT, SeqFTConfig
from holdfast.rules.base import EditRule
from holdfast.rules.ties import TiesOptions, TiesRule
from holdfast.stream.protocol import Checkpoint, TaskContext


@dataclass(frozen=True, kw_only=True)
class TiesConfig(SeqFTConfig, TiesOptions):
    """Options of TIES in a stream: the merge's, over those of tuning."""


class Ties(SeqFT):
    """TIES: theta_0 plus the merge of all task vectors so far, each trimmed, signs elected entry by entry."""

    Config = TiesConfig
    config: TiesConfig

    def end_task(self, ctx: TaskContext, trained: Checkpoint) -> Checkpoint:
        """Carry this task's vector on beside the earlier ones, then merge them all into theta_0."""
        keep_earlier(ctx)
        with open_checkpoint(ctx.theta_0) as theta_0:
            with open_checkpoint(trained) as tuned:
                for factors in read_adapter(trained.adapters[-1]):
                    path = _file(ctx.carry_dir, ctx.step, factors.name)
                    if not path.is_file():
                        key = f"{factors.name}.weight"
                        vector = tuned.read_float(key) - theta_0.read_float(key)
                        with atomic_path(path) as temporary:
                            save_file({"vector": vector.contiguous()}, temporary)
            vectors = TaskVectors(ctx.carry_dir)
            rule = TiesRule(part_of(self.config, TiesOptions), theta_0, vectors)
            if self.config.trim == "all":
                rule = TiesRule(rule.config, theta_0, vectors, {t: rule.threshold(t) for t in vectors.tasks})
            self._rule = rule
            return super().end_task(ctx, trained)

    def step_rule(self, ctx: TaskContext) -> EditRule:
        """TIES over every task vector so far."""
        return self._rule


class TaskVectors(Mapping[str, Tensor]):
    """`<layer>/<task>` -> W_t - theta_0 (r, c), read from its file each time that it is asked for."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("*/*.safetensors"))
        self._files = {f"{file.name.removesuffix('.safetensors')}/{file.parent.name}": file for file in files}

    @property
    def tasks(self) -> list[int]:
        """Steps that have a vector, in order."""
        return sorted({int(key.split("/")[1]) for key in self._files})

    def __getitem__(self, key: str) -> Tensor:
        return load_file(self._files[key])["vector"]

    def __contains__(self, key: object) -> bool:
        return key in self._files  # a mapping would read the file to know

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def keep_earlier(ctx: TaskContext) -> None:
    """The vectors of earlier tasks in this step's carry folder: the same files, where the disk can share them."""
    before = ctx.previous_carry_dir
    for source in sorted(before.glob("*/*.safetensors")) if before is not None else ():
        target = ctx.carry_dir / source.parent.name / source.name
        if target.is_file():
            continue
        with atomic_path(target) as temporary:
            temporary.unlink(missing_ok=True)
            try:
                os.link(source, temporary)
            except OSError:
                # A disk without hard links.
                shutil.copyfile(source, temporary)


def _file(folder: Path, step: int, layer: str) -> Path:
    return folder / str(step) / f"{layer}.safetensors"


__all__ = ["TaskVectors", "Ties", "TiesConfig", "TiesRule", "keep_earlier"]
