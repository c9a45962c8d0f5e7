"""How a checkpoint is asked and judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from holdfast.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """A judge by name (`holdfast list judges`) and its options.

    name: of the judge, or `package.module:Class`. options: what the judge takes, by name.
    Two judges of one kind (two endpoints, two guards) stand side by side under their option `name`.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What records call this judge."""
        return str(self.options.get("name", self.name))


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How answers are made and judged.

    judges: the first one decides `asr` and the other figures of a safety set; the others stand beside it.
    batch_size: requests per batch. Part of the configuration, because rounding in a batch can decide a near tie.
    dtype: of the weights when answering; null keeps the checkpoint's (fp16 becomes fp32 on a CPU).
    limit: ask at most so many samples of each test split and each side of each safety set, from the front; null: all.
    limit_between: the same for what is only looked at along the way: tasks learned earlier and safety sets, on every
        step but the last. A task just learned, and everything after the last task, are asked in full (up to `limit`),
        so AP, BWT and the safety figures are not touched. 0 asks nothing on the way, and what needs those cells (MAA,
        forgetting, curves along the stream) is null; null: no difference.
    seed, temperature: null decodes greedily; a number samples, with noise drawn per sample from (seed, sample id).
    backend: "transformers", or "vllm" (installed by oneself; what it serves: `evaluation.vllm`).
    """

    judges: tuple[JudgeConfig, ...] = (JudgeConfig(name="keyword"), JudgeConfig(name="keyword_strict"))
    batch_size: int = 16
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    limit: int | None = None
    limit_between: int | None = None
    seed: int | None = None
    temperature: float = 1.0
    backend: Literal["transformers", "vllm"] = "transformers"

    def __post_init__(self) -> None:
        names = [judge.key for judge in self.judges]
        if not names:
            raise ConfigError("judges is empty; name at least one judge (`holdfast list judges`).")
        if len(set(names)) < len(names):
            raise ConfigError(f"a judge is named twice in judges: {', '.join(names)}.")
        for name, least in (("batch_size", 1), ("limit", 1), ("limit_between", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}; expected {least} or more.")
        if self.temperature <= 0:
            raise ConfigError(f"temperature is {self.temperature}; expected more than 0 (seed: null is greedy).")
