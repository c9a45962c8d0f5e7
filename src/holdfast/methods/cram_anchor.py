"""CRAM with the anchored edit on every finished expert (ours), in place of HPA's columns (`cram_hpa`).

An expert is a LoRA on theta_0, so its anchored edit is a LoRA of the same rank, exactly. H_s is taken on theta_0, H_t
on theta_0 under the expert. Experts do not overwrite each other and the router keeps tasks apart, so earlier tasks have
no weight here unless one is given.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from holdfast.data.types import Stream
from holdfast.methods._glue.anchor_step import AnchorMethodConfig, step_grams
from holdfast.methods._glue.expert_edit import edited_expert
from holdfast.methods.cram import Cram, CramMethodConfig
from holdfast.methods.seqft import safety_set
from holdfast.rules.anchor import AnchorConfig, AnchorRule
from holdfast.stream.protocol import Checkpoint, TaskContext


@dataclass(frozen=True, kw_only=True)
class CramAnchorConfig(CramMethodConfig, AnchorMethodConfig):
    """Options of CRAM, of the calibration, and of the edit."""

    edit: AnchorConfig = field(default_factory=lambda: AnchorConfig(past_weight=0.0, benign_share=0.6))


class CramAnchor(Cram):
    """CRAM with the anchored edit on every finished expert.

    Files in the step's folder: those of `Cram`, edit.json, screen.json.
    """

    Config: type[CramAnchorConfig] = CramAnchorConfig
    config: CramAnchorConfig

    def __init__(self, config: CramAnchorConfig | None = None, *, name: str = "cram_anchor") -> None:
        super().__init__(config, name=name)

    def check_stream(self, stream: Stream) -> None:
        """Raises CalibrationError: the stream has no safety calibration samples."""
        super().check_stream(stream)
        safety_set(stream, self.config, self.name)

    def final_expert(self, ctx: TaskContext, trained: Checkpoint) -> Path:
        """The expert after the anchored edit: an edited LoRA folder of the same ranks."""
        grams = step_grams(ctx, self.config, self.name, before=ctx.theta_0, after=trained, samples=self.learned(ctx))
        return edited_expert(ctx, trained, rule=AnchorRule(self.config.edit, grams))


__all__ = ["CramAnchor", "CramAnchorConfig"]
