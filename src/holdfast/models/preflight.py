"""Samples through the real processor before a run: what would stop it hours later shows in seconds, without weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import GenerationConfig

from holdfast.checkpoints.value import Checkpoint
from holdfast.data.types import Sample
from holdfast.errors import DataError, ModelError
from holdfast.models.encode import IGNORED_LABEL, encode_request, encode_training
from holdfast.models.families import family_of
from holdfast.models.loaded import LoadedModel
from holdfast.models.settings import quiet_transformers, read_config, read_processor

SPREAD = 24  # samples of a split, evenly spread
EXTREMES = 4  # samples of each extreme


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What encoding some samples of a split showed. faults: messages, of distinct samples; lengths: tokens, by id."""

    tried: int
    faults: tuple[str, ...]
    lengths: Mapping[str, int]
    even: tuple[str, ...]  # ids of the even draw, from which shares are told
    answer_starts: Mapping[str, int]  # tokens before the first target
    last_images: Mapping[str, int]  # tokens up to the last image's end


def read_without_weights(base: str) -> LoadedModel:
    """What encoding needs of a checkpoint: processor and configurations. Raises ModelError, like `load`."""
    config = read_config(base)
    with quiet_transformers():
        processor = read_processor(base, config)
        try:
            generation = GenerationConfig.from_pretrained(base)
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            generation = GenerationConfig.from_model_config(config)
    shell: Any = SimpleNamespace(
        config=config, generation_config=generation, dtype=torch.float32, device=torch.device("cpu")
    )
    return LoadedModel(
        model=shell, processor=processor, name=base, family=family_of(config), source=Checkpoint(base=base)
    )


def try_samples(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    sizes: Mapping[Path, tuple[int, int]],
    *,
    training: bool,
    cut_at: int | None = None,
) -> Trial:
    """Encode an even draw and the extremes (longest text, most and largest pictures, most stretched, most turns,
    an answer first).

    sizes: (width, height) of pictures; samples with a picture that is not among them are left to other checks.
    cut_at: where every training sample will be cut; what lies behind it need not fit into the context.
    """
    usable = [s for s in samples if all(path in sizes for path in s.images)]
    even = _spread(usable, SPREAD)
    chosen = {id(s): s for s in [*even, *_extremes(usable, sizes)]}
    faults: list[str] = []
    lengths: dict[str, int] = {}
    starts: dict[str, int] = {}
    images: dict[str, int] = {}
    image_ids = torch.tensor(sorted(loaded.image_token_ids))
    for sample in chosen.values():
        try:
            inputs = encode_training(loaded, [sample], cut_at=cut_at) if training else encode_request(loaded, [sample])
        except (DataError, ModelError) as error:
            faults.append(str(error))
            continue
        ids = inputs["input_ids"][0]
        lengths[sample.id] = int(inputs["attention_mask"][0].sum())
        shown = torch.isin(ids, image_ids).nonzero()
        images[sample.id] = int(shown[-1]) + 1 if len(shown) else 0
        if training:
            starts[sample.id] = int((inputs["labels"][0] != IGNORED_LABEL).nonzero()[0])
    return Trial(
        tried=len(chosen),
        faults=tuple(faults),
        lengths=lengths,
        even=tuple(s.id for s in even if s.id in lengths),
        answer_starts=starts,
        last_images=images,
    )


def judge_lengths(trial: Trial, max_length: int, max_cut_share: float) -> list[tuple[str, str]]:
    """(level, message) of what `max_length` does to the samples that were tried."""
    found: list[tuple[str, str]] = []
    hollow = [i for i, n in trial.lengths.items() if n > max_length and trial.answer_starts[i] >= max_length]
    torn = [i for i, n in trial.last_images.items() if n > max_length]
    for ids, what in ((torn, "cut into the images"), (hollow, "remove the whole answer")):
        if ids:
            longest = max(trial.lengths[i] for i in ids)
            found.append(
                (
                    "error",
                    f"max_length {max_length} would {what} of {_named(ids)} (up to {longest} tokens); training stops",
                )
            )
    cut = [i for i in trial.even if trial.lengths[i] > max_length]
    if cut:
        many = len(cut) > 1 and len(cut) > max_cut_share * len(trial.even)
        found.append(
            (
                "error" if many else "warning",
                f"max_length {max_length} would cut {len(cut)} of {len(trial.even)} samples of an even draw (longest "
                f"{max(trial.lengths.values())} tokens)" + (f"; max_cut_share is {max_cut_share:g}" if many else ""),
            )
        )
    elif trial.lengths and max(trial.lengths.values()) > max_length:
        longest = max(trial.lengths.values())
        found.append(("warning", f"max_length {max_length} would cut the longest samples ({longest} tokens)"))
    return found


def judge_replies(trial: Trial, max_new_tokens: int, context: int | None) -> str | None:
    """A sentence where the longest requests leave no room for `max_new_tokens` in the model's context, else None.

    context: tokens (`LoadedModel.context_length`); None where the model says nothing.
    """
    tight = {i: n for i, n in trial.lengths.items() if context is not None and n + max_new_tokens > context}
    if not tight:
        return None
    return (
        f"{len(tight)} of {len(trial.lengths)} requests that were tried leave less than max_new_tokens "
        f"{max_new_tokens} of the model's context of {context} tokens (longest {max(tight.values())}: "
        f"{_named(list(tight))}); what a model writes beyond its context means nothing. Lower max_new_tokens"
    )


def _extremes(samples: Sequence[Sample], sizes: Mapping[Path, tuple[int, int]]) -> list[Sample]:
    def stretch(sample: Sample) -> float:
        return max((max(sizes[p]) / max(1, min(sizes[p])) for p in sample.images), default=0.0)

    def area(sample: Sample) -> int:
        return max((sizes[p][0] * sizes[p][1] for p in sample.images), default=0)

    def small(sample: Sample) -> int:
        return -min((min(sizes[p]) for p in sample.images), default=10**9)

    keys = (
        lambda s: sum(len(turn.text) for turn in s.turns),
        lambda s: len(s.images),
        lambda s: len(s.turns),
        lambda s: -sum(len(turn.text) for turn in s.turns),
        stretch,
        area,
        small,
        lambda s: next((turn.role for turn in s.turns if turn.role != "system"), "user") == "assistant",
    )
    return [sample for key in keys for sample in sorted(samples, key=key, reverse=True)[:EXTREMES]]


def _spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    if len(samples) <= count:
        return list(samples)
    return [samples[round(i * (len(samples) - 1) / (count - 1))] for i in range(count)]


def _named(ids: Sequence[str]) -> str:
    return ", ".join(map(repr, ids[:3])) + (", ..." if len(ids) > 3 else "")


__all__ = ["Trial", "judge_lengths", "judge_replies", "read_without_weights", "try_samples"]
