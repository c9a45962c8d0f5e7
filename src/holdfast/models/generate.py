"""Batched answers, greedy or seeded. A sample gets the same answer alone and in any batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from holdfast.data.types import Sample
from holdfast.errors import ConfigError
from holdfast.models.encode import decode, encode_request
from holdfast.models.loaded import LoadedModel
from holdfast.models.settings import quiet_transformers

OnBatch = Callable[[list[int], list[str]], None]


@torch.inference_mode()
def generate(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    seed: int | None = None,
    temperature: float = 1.0,
    keep_answer: bool = False,
    on_batch: OnBatch | None = None,
) -> list[str]:
    """The model's answers, in the order of `samples`, without special tokens and outer white space.

    seed: None decodes greedily; a number samples at `temperature` from the full distribution, with noise drawn per
        sample from (seed, sample id), so neither order nor batch changes an answer.
    keep_answer: show the samples' final answers too (see `encode_request`).
    on_batch: called after each batch with the samples' indices and their answers, to append as one goes. Batches hold
        requests of like length, longest first (a batch that does not fit in memory fails at once).

    Raises: DataError: as `encode_request`. ConfigError: a non-positive batch size, length or temperature.
    """
    if batch_size < 1 or max_new_tokens < 1 or temperature <= 0:
        raise ConfigError(
            f"batch_size {batch_size}, max_new_tokens {max_new_tokens} and temperature {temperature} must be positive."
        )
    order = sorted(range(len(samples)), key=lambda i: (-_size(samples[i]), i))
    answers = [""] * len(samples)
    config = greedy_config(loaded, max_new_tokens)
    was_training = loaded.model.training
    loaded.model.eval()
    try:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            texts = _answer(loaded, [samples[i] for i in indices], config, seed, temperature, keep_answer)
            for index, text in zip(indices, texts, strict=True):
                answers[index] = text
            if on_batch is not None:
                on_batch(indices, texts)
    finally:
        loaded.model.train(was_training)
    return answers


def _answer(
    loaded: LoadedModel,
    samples: list[Sample],
    config: GenerationConfig,
    seed: int | None,
    temperature: float,
    keep_answer: bool,
) -> list[str]:
    inputs = {k: v.to(loaded.device) for k, v in encode_request(loaded, samples, keep_answer=keep_answer).items()}
    processors = LogitsProcessorList()
    if seed is not None:
        processors.append(_SeededNoise(seed, [s.id for s in samples], temperature))
    with loaded.serving(samples), quiet_transformers():
        tokens = loaded.model.generate(  # type: ignore[operator]
            **inputs, generation_config=config, logits_processor=processors
        )
    new = tokens[:, inputs["input_ids"].shape[1] :].cpu()
    return [decode(loaded.tokenizer, _until_end(row, loaded.eos_token_ids), name=loaded.name).strip() for row in new]


def greedy_config(loaded: LoadedModel, max_new_tokens: int) -> GenerationConfig:
    """Plain greedy decoding, whatever the checkpoint's own generation config says."""
    # Every knob is spelled out: what a checkpoint's generation_config.json leaves set (temperature, top_p, repetition
    # penalty) would otherwise be merged in, and two checkpoints would be asked in two ways.
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        max_length=None,
        min_length=0,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        eos_token_id=list(loaded.eos_token_ids) or None,
        pad_token_id=loaded.tokenizer.pad_token_id,
        bos_token_id=loaded.tokenizer.bos_token_id,
    )


class _SeededNoise(LogitsProcessor):
    """Turns greedy search into sampling: argmax(logits / T + Gumbel noise) is a draw from softmax(logits / T)."""

    def __init__(self, seed: int, ids: Sequence[str], temperature: float) -> None:
        self.temperature = temperature
        self.generators = []
        for sample_id in ids:
            digest = hashlib.sha256(f"{seed}\0{sample_id}".encode()).digest()
            # On the CPU whatever the model's device: its generator gives the same numbers everywhere.
            self.generators.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty(scores.shape, dtype=torch.float32)
        for row, generator in enumerate(self.generators):
            noise[row].exponential_(generator=generator)
        return scores.float() / self.temperature - noise.log().to(scores.device)


def _until_end(row: Tensor, eos: Sequence[int]) -> Tensor:
    ends = torch.isin(row, torch.tensor(list(eos), dtype=row.dtype)).nonzero()
    return row[: int(ends[0])] if len(ends) else row


def _size(sample: Sample) -> int:
    # Characters and images stand for tokens: exact lengths would need every image decoded up front.
    return sum(len(turn.text) for turn in sample.request) + 1000 * len(sample.images)
