"""Options of a restore. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from holdfast.errors import ConfigError
from holdfast.restore.search import STRENGTHS, check_strengths


@dataclass(frozen=True, kw_only=True)
class RestoreConfig:
    """Options of a restore.

    rule: whose strengths are searched. strengths: increasing, above 0. past_weight, damping: of the anchored edit.
    export: what OUT is; None: as AFTER is. judge: who says what a reply did. scorer: of the task's answers.
    min_refused: share of the forbidden requests that BEFORE must refuse, below which the policy is not BEFORE's.
    screen: task samples whose request BEFORE refuses go to the safety side. tokens: longest reply; task_tokens: longest
    answer to a task request. whole_curve: measure every strength, for the picture. batch_size: requests per batch.
    seed: of the draw of probes. dtype, device: of the models; None: as stored, an accelerator where there is one.
    memory_bytes: bound on what the process holds while it calibrates; None takes most of what is free.
    """

    rule: str = "anchor"
    strengths: tuple[float, ...] = STRENGTHS
    past_weight: float = 0.3
    damping: float = 0.03
    judge: str = "keyword"
    scorer: str = "exact_match"
    min_refused: float = 0.7
    screen: bool = True
    whole_curve: bool = False
    tokens: int = 128
    task_tokens: int = 64
    batch_size: int = 16
    seed: int = 0
    export: Literal["dense", "adapter"] | None = None
    dtype: str | None = None
    device: str | None = None
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        check_strengths(self.strengths)
        if not 0 <= self.min_refused <= 1:
            raise ConfigError(f"min_refused is {self.min_refused}; expected a rate in 0..1.")
