"""CRAM with HPA's safety edit on every finished expert (ours: the two papers, composed).

An expert is an update of theta_0, W_hat = W + B A, so HPA edits it in closed form: the columns of A that its focal
partition gives to safety are set to zero, and no input can reach the expert through them. H_s is taken on theta_0, H_t
on theta_0 under the expert. Rank, router and base stay as they are; the edited expert is what is released, and what
later tasks of its group see as history. The projection is left out: an expert has no place for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from holdfast.data.types import Stream
from holdfast.errors import ConfigError
from holdfast.functional.hpa import HpaConfig
from holdfast.methods._glue.expert_edit import edited_expert
from holdfast.methods.cram import Cram, CramMethodConfig
from holdfast.methods.seqft import EditingConfig, safety_set, step_curvature
from holdfast.rules.hpa import HpaRule
from holdfast.stream.protocol import Checkpoint, TaskContext


@dataclass(frozen=True, kw_only=True)
class CramHpaConfig(CramMethodConfig, EditingConfig):
    """Options of CRAM, of the calibration, and of the edit. Raises ConfigError: an edit with a projection."""

    edit: HpaConfig = field(default_factory=lambda: HpaConfig(projection="none"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.edit.projection != "none":
            raise ConfigError(
                f"edit.projection is {self.edit.projection!r}; an expert is a LoRA and cannot hold a multiple of the "
                "base weight. Leave it out, or set it to none."
            )


class CramHpa(Cram):
    """CRAM with HPA's safety edit on every finished expert.

    Files in the step's folder: those of `Cram`, curvature.safetensors, edit.json.
    """

    Config: type[CramHpaConfig] = CramHpaConfig
    config: CramHpaConfig

    def __init__(self, config: CramHpaConfig | None = None, *, name: str = "cram_hpa") -> None:
        super().__init__(config, name=name)

    def check_stream(self, stream: Stream) -> None:
        """Raises CalibrationError: the stream has no safety calibration samples."""
        super().check_stream(stream)
        safety_set(stream, self.config, self.name)

    def final_expert(self, ctx: TaskContext, trained: Checkpoint) -> Path:
        """The expert with HPA's columns taken out: an edited LoRA folder of the same ranks."""
        curvature = step_curvature(
            ctx,
            self.config,
            self.name,
            before=ctx.theta_0,
            after=trained,
            samples=self.learned(ctx),
        )
        return edited_expert(ctx, trained, rule=HpaRule(self.config.edit), curvature=curvature)


__all__ = ["CramHpa", "CramHpaConfig"]
