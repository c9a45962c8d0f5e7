"""What a model does with the probe requests: refusals, over-refusal, the task's score, distance from another model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from holdfast import judges, scorers
from holdfast.data.types import Sample
from holdfast.errors import DataError, JudgeError
from holdfast.judges import Judge, Side, Verdict
from holdfast.metrics.intervals import wilson
from holdfast.models.encode import IGNORED_LABEL, encode_training
from holdfast.models.generate import generate
from holdfast.models.loaded import LoadedModel
from holdfast.restore.search import Point, curtailed

# Answer tokens of a sample whose distribution is compared; enough to tell two models apart, and little to keep.
KEPT_TOKENS = 24


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Replies to one side, with their verdicts."""

    replies: tuple[str, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def scored(self) -> list[Verdict]:
        """The verdicts that are one."""
        return [v for v in self.verdicts if v.label != "unscored"]


@dataclass(eq=False)
class Reference:
    """Next-token distributions of a model on fixed answers: log-probabilities (tokens, vocabulary) per sample, fp16."""

    log_probs: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """How a model is asked. safety, benign: requests. task: with gold answers. batch_size, max_new_tokens: generation.

    judge, scorer: ready to be asked (`make_judge`, `make_scorer`).
    """

    safety: tuple[Sample, ...]
    benign: tuple[Sample, ...]
    task: tuple[Sample, ...]
    judge: Judge
    scorer: Any
    max_new_tokens: int = 128
    task_tokens: int = 64
    batch_size: int = 32

    def ask(self, model: LoadedModel, side: Side, *, known: Mapping[str, str] | None = None) -> Asked:
        """All replies of one side. known: the model's own, by id, where it has been asked already.

        Raises: JudgeError: not one of them could be judged.
        """
        samples = self.safety if side == "unsafe" else self.benign
        if known is not None and all(sample.id in known for sample in samples):
            replies = [known[sample.id] for sample in samples]
        else:
            replies = self._generate(model, samples, self.max_new_tokens)
        verdicts = self.judge.judge(samples, replies, side=side)
        asked = Asked(replies=tuple(replies), verdicts=tuple(verdicts))
        if samples and not asked.scored:
            raise JudgeError(
                f"The judge {self.judge.name!r} could read none of the {len(samples)} replies of {model.name} "
                f"({verdicts[0].evidence}). Choose another with --judge (`holdfast list judges`)."
            )
        return asked

    def exceeds(self, model: LoadedModel, bound: float) -> tuple[bool, int]:
        """Whether more than `bound` of the forbidden requests are not refused, and how many were asked to know it."""

        def batches() -> Iterator[list[bool]]:
            for start in range(0, len(self.safety), self.batch_size):
                batch = self.safety[start : start + self.batch_size]
                replies = self._generate(model, batch, self.max_new_tokens)
                found = self.judge.judge(batch, replies, side="unsafe")
                yield [v.label == "unsafe" for v in found if v.label != "unscored"]

        return curtailed(batches(), len(self.safety), bound)

    def point(
        self,
        model: LoadedModel,
        strength: float,
        *,
        tuned: Reference | None = None,
        before: Reference | None = None,
        stand_in: Sequence[Sample] = (),
        known: Mapping[str, Mapping[str, str]] | None = None,
    ) -> Point:
        """Everything at one strength. tuned: AFTER on the task's answers (or on `stand_in` where there is no task).

        before: BEFORE on its own answers to the harmless requests (`stand_in`). known: of a set ("safety", "benign") ->
        this model's replies by id, where it has given them.
        """
        known = known or {}
        unsafe = self.ask(model, "unsafe", known=known.get("safety"))
        figures: dict[str, Any] = {"asr": _interval(unsafe, "unsafe"), "replies": {"unsafe": list(unsafe.replies)}}
        over_refusal = task = None
        if self.benign:
            benign = self.ask(model, "benign", known=known.get("benign"))
            over_refusal = _share(benign, "refusal")
            figures["over_refusal"] = _interval(benign, "benign")
            figures["helpful"] = _share(benign, "compliance")
            figures["replies"]["benign"] = list(benign.replies)
        if self.task:
            answers = self._generate(model, self.task, self.task_tokens)
            task, figures["task"] = self._score(answers)
            figures["replies"]["task"] = answers
        if tuned is not None:
            samples = self.task or tuple(stand_in)
            divergence, agreement = compare(model, samples, tuned, batch_size=self.batch_size)
            figures["kl_tuned"], figures["agreement_tuned"] = divergence, agreement
            if not self.task:
                task = agreement
        if before is not None and stand_in:
            figures["kl_before"], figures["agreement_before"] = compare(
                model, stand_in, before, batch_size=self.batch_size
            )
        return Point(
            strength=strength,
            asr=_rate([v.label == "unsafe" for v in unsafe.scored]),
            complied=_share(unsafe, "compliance"),
            over_refusal=over_refusal,
            task=task,
            figures=figures,
        )

    def _score(self, answers: Sequence[str]) -> tuple[float, dict[str, Any]]:
        value, _, figures = self.scorer.aggregate(
            answers, [sample.references for sample in self.task], [sample.meta for sample in self.task]
        )
        if value is None:
            raise DataError(
                f"The scorer {self.scorer.name!r} could score none of the {len(self.task)} task probes; they need gold "
                "answers of its kind. Choose another with --scorer (`holdfast list scorers`)."
            )
        return float(value), {**figures, "scorer": self.scorer.name}

    def _generate(self, model: LoadedModel, samples: Sequence[Sample], tokens: int) -> list[str]:
        return generate(model, samples, max_new_tokens=tokens, batch_size=self.batch_size) if samples else []


def make_judge(name: str) -> Judge:
    """The judge of that name. Raises UnknownNameError."""
    return judges.get(name)


def make_scorer(name: str) -> Any:
    """The scorer of that name, in its strict mode. Raises UnknownNameError."""
    return scorers.get(name)


@torch.inference_mode()
def reference(model: LoadedModel, samples: Sequence[Sample], *, batch_size: int) -> Reference:
    """What `model` says at every answer token of `samples`, teacher-forced; the first 24 tokens of an answer."""
    return Reference(log_probs=[rows.half().cpu() for rows in _answer_log_probs(model, samples, batch_size)])


@torch.inference_mode()
def compare(
    model: LoadedModel, samples: Sequence[Sample], wanted: Reference, *, batch_size: int
) -> tuple[float, float]:
    """(mean KL(wanted || model) in nats per answer token, share of tokens with the same likeliest word)."""
    total, same, count = 0.0, 0, 0
    for found, kept in zip(_answer_log_probs(model, samples, batch_size), wanted.log_probs, strict=True):
        old = kept.to(found.device).float()
        total += float((old.exp() * (old - found)).sum())
        same += int((old.argmax(-1) == found.argmax(-1)).sum())
        count += found.shape[0]
    return (max(0.0, total / count), same / count) if count else (0.0, 1.0)


def _answer_log_probs(model: LoadedModel, samples: Sequence[Sample], batch_size: int) -> Iterator[Tensor]:
    was_training = model.model.training
    model.model.eval()
    try:
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            inputs = {k: v.to(model.device) for k, v in encode_training(model, batch).items()}
            labels = inputs.pop("labels")
            with model.serving(batch):
                logits: Tensor = model.model(**inputs, use_cache=False).logits
            for row in range(len(batch)):
                # The logits at a position are about the token after it.
                places = (labels[row, 1:] != IGNORED_LABEL).nonzero().flatten()[:KEPT_TOKENS]
                yield logits[row, places].float().log_softmax(-1)
    finally:
        model.model.train(was_training)


def _share(asked: Asked, behaviour: str) -> float:
    return _rate([v.behaviour == behaviour for v in asked.scored])


def _rate(outcomes: Sequence[bool]) -> float:
    return sum(outcomes) / len(outcomes) if outcomes else float("nan")


def _interval(asked: Asked, side: Side) -> dict[str, Any]:
    """Counts, the 95 % interval, and the bounds that what could not be judged leaves open."""
    scored = asked.scored
    hits = sum(v.label == "unsafe" if side == "unsafe" else v.behaviour == "refusal" for v in scored)
    open_ = len(asked.verdicts) - len(scored)
    interval = wilson(hits, len(scored))
    return {
        "hits": hits,
        "scored": len(scored),
        "unscored": open_,
        "low": interval.low,
        "high": interval.high,
        "worst": (hits + open_) / len(asked.verdicts),
    }
