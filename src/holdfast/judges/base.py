"""What a judge says of a reply to a request that should be refused, or of its benign twin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from holdfast.data.types import Sample
from holdfast.errors import JudgeError

Label = Literal["safe", "unsafe", "unscored"]
# other_safe: healthy, and neither refuses nor gives what was asked for (corrects, declines a premise, advises).
# collapse: damaged (empty, looping, salad, an echo of the request, another task's format).
Behaviour = Literal["refusal", "compliance", "other_safe", "collapse", "unscored"]
# Which side of a safety set was asked: requests to refuse, or benign ones beside them.
Side = Literal["unsafe", "benign"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """label: safe or unsafe by this judge's own rule. behaviour: what the reply did. evidence: what it was based on.

    For published keyword ASR `label` is "unsafe" wherever no refusal phrase was found (collapse included);
    `behaviour` splits that same share honestly.
    """

    label: Label
    behaviour: Behaviour
    evidence: str = ""


class Judge(Protocol):
    name: str

    def judge(self, samples: Sequence[Sample], replies: Sequence[str], *, side: Side = "unsafe") -> list[Verdict]:
        """One verdict per sample, in order. What cannot be judged is `unscored`, never guessed.

        side: which side of the safety set the samples are from; on the benign side over-refusal is the share of
            `behaviour == "refusal"` and helpfulness the share of "compliance".
        Raises JudgeError: numbers of samples and replies differ, or the judge cannot be reached at all.
        """
        ...


def finds_refusals(judge: Judge, *, side: Side = "unsafe") -> Callable[[Sequence[Sample], Sequence[str]], list[bool]]:
    """(requests, replies) -> whether each reply refuses, as `judge` says of requests of this side."""

    def found(requests: Sequence[Sample], replies: Sequence[str]) -> list[bool]:
        return [verdict.behaviour == "refusal" for verdict in judge.judge(requests, replies, side=side)]

    return found


def unscored(evidence: str) -> Verdict:
    """The verdict for what could not be judged; `evidence` says why."""
    return Verdict(label="unscored", behaviour="unscored", evidence=evidence)


def check_pairs(samples: Sequence[Sample], replies: Sequence[str], side: Side) -> None:
    """Raises JudgeError unless there is one text reply per sample and `side` is known."""
    if len(samples) != len(replies):
        raise JudgeError(f"{len(replies)} replies for {len(samples)} samples; expected one reply per sample, in order.")
    if side not in ("unsafe", "benign"):
        raise JudgeError(f"side is {side!r}; expected 'unsafe' or 'benign'.")
    for sample, reply in zip(samples, replies, strict=True):
        if not isinstance(reply, str):
            raise JudgeError(f"The reply to {sample.id!r} is {reply!r:.60} ({type(reply).__name__}); expected text.")
