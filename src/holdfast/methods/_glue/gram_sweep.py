"""Glue of rivals that need a layer's whole Hessian factor: each layer is edited while its Gram matrix is alive.

The Gram matrices of a 7B model take 22 GB, so they are never held together: the calibration walk hands on one at a
time, the edited weight goes to a file in the step's scratch folder, and the editor puts the files together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from holdfast.calibration.walk import LayerGram, walk_grams
from holdfast.checkpoints.merged import MergedCheckpoint, open_checkpoint
from holdfast.config import encode
from holdfast.data.types import Sample
from holdfast.functional.rivals import RivalEdit
from holdfast.methods.seqft import EditingConfig, SeqFT
from holdfast.models.families import decoder_blocks
from holdfast.models.held import load
from holdfast.rules.base import EditRule
from holdfast.rules.ready_edits import ReadyEdits, ReadyOptions, write_edit
from holdfast.stream.protocol import Checkpoint, TaskContext


class GramSweep(SeqFT):
    """SeqFT with an edit that sweeps over the columns of a layer, left to right, with the layer's Hessian factor."""

    Config = EditingConfig
    config: EditingConfig
    # Whether a block's Gram matrices are of the inputs that the edited blocks before it give.
    sequential = False

    def first_block(self, count: int) -> int:
        """The first of `count` decoder blocks (0-based) that is edited; earlier ones stay as they were tuned."""
        del count
        return 0

    def edit_layer(self, w_prev: Tensor, w_new: Tensor, inverse_factor: Tensor) -> RivalEdit:
        """The edited weight; inverse_factor: upper U with U^T U = (H + lam I)^-1.

        w_prev, w_new: (r, c). inverse_factor: (c, c), fp32 or fp64.

        Raises: NotImplementedError: a method gives the edit.
        """
        raise NotImplementedError

    def gram_source(self, ctx: TaskContext, trained: Checkpoint) -> tuple[Checkpoint, Sequence[Sample], int | None]:
        """The model and the samples that the Gram matrices are of, and tokens at which those are cut, if at all.

        Raises NotImplementedError: a method says which.
        """
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """Every option that changes the edit, for the record."""
        own = self.config.__dataclass_fields__.keys() - EditingConfig.__dataclass_fields__.keys()
        return {key: encode(getattr(self.config, key)) for key in sorted(own)}

    def end_task(self, ctx: TaskContext, trained: Checkpoint) -> Checkpoint:
        """Edit layer by layer while the Gram matrices come in, then write the edits as one checkpoint."""
        source, samples, cut_at = self.gram_source(ctx, trained)
        folder = ctx.scratch_dir / "edits"
        folder.mkdir(parents=True, exist_ok=True)
        loaded = load(source, dtype=self.config.calibration_dtype)
        count = len(decoder_blocks(loaded.model))
        self._first = self.first_block(count)
        with open_checkpoint(ctx.previous) as before, open_checkpoint(trained) as after:
            walk_grams(
                loaded,
                samples,
                lambda gram: self._edit_gram(gram, before, after, folder),
                tokens=self.config.calibration.tokens,
                normalization=self.config.calibration.normalization,
                batch_size=self.config.calibration.batch_size,
                blocks=range(self._first, count),
                edits=self.sequential,
                cut_at=cut_at,
                progress=lambda event, done, total, **rest: ctx.progress("calibrate", done=done, total=total),
            )
        return super().end_task(ctx, trained)

    def _edit_gram(self, gram: LayerGram, before: MergedCheckpoint, after: MergedCheckpoint, folder: Path) -> None:
        files = {module: folder / f"{module}.safetensors" for module in gram.modules}
        missing = [module for module, file in files.items() if not file.is_file()]
        if missing:
            factor = gram.gram.inverse_cholesky_factor(self.config.calibration.damping)
            for module in missing:
                w_prev, w_new = (c.read_float(f"{module}.weight").to(factor.device) for c in (before, after))
                edited = self.edit_layer(w_prev, w_new, factor)
                write_edit(files[module], edited.weight, edited.figures())
        if self.sequential:
            with torch.no_grad():
                for module, linear in zip(gram.modules, gram.linears, strict=True):
                    linear.weight.copy_(load_file(files[module])["weight"])

    def step_rule(self, ctx: TaskContext) -> EditRule:
        """The edits that `end_task` made, read layer by layer."""
        folder = ctx.scratch_dir / "edits"
        options = ReadyOptions(folder=folder, made_by=self.name, options=self.options(), first_block=self._first)
        return ReadyEdits(options)
