"""Configuration of supervised tuning. Defaults are those of the paper's group: LoRA on all linear layers of the LLM."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from holdfast.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How one task is learned.

    rank, alpha, dropout: of the LoRA; its update is (alpha / rank) B A.
    learning_rate, schedule, warmup_ratio, weight_decay, max_grad_norm: of AdamW. max_grad_norm 0 turns clipping off.
    epochs or max_steps: max_steps (optimizer steps), when given, decides alone.
    batch_size: samples per optimizer step. micro_batch_size: samples per forward pass, must divide batch_size; None is
        the whole batch. It changes memory, not the result beyond rounding.
    max_length: longer samples are cut at the end, after `max_length` tokens; a cut into images or the loss of the whole
        answer is an error. None: a sample longer than the model's context is an error.
    max_cut_share: training stops before its first step where more than this share of the samples (and more than one)
        would be cut at max_length; 1 allows any. It is measured on all samples of a small task, else on an even draw.
    precision: of the forward pass. `auto` is bf16 on a device that has instructions for it, else fp32; weights that are
        trained are fp32 always.
    save_steps: keep the trainer's state every so many optimizer steps, so that a killed task goes on from there to the
        same bytes. None: a killed task starts again.
    gradient_checkpointing: compute activations again in the backward pass instead of keeping them: slower, in
        less memory.
    workers: processes that decode and encode samples; 0 does it in the training process.
    screen: ask theta_0 every training sample first: "report" lists those that it refuses (and whose answer does not) in
        screen_training.json of the step, "drop" leaves them out as well. It costs one short answer a sample.
    deterministic: ask torch for deterministic kernels on an accelerator (slower); CPUs are deterministic anyway.
    """

    rank: int = 128
    alpha: float = 256
    dropout: float = 0.05
    learning_rate: float = 1e-4
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 64
    micro_batch_size: int | None = None
    max_length: int | None = None
    max_cut_share: float = 0.1
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    gradient_checkpointing: bool = False
    save_steps: int | None = None
    workers: int = 0
    deterministic: bool = False
    screen: Literal["off", "report", "drop"] = "off"

    def __post_init__(self) -> None:
        for name in ("rank", "batch_size", "alpha", "learning_rate", "epochs"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected more than 0, and finite.")
        for name in ("max_steps", "micro_batch_size", "max_length", "save_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; expected 1 or more, or null.")
        for name in ("weight_decay", "max_grad_norm", "workers"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 0 or more.")
        for name in ("dropout", "warmup_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a share in [0, 1).")
        if not 0 <= self.max_cut_share <= 1:
            raise ConfigError(f"max_cut_share is {self.max_cut_share}; expected a share in [0, 1].")
        if self.batch_size % self.forward_size:
            raise ConfigError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}.")

    @property
    def forward_size(self) -> int:
        """Samples per forward pass."""
        return self.micro_batch_size or self.batch_size

    def part_size(self, processes: int) -> int:
        """Samples per forward pass where so many processes deal out each batch: at most `forward_size`, and equal.

        Raises: ConfigError: see `refuse_uneven`.
        """
        self.refuse_uneven(processes)
        part = self.batch_size // processes
        return next(size for size in range(min(part, self.forward_size), 0, -1) if part % size == 0)

    def refuse_uneven(self, processes: int) -> None:
        """Raises ConfigError: a batch cannot be dealt out over so many processes in parts of one size."""
        if self.batch_size % processes:
            raise ConfigError(
                f"batch_size {self.batch_size} cannot be dealt out evenly over {processes} processes. Make it a "
                f"multiple of {processes}, or start another number of processes."
            )
