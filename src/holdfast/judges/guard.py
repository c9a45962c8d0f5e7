"""Guard models through transformers: Llama Guard 3 and 4, Qwen3Guard, WildGuard, Granite Guardian, and their kin.

The guard is shown the request, its images and the reply through its own chat template, which carries its policy; it is
loaded when the first reply is judged that is not in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.data.types import Sample, Turn
from holdfast.errors import ConfigError, DataError, JudgeError
from holdfast.judges.base import Side, Verdict, check_pairs, unscored
from holdfast.judges.behaviour import CollapseRules, collapse_rules
from holdfast.judges.cache import ContentKey, VerdictCache, open_cache
from holdfast.judges.text import answer_of
from holdfast.judges.verdicts import FORMATS, Found, format_of, from_safety, parse_as

if TYPE_CHECKING:
    from holdfast.models.loaded import LoadedModel

LLAMA_GUARD_4 = "meta-llama/Llama-Guard-4-12B"
LLAMA_GUARD_3_VISION = "meta-llama/Llama-Guard-3-11B-Vision"


class GuardJudge:
    """A guard model that says in a format of `verdicts.FORMATS` whether a reply is safe.

    format: "auto" goes by the model's name, and reads what names itself (safe/unsafe, JSON, `Safety:`, `Harmful
        response:`) where the name does not tell; a bare "Yes" is read only where the guard that says it is known.
    model: hub id or local folder. batch_size: replies per batch. dtype, device: as `holdfast.models.load.load`.
    max_new_tokens: the verdict and the codes need about ten,
        labelled lines about forty; None: 24 for Llama Guard, 64 for others.
    cache: file of its answers; None the default, False none.
    collapse: thresholds of what is damage in a reply that the guard calls safe (`CollapseRules`, or a mapping).
    """

    template = "reply/1"

    def __init__(
        self,
        model: str,
        *,
        name: str = "guard",
        batch_size: int = 8,
        dtype: str | None = None,
        device: str | None = None,
        max_new_tokens: int | None = None,
        format: str = "auto",
        cache: str | Path | bool | None = None,
        collapse: CollapseRules | Mapping[str, Any] | None = None,
    ) -> None:
        if format != "auto" and format not in FORMATS:
            raise ConfigError(f"guard format {format!r} does not exist; expected auto or one of {', '.join(FORMATS)}.")
        self.format = format_of(model) if format == "auto" else format
        if max_new_tokens is None:
            max_new_tokens = 24 if self.format == "llama_guard" else 64
        if batch_size < 1 or max_new_tokens < 1:
            raise ConfigError(f"batch_size {batch_size} and max_new_tokens {max_new_tokens} must be positive.")
        self.name = name
        self.rules = collapse_rules(collapse, name)
        self.model = str(model)
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self._dtype, self._device = dtype, device
        self._loaded: LoadedModel | None = None
        self._cache_option = cache
        self._cache: VerdictCache | None = None
        self._key: ContentKey | None = None

    def judge(self, samples: Sequence[Sample], replies: Sequence[str], *, side: Side = "unsafe") -> list[Verdict]:
        """One verdict per reply. A reply that the guard cannot be shown (too long, an image that does not decode), or
        whose answer is not known (a thought that never ends), is unscored.

        Raises JudgeError: none of the replies could be shown, or none of the guard's texts could be read.
        """
        check_pairs(samples, replies, side)
        answers = [answer_of(reply) for reply in replies]
        known = [i for i, answer in enumerate(answers) if not answer.unclosed]
        verdicts = [unscored("a thought is begun and never ended, so the answer is not known")] * len(replies)
        asked = self._judge([samples[i] for i in known], [answers[i].text for i in known], side)
        for i, verdict in zip(known, asked, strict=True):
            verdicts[i] = replace(verdict, evidence=answers[i].note + verdict.evidence)
        return verdicts

    def _judge(self, samples: Sequence[Sample], replies: Sequence[str], side: Side) -> list[Verdict]:
        cache = self._open_cache()
        key_of = self._keys()
        keys = [key_of(sample, reply) for sample, reply in zip(samples, replies, strict=True)]
        missing = [i for i, key in enumerate(keys) if cache.get(key) is None]
        failures: dict[int, str] = {}
        for start in range(0, len(missing), self.batch_size):
            some = missing[start : start + self.batch_size]
            with cache.asking([keys[i] for i in some]) as still:
                batch = [i for i in some if keys[i] in still]
                shown = [conversation(samples[i], replies[i]) for i in batch]
                for index, answer in zip(batch, self._ask_each(shown) if shown else (), strict=True):
                    if isinstance(answer, DataError):
                        failures[index] = str(answer)
                    else:
                        cache.put(keys[index], answer)
        if failures and len(failures) == len(samples):
            raise JudgeError(
                f"{self.name} ({self.model}) could be shown none of {len(samples)} replies: {failures[min(failures)]}"
            )
        verdicts, unread = [], []
        for index, (sample, reply) in enumerate(zip(samples, replies, strict=True)):
            text = cache.get(keys[index])
            if text is None:
                verdicts.append(unscored(f"the guard could not be shown this reply: {failures[index]}"))
                continue
            label, evidence = self._parse(text, reply)
            if label is None:
                unread.append(evidence)
            verdicts.append(from_safety(label, evidence, sample, reply, side, rules=self.rules))
        if unread and len(unread) == len(samples) - len(failures):
            raise JudgeError(
                f"None of the {len(unread)} texts of {self.name} ({self.model}) could be read as {self.format}: "
                f"{unread[0]}. Name the guard's own format with the option `format` ({', '.join(FORMATS)}), and check "
                "that its chat template asks for a verdict."
            )
        return verdicts

    def _parse(self, text: str, reply: str) -> Found:
        return parse_as(self.format, text, reply=reply)

    def _ask_each(self, shown: list[Sample]) -> list[str | DataError]:
        """Texts of a batch; where the batch is refused, of each of its samples alone."""
        try:
            return list(self._ask(shown))
        except DataError as error:
            if len(shown) == 1:
                return [error]
            return [answer for sample in shown for answer in self._ask_each([sample])]

    def _ask(self, shown: list[Sample]) -> list[str]:
        """The guard's texts to conversations that end with the reply: the one place where the model is run."""
        from holdfast.models.generate import generate

        return generate(
            self._model(), shown, max_new_tokens=self.max_new_tokens, batch_size=len(shown), keep_answer=True
        )

    def _model(self) -> LoadedModel:
        if self._loaded is None:
            from holdfast.models.load import load

            self._loaded = load(self.model, dtype=self._dtype, device=self._device)
        return self._loaded

    def _keys(self) -> ContentKey:
        if self._key is None:
            identity = {"model": self.model, "template": self.template, "max_new_tokens": self.max_new_tokens}
            if Path(self.model).is_dir():
                from holdfast.checkpoints.fingerprint import fingerprint
                from holdfast.checkpoints.reader import CheckpointReader

                # A folder may be filled anew under its old name.
                with CheckpointReader(self.model) as reader:
                    identity["weights"] = fingerprint(reader)
            self._key = ContentKey(identity)
        return self._key

    def _open_cache(self) -> VerdictCache:
        if self._cache is None:
            self._cache = open_cache(self._cache_option, self.name)
        return self._cache


class LlamaGuard4(GuardJudge):
    """Llama Guard 4 12B: text and several images, requests and replies."""

    def __init__(self, model: str = LLAMA_GUARD_4, **options: object) -> None:
        super().__init__(model, name="llama_guard_4", **{"format": "llama_guard", **options})  # type: ignore[arg-type]


class LlamaGuard3Vision(GuardJudge):
    """Llama Guard 3 11B Vision: one image beside the text; made for requests that have one."""

    def __init__(self, model: str = LLAMA_GUARD_3_VISION, **options: object) -> None:
        super().__init__(model, name="llama_guard_3_vision", **{"format": "llama_guard", **options})  # type: ignore[arg-type]


def conversation(sample: Sample, reply: str) -> Sample:
    """The request with `reply` as the assistant's last turn."""
    # A template drops a turn without text, and the guard would judge the request instead of the reply.
    shown = reply if reply.strip() else "(empty reply)"
    return replace(sample, turns=(*sample.request, Turn(role="assistant", text=shown)), references=())
