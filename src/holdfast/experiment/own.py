"""theta_0's own answers to the calibration prompts of a run: made once, then read from theta_0/."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from holdfast import judges
from holdfast.data.types import Sample, Stream, Turn
from holdfast.errors import unknown_name
from holdfast.experiment.run_config import RunConfig
from holdfast.files import write_json
from holdfast.judges.base import finds_refusals
from holdfast.share import current
from holdfast.stream.protocol import Checkpoint

Make = Callable[[Sequence[Sample]], dict[str, Any]]


def with_own_answers(
    stream: Stream, config: RunConfig, theta_0: Checkpoint, folder: Path, *, progress: Callable[..., None]
) -> Stream:
    """The stream with answered calibration samples; the answers lie in `folder`.

    Raises: CalibrationError: theta_0 gives too few. UnknownNameError: a judge that the run does not have.
    """

    def safe(prompts: Sequence[Sample]) -> dict[str, Any]:
        return _safe_answers(prompts, stream, config, theta_0, progress)

    def helpful(prompts: Sequence[Sample]) -> dict[str, Any]:
        return _helpful_answers(prompts, stream, config, theta_0, progress)

    return replace(
        stream,
        safety_calibration=_answered(stream.safety_calibration, folder / "safety_calibration.json", safe),
        benign_calibration=_answered(stream.benign_calibration, folder / "benign_calibration.json", helpful),
    )


def _answered(samples: Sequence[Sample], path: Path, make: Make) -> Sequence[Sample]:
    """`samples`, those without an answer given theta_0's own, or left out where it has none that is kept."""
    unanswered = [sample for sample in samples if sample.answer is None]
    if not unanswered:
        return samples
    current().once(path, lambda: make(unanswered), write_json)
    answers = json.loads(path.read_text(encoding="utf-8"))["answers"]
    answered = [_with_answer(s, answers[s.id]) if s.id in answers else s for s in samples]
    return [s for s in answered if s.answer is not None]


def _with_answer(sample: Sample, answer: str) -> Sample:
    return replace(sample, turns=(*sample.request, Turn(role="assistant", text=answer)), references=(answer,))


def _helpful_answers(
    prompts: Sequence[Sample], stream: Stream, config: RunConfig, theta_0: Checkpoint, progress: Callable[..., None]
) -> dict[str, Any]:
    from holdfast.calibration.own_answers import own_helpful_answers
    from holdfast.models.held import load

    chosen = benign_judge(config)
    made = own_helpful_answers(
        load(theta_0, dtype=config.evaluation.dtype),
        prompts,
        current().told(finds_refusals(judges.get(chosen.name, **chosen.options), side="benign")),
        max_new_tokens=config.benign_calibration.max_new_tokens,
        batch_size=config.evaluation.batch_size,
        test_sets=[(s.name, [*s.unsafe, *s.benign]) for s in stream.safety],
        progress=progress,
    )
    return {
        "judge": chosen.name,
        "asked": made.asked,
        "kept": made.kept,
        "answers": {sample.id: sample.answer for sample in made.samples},
    }


def _safe_answers(
    prompts: Sequence[Sample], stream: Stream, config: RunConfig, theta_0: Checkpoint, progress: Callable[..., None]
) -> dict[str, Any]:
    from holdfast.calibration.own_answers import own_safe_answers
    from holdfast.models.held import load

    chosen, asked = own_judge(config), config.safety_calibration
    made = own_safe_answers(
        load(theta_0, dtype=config.evaluation.dtype),
        prompts,
        current().told(finds_refusals(judges.get(chosen.name, **chosen.options))),
        per_category=asked.per_category,
        max_new_tokens=asked.max_new_tokens,
        batch_size=config.evaluation.batch_size,
        test_sets=[(s.name, [*s.unsafe, *s.benign]) for s in stream.safety],
        allow_short=asked.allow_short,
        progress=progress,
    )
    return {
        "judge": chosen.name,
        "asked": made.asked,
        "kept": made.kept,
        "short": list(made.short),
        "answers": {sample.id: sample.answer for sample in made.samples},
    }


def own_judge(config: RunConfig) -> Any:
    """The judge of theta_0's own answers. Raises UnknownNameError: none of the run's has the name."""
    wanted, judges = config.safety_calibration.judge, config.evaluation.judges
    chosen = next((judge for judge in judges if wanted in (None, judge.name)), None)
    if chosen is None:
        raise unknown_name("judge of this run", str(wanted), [judge.name for judge in judges])
    return chosen


def benign_judge(config: RunConfig) -> Any:
    """The judge of theta_0's own benign answers: the one named, else the first that finds refusals by their words.

    Raises: UnknownNameError: none of the run's has the name.
    """
    wanted, judges = config.benign_calibration.judge, config.evaluation.judges
    if wanted is None:
        return next((judge for judge in judges if judge.name.startswith("keyword")), judges[0])
    chosen = next((judge for judge in judges if judge.name == wanted), None)
    if chosen is None:
        raise unknown_name("judge of this run", wanted, [judge.name for judge in judges])
    return chosen
