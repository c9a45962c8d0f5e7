"""Answers through vLLM, for models and test sets that are too large for `generate`. Not installed by default.

The seam is one method, `answer(samples, max_new_tokens) -> texts`; batching over a GPU is vLLM's own, so a larger
`batch_size` (512, say) pays. It takes whole checkpoints only: adapters are merged before, because a tuner's router or
input scaling has no counterpart there. CRAM with a guard needs two requests where experts are served as LoRA adapters:
one token of the base with log-probabilities (`Guard.refuses`), then the answer by the base or the routed expert
(docs/design/cram.md). Its kernels round differently from transformers', so near ties may decode
differently: compare methods within one backend.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from holdfast.checkpoints.value import Checkpoint
from holdfast.data.images import open_image
from holdfast.data.types import Sample
from holdfast.errors import ConfigError, ModelError
from holdfast.models.encode import conversation


class VllmBackend:
    """A vLLM engine for one checkpoint, made when it is first asked.

    dtype: of the weights, None as stored. seed, temperature: None greedy; otherwise sampled, each sample with its own
    seed made of (seed, sample id), so that neither order nor batch changes an answer.

    Raises: ConfigError: vLLM is not installed, or the checkpoint has adapters. ModelError: vLLM cannot load it.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, dtype: str | None = None, seed: int | None = None, temperature: float = 1.0
    ) -> None:
        if checkpoint.adapters:
            raise ConfigError(
                f"backend vllm answers for whole checkpoints; {checkpoint.base} carries the adapter(s) "
                f"{', '.join(checkpoint.adapters)}. Merge them first, or use backend transformers."
            )
        try:
            import vllm
        except ImportError as error:
            raise ConfigError(
                f"backend vllm needs vLLM, which is not installed by default ({error}). Install it in an environment "
                "of its own (`pip install vllm`), or use backend transformers."
            ) from None
        self._vllm: Any = vllm
        self._checkpoint, self._dtype = checkpoint, dtype
        self._seed, self._temperature = seed, temperature
        self._engine: Any = None

    def answer(self, samples: Sequence[Sample], *, max_new_tokens: int) -> list[str]:
        """The model's answers in the order of `samples`, stripped. Raises DataError: as `models.encode`."""
        if self._engine is None:
            self._engine = self._start(max((len(s.images) for s in samples), default=1))
        outputs = self._engine.chat(
            [self._messages(sample) for sample in samples],
            sampling_params=[self._sampling(sample, max_new_tokens) for sample in samples],
            use_tqdm=False,
        )
        return [output.outputs[0].text.strip() for output in outputs]

    def _start(self, images: int) -> Any:
        try:
            return self._vllm.LLM(
                model=self._checkpoint.base,
                dtype=self._dtype or "auto",
                trust_remote_code=False,
                limit_mm_per_prompt={"image": max(images, 8)},
            )
        except (ValueError, OSError, RuntimeError) as error:
            raise ModelError(f"{self._checkpoint.base}: vLLM cannot load it: {error}") from error

    def _sampling(self, sample: Sample, max_new_tokens: int) -> Any:
        if self._seed is None:
            return self._vllm.SamplingParams(temperature=0.0, max_tokens=max_new_tokens)
        digest = hashlib.sha256(f"{self._seed}\0{sample.id}".encode()).digest()
        return self._vllm.SamplingParams(
            temperature=self._temperature, max_tokens=max_new_tokens, seed=int.from_bytes(digest[:4], "little")
        )

    @staticmethod
    def _messages(sample: Sample) -> list[dict[str, Any]]:
        images = iter(sample.images)
        messages = conversation(sample, sample.request)
        for message in messages:
            message["content"] = [
                {"type": "image_pil", "image_pil": open_image(next(images))} if part["type"] == "image" else part
                for part in message["content"]
            ]
        return messages
