"""A model that is in memory and ready to be asked: what `models.load` makes and everything else takes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from holdfast.checkpoints.value import Checkpoint
from holdfast.data.types import Sample
from holdfast.errors import ModelError
from holdfast.models.families import Family
from holdfast.text import one_line


class BlockStore(Protocol):
    """Decoder blocks whose weights are in memory only while they are used."""

    def materialize(self, indices: range) -> None:
        """Bring the weights of these blocks (0-based) to the device."""
        ...

    def release(self, indices: range) -> None:
        """Give the memory of these blocks back."""
        ...


class Tuner(Protocol):
    """What a tuner leaves on a model."""

    def serving(self, samples: Sequence[Sample]) -> AbstractContextManager[None]:
        """Within, forward passes and `generate` are about these requests, in this order."""
        ...

    def explain(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """What would answer each request: {"id", "weights": {adapter: share}, "abstained", ...}, plain data."""
        ...


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model that is ready to be asked, with its processor.

    model: in eval mode on `device`, adapters merged (module names are those of the plain checkpoint).
    blocks_on_disk: the decoder blocks' weights, where the model was loaded without them (`load_streamed`).
    tuner: what decides per request which adapters answer, where the checkpoint has such a folder on top.
    processor: images become PIL-backend pixels, so the same file gives the same tensor on every machine.
    name: what errors and records call it (folder or hub id).
    """

    model: PreTrainedModel = field(repr=False)
    processor: Any = field(repr=False)
    name: str
    family: Family = field(default_factory=Family)
    source: Checkpoint | None = None
    blocks_on_disk: BlockStore | None = field(default=None, repr=False)
    tuner: Tuner | None = field(default=None, repr=False)

    def serving(self, samples: Sequence[Sample]) -> AbstractContextManager[None]:
        """Within, forward passes are about these requests; what a tuner chooses per request depends on it."""
        return nullcontext() if self.tuner is None else self.tuner.serving(samples)

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the model's first weights lie."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the model's weights."""
        return self.model.dtype

    @cached_property
    def image_token_ids(self) -> frozenset[int]:
        """Ids that stand for a patch of an image in `input_ids`."""
        found = {
            getattr(holder, name, None)
            for holder in (self.processor, self.model.config)
            for name in ("image_token_id", "image_token_index")
        }
        return frozenset(int(i) for i in found if isinstance(i, int))

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the generation config's and the tokenizer's. Raises: ModelError: what is no id."""
        ends = (self.model.generation_config.eos_token_id, self.tokenizer.eos_token_id)
        return tuple(sorted({i for value in ends for i in _token_ids(value, self.name)}))

    @cached_property
    def answer_end_ids(self) -> tuple[int, ...]:
        """Ids at which stock generation stops: the generation config's, or the tokenizer's where it names none.

        Raises: ModelError: what is no id.
        """
        named = self.model.generation_config.eos_token_id
        return _token_ids(self.tokenizer.eos_token_id if named is None else named, self.name)

    @cached_property
    def context_length(self) -> int | None:
        """Positions that the language model was built for, or None where the configuration names no bound."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)


def _token_ids(value: Any, name: str) -> tuple[int, ...]:
    """Ids as a generation config has them: one, a list, or none. Raises: ModelError: anything else."""
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and -1 <= i < 2**31 for i in ids):
        raise ModelError(
            f"{name}: generation_config.json has eos_token_id {one_line(repr(value), 80)}; expected a token's id or a "
            "list of them."
        )
    return tuple(ids)
