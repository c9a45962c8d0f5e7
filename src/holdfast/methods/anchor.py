"""The anchored edit in a stream (ours): least squares, with safety and earlier tasks held by what their inputs were.

After each task, per linear layer: the weights whose outputs on the new task's inputs are closest to the tuned ones,
and on safety inputs and earlier tasks' inputs closest to those before the task. A closed form, one Cholesky factor per
distinct input (`functional.anchor`). Of earlier tasks second moments are kept, no sample. Task samples that theta_0
refuses count as safety (`screen`).
"""

from __future__ import annotations

from holdfast.data.types import Stream
from holdfast.editing.editor import edit_checkpoint
from holdfast.methods._glue.anchor_step import AnchorMethodConfig, step_grams
from holdfast.methods.seqft import SeqFT, safety_set, step_seed
from holdfast.rules.anchor import AnchorConfig, AnchorRule
from holdfast.stream.protocol import Checkpoint, TaskContext

__all__ = ["Anchor", "AnchorConfig", "AnchorMethodConfig"]


class Anchor(SeqFT):
    """The anchored edit after each task: least squares on the inputs of the task, of safety, and of earlier tasks.

    Files in the step's folder: training.json, edit.json, screen.json; carry/past-grams for the next step.
    """

    Config = AnchorMethodConfig
    config: AnchorMethodConfig

    needs_safety_answers = True

    def check_stream(self, stream: Stream) -> None:
        """Raises CalibrationError: the stream has no safety calibration samples."""
        safety_set(stream, self.config, self.name)

    def end_task(self, ctx: TaskContext, trained: Checkpoint) -> Checkpoint:
        """The anchored edit of the tuned weights as one plain checkpoint; the Gram matrices are carried on."""
        grams = step_grams(ctx, self.config, self.name, before=ctx.previous, after=trained, samples=self.learned(ctx))
        out = ctx.work_dir / "checkpoint"
        report = edit_checkpoint(
            ctx.previous,
            trained,
            rule=AnchorRule(self.config.edit, grams),
            out=out,
            seed=step_seed(ctx),
            verify=False,
            progress=lambda event, done, total, **rest: ctx.progress("edit", done=done, total=total),
        )
        report.save(ctx.work_dir / "edit.json")
        return Checkpoint(base=str(out))
