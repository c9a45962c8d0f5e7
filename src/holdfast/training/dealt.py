"""Batches dealt out over the processes that learn a task together: those of one process, cut into parts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from accelerate.data_loader import SeedableRandomSampler

from holdfast.share import Share
from holdfast.training.training_config import TrainingConfig


@dataclass
class DealtBatches:
    """A batch sampler: the indices of this process's forward passes; -1 - i for an idle one, with sample i at hand.

    batch_size: samples of an optimizer step, over all processes. forward_size: of a pass. passes: of a full step.
    The order is drawn as for one process, so a step learns from the same samples however many processes there are.
    """

    count: int
    batch_size: int
    forward_size: int
    rank: int
    world: int
    seed: int
    epoch: int = field(default=0, init=False)

    @property
    def passes(self) -> int:
        """Forward passes of this process in an optimizer step of `batch_size` samples."""
        return self.batch_size // self.world // self.forward_size

    def set_epoch(self, epoch: int) -> None:
        """Which of the orders that the seed gives comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Forward passes of an epoch, in every process."""
        whole, left = divmod(self.count, self.batch_size)
        return whole * self.passes + self._passes_of(left)

    def __iter__(self) -> Iterator[list[int]]:
        sampler = SeedableRandomSampler(range(self.count), data_seed=self.seed)
        sampler.set_epoch(self.epoch)
        order = list(sampler)
        for start in range(0, self.count, self.batch_size):
            yield from self._mine(order[start : start + self.batch_size])

    def _mine(self, batch: list[int]) -> Iterator[list[int]]:
        # As even as can be: with 3 samples and 2 processes, 2 and 1.
        bounds = [len(batch) * rank // self.world for rank in (self.rank, self.rank + 1)]
        own = batch[bounds[0] : bounds[1]]
        for number in range(self._passes_of(len(batch))):
            some = own[number * self.forward_size : (number + 1) * self.forward_size]
            yield some or [-1 - batch[0]]

    def _passes_of(self, samples: int) -> int:
        """Forward passes over the largest part of so many samples."""
        return math.ceil(math.ceil(samples / self.world) / self.forward_size)


def deal(count: int, config: TrainingConfig, share: Share, seed: int) -> DealtBatches | None:
    """How `count` samples are dealt out, or None where one process learns alone.

    Raises: ConfigError: batch_size is no multiple of the number of processes.
    """
    if share.world == 1:
        return None
    return DealtBatches(
        count=count,
        batch_size=config.batch_size,
        forward_size=config.part_size(share.world),
        rank=share.rank,
        world=share.world,
        seed=seed,
    )
