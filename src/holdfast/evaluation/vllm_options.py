"""How vLLM's engine is started. Apart from `EvaluationConfig`: none of it decides what an answer means."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from holdfast.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class VllmOptions:
    """Options of the engine; None leaves vLLM's own default.

    eager: no compiled graphs (a short start; the only way on many CPUs). max_model_len: tokens of prompt and answer.
    gpu_memory: share of the GPU's memory, 0..1. tensor_parallel: so many GPUs share the model. max_lora_rank: room for
    adapters; None takes what the adapters need.
    """

    eager: bool | None = None
    max_model_len: int | None = None
    gpu_memory: float | None = None
    tensor_parallel: int | None = None
    max_lora_rank: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_model_len", "tensor_parallel", "max_lora_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; expected 1 or more.")
        if self.gpu_memory is not None and not 0 < self.gpu_memory <= 1:
            raise ConfigError(f"gpu_memory is {self.gpu_memory}; expected a share above 0 and at most 1, such as 0.9.")

    def engine_arguments(self) -> dict[str, Any]:
        """By vLLM's names, only what is set; without the room for adapters."""
        named = {
            "enforce_eager": self.eager,
            "max_model_len": self.max_model_len,
            "gpu_memory_utilization": self.gpu_memory,
            "tensor_parallel_size": self.tensor_parallel,
        }
        return {name: value for name, value in named.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        """What is set, for a record."""
        return {name: value for name, value in asdict(self).items() if value is not None}
