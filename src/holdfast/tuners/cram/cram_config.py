"""Configuration of CRAM. Defaults are our reading; `CramConfig.official()` is as near the released code as we go."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from holdfast.config import accepts_old_names, current_names
from holdfast.errors import ConfigError
from holdfast.functional.cram import RankRule

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
BACKBONE = "backbone"
# What the released code routes by; its sigma of 2 is a distance between this encoder's features.
RELEASED_ENCODER = "openai/clip-vit-large-patch14-336"


@dataclass(frozen=True, kw_only=True)
class ReleasedCode:
    """Switches that take a choice of the released code in place of ours; the defaults are ours.

    forward_factor: what buffer and expert add is multiplied by this in every forward pass of training: alpha / r of the
        released adapter, 2. It is part of what they learnt, and of the strengths that `rank` looks at; folders hold it
        in B. With 1 an expert learns half as much at the same learning rate.
    double_scale: start the expert at twice what the buffer learnt.
    learn_centroid, centroid_per_block: train the new expert's image centroid with it; one centroid per decoder block.
    penalty_space: "input" projects outputs on the older experts' input directions, which is defined for square linears
        only.
    max_groups: at most so many groups in the level-1 table; None: no limit.
    warmup_history: with "routed" the older experts of the group stay on in the warm-up, so the buffer learns what they
        lack; with "off" the buffer learns alone.

    Raises: ConfigError: a value outside of these.
    """

    forward_factor: float = 1.0
    double_scale: bool = False
    learn_centroid: bool = False
    centroid_per_block: bool = False
    penalty_space: Literal["output", "input"] = "output"
    max_groups: int | None = None
    warmup_history: Literal["off", "routed"] = "off"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.forward_factor) and self.forward_factor > 0):
            raise ConfigError(f"forward_factor is {self.forward_factor}; expected a finite number above 0.")
        if self.max_groups is not None and self.max_groups < 1:
            raise ConfigError(f"max_groups is {self.max_groups}; expected 1 or more, or null for no limit.")
        if self.centroid_per_block and not self.learn_centroid:
            raise ConfigError("centroid_per_block only differs from one centroid when learn_centroid is on.")


# These stood beside the other options once, and are read from there still.
@accepts_old_names(
    forward_factor="released.forward_factor",
    compat_double_scale="released.double_scale",
    learn_centroid="released.learn_centroid",
    centroid_per_block="released.centroid_per_block",
    penalty_space="released.penalty_space",
    max_groups="released.max_groups",
    warmup_history="released.warmup_history",
)
@dataclass(frozen=True, kw_only=True)
class CramConfig:
    """How tasks become experts and requests find them.

    targets: last names of the adapted linears of the decoder blocks.
    buffer_rank, warmup_fraction: rank of the temporary adapter, and the share of the task's optimizer steps that train
        it.
    rank: how many of the buffer's directions the expert keeps.
    dropout: on the input of the trained factors.
    join_cosine, join_margin, join_floor: the level-1 table (`functional.cram.decide_group`).
    sigma: width of the routing softmax in units of the image features; None takes it from the data, by `sigma_scale`.
    sigma_scale: the width as a share of the median distance of a task's images to their centroid, averaged over the
        group's experts.
    reuse: mix experts by pi; False gives a request to the nearest expert alone (an ablation).
    penalty: weight lambda of the orthogonality penalty.
    abstain: requests that no expert of the group finds like its own task go to the base alone, judged by the
        instruction ("text"), or by instruction and image ("both"), against floors.
    abstain_quantile, abstain_slack: a floor is this quantile of what held-out training samples of the task reach, minus
        the slack (cosine) or times 1 + slack (image distance).
    held_out: share of a task's training samples that only set the floors and never a centroid.
    route_by: "image" refuses requests without an image; "auto" routes them by the experts' text centroids.
    encoder: "backbone" (the model's own input embeddings and vision tower), or a CLIP or SigLIP folder or hub id.
    common_directions: of the backbone's instruction vectors, the directions in which word embeddings vary most are left
        out, as many as this share of their width ("all-but-the-top", Mu and Viswanath 2018: a hundredth). A pretrained
        language model's embeddings share them, whatever is said; with them no two tasks would differ by join_cosine.
        0: none are, as in folders that were made before there was this option.
    released: choices of the released code in place of ours.
    """

    targets: tuple[str, ...] = ATTENTION
    buffer_rank: int = 48
    warmup_fraction: float = 0.05
    rank: RankRule = field(default_factory=RankRule)
    dropout: float = 0.05
    join_cosine: float = 0.8
    join_margin: float = 0.1
    join_floor: float = 0.8
    sigma: float | None = None
    sigma_scale: float = 0.25
    reuse: bool = True
    penalty: float = 1.0
    abstain: Literal["off", "text", "both"] = "text"
    abstain_quantile: float = 0.01
    abstain_slack: float = 0.05
    held_out: float = 0.1
    route_by: Literal["auto", "image"] = "auto"
    encoder: str = BACKBONE
    common_directions: float = field(default=0.01, metadata={"before": 0.0})
    released: ReleasedCode = field(default_factory=ReleasedCode)

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{name} is {value}; expected a finite number.")
        if not self.targets:
            raise ConfigError("targets is empty; name at least one linear layer, such as q_proj.")
        if self.rank.r_max > self.buffer_rank:
            raise ConfigError(
                f"r_max is {self.rank.r_max} and buffer_rank {self.buffer_rank}; an expert keeps at most the buffer's "
                "directions. Raise buffer_rank or lower r_max."
            )
        if self.sigma is not None and not 0 <= self.sigma < math.inf:
            raise ConfigError(f"sigma is {self.sigma}; expected 0 or more, or null to take it from the data.")
        for name in ("join_cosine", "join_floor"):
            if not -1 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a cosine in -1..1.")
        for name in ("sigma_scale", "penalty", "abstain_slack"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 0 or more.")
        for name in ("dropout", "held_out", "abstain_quantile", "common_directions"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a share in [0, 1).")
        if not 0 < self.warmup_fraction < 1:
            raise ConfigError(f"warmup_fraction is {self.warmup_fraction}; expected a share between 0 and 1.")
        if self.released.learn_centroid and (self.sigma == 0 or not self.reuse):
            raise ConfigError("learn_centroid needs a soft choice: sigma above 0 and reuse on.")

    @classmethod
    def official(cls, **changes: Any) -> CramConfig:
        """The released recipe: its thresholds, choices and encoder, and those of its oddities that change an expert.

        As for TriGap; for UCIT the released runs keep at most 9 directions and 5 groups (`rank.r_max`,
        `released.max_groups`). What else the code does wrong stays out: docs/design/cram.md names it.
        """
        changes = current_names(cls, changes)
        if not isinstance(changes.get("released"), ReleasedCode):
            own = {
                "forward_factor": 2.0,
                "double_scale": True,
                "learn_centroid": True,
                "centroid_per_block": True,
                "penalty_space": "input",
                "max_groups": 10,
            }
            changes["released"] = {**own, **changes.get("released", {})}
        rank = RankRule(r_min=4, r_max=10, tau_alloc=0.08, alloc="absolute", novelty="absolute", cap_first=True)
        return cls(
            **{
                "rank": rank,
                "join_floor": -1.0,
                "sigma": 2.0,
                "abstain": "off",
                "held_out": 0.0,
                "encoder": RELEASED_ENCODER,
                "common_directions": 0.0,
                **changes,
            }
        )
