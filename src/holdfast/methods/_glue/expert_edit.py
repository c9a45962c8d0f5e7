"""The edit of one finished CRAM expert by any rule: what `cram_hpa` and `cram_anchor` share."""

from __future__ import annotations

from pathlib import Path

from holdfast.checkpoints.curvature_file import Curvature
from holdfast.editing.editor import edit_checkpoint
from holdfast.methods.seqft import step_seed
from holdfast.rules.base import EditRule
from holdfast.stream.protocol import Checkpoint, TaskContext


def edited_expert(ctx: TaskContext, trained: Checkpoint, *, rule: EditRule, curvature: Curvature | None = None) -> Path:
    """The expert `trained` (a LoRA on theta_0) after `rule`: a LoRA folder of the same ranks in the scratch directory.

    edit.json of the step records it. curvature: what the rule is calibrated with, where it does not hold it itself.
    """
    out = ctx.scratch_dir / "edited"
    report = edit_checkpoint(
        ctx.theta_0,
        trained,
        rule=rule,
        curvature=curvature,
        out=out,
        export="adapter",
        coefficient="drop",
        seed=step_seed(ctx),
        verify=False,
        progress=lambda event, done, total, **rest: ctx.progress("edit", done=done, total=total),
    )
    report.save(ctx.work_dir / "edit.json")
    return out
