"""What flows out of every reader: samples, tasks, safety sets, streams. No torch, images stay on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from holdfast.errors import DataError

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One message. In a `user` text, `<image>` marks where an image stands; without a mark images come first.

    loss: of an `assistant` turn: whether it is a target of training (else it is shown, and nothing is learned from it).
    """

    role: Role
    text: str
    loss: bool = True

    @property
    def said(self) -> tuple[Any, ...]:
        """What a digest takes of it: role and text, and the rare mark that it is no target."""
        return (self.role, self.text) if self.loss else (self.role, self.text, False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One request with its target or gold answers.

    turns: the conversation. A training sample ends with an `assistant` turn (every assistant turn is a target, unless
        its `loss` is off); a test sample may end with the `user` turn, its gold answers being `references`.
    images: absolute paths, in the order of their marks; read only when used.
    references: every acceptable gold answer, best first; empty when there is none.
    meta: what a scorer or judge of this benchmark needs (options, bbox size, category, ...), plain data only.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[Path, ...] = ()
    references: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def single(
        cls,
        id: str,
        prompt: str,
        answer: str | None = None,
        *,
        images: Sequence[Path] = (),
        references: Sequence[str] | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> Sample:
        """A one-question sample; `references` defaults to `(answer,)`."""
        turns: tuple[Turn, ...] = (Turn(role="user", text=prompt),)
        if answer is not None:
            turns += (Turn(role="assistant", text=answer),)
        gold = tuple(references) if references is not None else (() if answer is None else (answer,))
        return cls(id=id, turns=turns, images=tuple(images), references=gold, meta=dict(meta or {}))

    @property
    def prompt(self) -> str:
        """Text of the last user turn, without image marks. Raises DataError: no user turn."""
        for turn in reversed(self.turns):
            if turn.role == "user":
                return turn.text.replace("<image>", "").strip()
        raise DataError(f"Sample {self.id!r} has no user turn.")

    @property
    def answer(self) -> str | None:
        """The target: text of the last turn when the assistant speaks it, else the first reference, else None."""
        if self.turns and self.turns[-1].role == "assistant":
            return self.turns[-1].text
        return self.references[0] if self.references else None

    @property
    def request(self) -> tuple[Turn, ...]:
        """The turns that the model is shown when it must answer: all but a final assistant turn."""
        return self.turns[:-1] if self.turns and self.turns[-1].role == "assistant" else self.turns


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of a stream. `train` may be empty only where a task is evaluated and never trained."""

    name: str
    train: Sequence[Sample]
    test: Sequence[Sample]
    validation: Sequence[Sample] = ()
    scorer: str = "exact_match"
    scorer_mode: Literal["paper", "strict"] = "strict"
    scorer_options: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int = 64


@dataclass(frozen=True, kw_only=True)
class SafetySet:
    """Requests that must be refused, and benign ones beside them that must not be (over-refusal)."""

    name: str
    unsafe: Sequence[Sample]
    benign: Sequence[Sample] = ()
    max_new_tokens: int = 256


@dataclass(frozen=True, kw_only=True)
class Stream:
    """An ordered list of tasks, the safety sets asked after each, and where its files live."""

    name: str
    tasks: Sequence[Task]
    safety: Sequence[SafetySet] = ()
    root: Path = Path()
    # Own safe answers of theta_0 (made by `holdfast calibrate-data`), or the prompts to make them from.
    safety_calibration: Sequence[Sample] = ()
    # Benign requests with theta_0's own answers, or the prompts alone: what a safety edit must leave helpful.
    benign_calibration: Sequence[Sample] = ()

    def __post_init__(self) -> None:
        for kind, names in (("task", [t.name for t in self.tasks]), ("safety set", [s.name for s in self.safety])):
            double = sorted({n for n in names if names.count(n) > 1})
            if double:
                raise DataError(f"Stream {self.name!r}: {kind} name(s) used twice: {', '.join(double)}.")
        for task in self.tasks:
            if not task.test:
                raise DataError(
                    f"Task {task.name!r}: the test split is empty; every task needs at least one test sample."
                )
