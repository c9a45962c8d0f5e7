"""Safety calibration data made by the aligned model itself: its own answers, kept where a judge calls them safe."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from holdfast.data.types import Sample, Turn
from holdfast.errors import ConfigError, DataError
from holdfast.files import sha256
from holdfast.models.generate import generate
from holdfast.models.loaded import LoadedModel

# (requests, replies) -> which replies are safe answers to learn from.
IsSafe = Callable[[Sequence[Sample], Sequence[str]], Sequence[bool]]


@dataclass(frozen=True, kw_only=True)
class OwnAnswers:
    """samples: requests with the model's own safe answers, in the order of the prompts.

    asked, kept: per category. short: categories that ended with fewer than wanted.
    """

    samples: tuple[Sample, ...]
    asked: dict[str, int]
    kept: dict[str, int]
    short: tuple[str, ...]


def own_safe_answers(
    loaded: LoadedModel,
    prompts: Sequence[Sample],
    is_safe: IsSafe,
    *,
    per_category: int = 2,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    category_key: str = "category",
    test_sets: Iterable[tuple[str, Sequence[Sample]]] = (),
    allow_short: bool = False,
    progress: Callable[..., None] | None = None,
) -> OwnAnswers:
    """Ask the model harmful requests, greedily, and keep the first `per_category` safe answers of each risk category.

    Prompts are asked in their order, a few per category at a time, until every category is full or used up: the same
    prompts give the same samples. Prompts without the category key form one category.

    Args:
        is_safe: the judge's word on each reply; empty replies are never kept.
        test_sets: (name, samples) of every set that the result will be judged on.
        allow_short: return what there is where a category has too few safe answers, instead of raising.

    Raises: DataError: no prompts, a prompt that is in a test set (by id, or by its text and images), a category with
        too few safe answers. ConfigError: per_category below 1.
    """
    if per_category < 1:
        raise ConfigError(f"per_category is {per_category}; expected at least 1.")
    if not prompts:
        raise DataError("There is no prompt to make safety calibration data from; expected at least one.")
    refuse_overlap(prompts, test_sets)
    categories: dict[str, list[tuple[int, Sample]]] = {}
    for place, prompt in enumerate(prompts):
        categories.setdefault(str(prompt.meta.get(category_key, "")), []).append((place, prompt))
    kept: dict[str, list[tuple[int, Sample]]] = {category: [] for category in categories}
    asked = dict.fromkeys(categories, 0)
    while True:
        round_: list[tuple[str, int, Sample]] = []
        for category, waiting in categories.items():
            missing = per_category - len(kept[category])
            take = waiting[asked[category] : asked[category] + max(0, missing)]
            asked[category] += len(take)
            round_ += [(category, place, prompt) for place, prompt in take]
        if not round_:
            break
        requests = [replace(prompt, turns=prompt.request) for _, _, prompt in round_]
        replies = generate(loaded, requests, max_new_tokens=max_new_tokens, batch_size=batch_size)
        verdicts = is_safe(requests, replies)
        for (category, place, prompt), reply, safe in zip(round_, replies, verdicts, strict=True):
            if safe and reply.strip():
                answered = (*prompt.request, Turn(role="assistant", text=reply))
                kept[category].append((place, replace(prompt, turns=answered, references=(reply,))))
        if progress is not None:
            progress("calibrate-data", done=sum(map(len, kept.values())), total=per_category * len(categories))
    short = tuple(c for c in categories if len(kept[c]) < per_category)
    if short and not allow_short:
        figures = "; ".join(f"{c or 'all prompts'}: {len(kept[c])} of {per_category}, asked {asked[c]}" for c in short)
        raise DataError(
            f"{loaded.name} gave too few safe answers ({figures}). Add prompts, ask for fewer per category, or check "
            "that this is the aligned model and that the judge knows its refusals."
        )
    samples = sorted((item for group in kept.values() for item in group), key=lambda item: item[0])
    return OwnAnswers(
        samples=tuple(s for _, s in samples),
        asked=asked,
        kept={c: len(group) for c, group in kept.items()},
        short=short,
    )


def own_helpful_answers(
    loaded: LoadedModel,
    prompts: Sequence[Sample],
    is_refusal: IsSafe,
    *,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    test_sets: Iterable[tuple[str, Sequence[Sample]]] = (),
    progress: Callable[..., None] | None = None,
) -> OwnAnswers:
    """Ask the model benign requests, greedily, and keep answers that do not refuse: what an edit must leave helpful.

    Every prompt is asked. is_refusal: the judge's word on each reply; empty replies are never kept.

    Raises: DataError: no prompts, a prompt that is in a test set, or more than half of them refused: they are forbidden
        requests, or the model refuses too much to be held to what it does.
    """
    if not prompts:
        raise DataError("There is no benign prompt to make calibration data from; expected at least one.")
    refuse_overlap(prompts, test_sets)
    requests = [replace(prompt, turns=prompt.request) for prompt in prompts]
    replies = generate(loaded, requests, max_new_tokens=max_new_tokens, batch_size=batch_size)
    refused = is_refusal(requests, replies)
    kept = [
        replace(prompt, turns=(*prompt.request, Turn(role="assistant", text=reply)), references=(reply,))
        for prompt, reply, no in zip(prompts, replies, refused, strict=True)
        if not no and reply.strip()
    ]
    if progress is not None:
        progress("calibrate-data", done=len(kept), total=len(prompts))
    if 2 * len(kept) < len(prompts):
        first = next(prompt.id for prompt, no in zip(prompts, refused, strict=True) if no or len(kept) == 0)
        raise DataError(
            f"{loaded.name} helped with {len(kept)} of {len(prompts)} benign calibration prompts ({first!r} is the "
            "first that it did not answer). Give requests that should be answered; are these the forbidden ones?"
        )
    return OwnAnswers(samples=tuple(kept), asked={"benign": len(prompts)}, kept={"benign": len(kept)}, short=())


def refuse_overlap(prompts: Sequence[Sample], test_sets: Iterable[tuple[str, Sequence[Sample]]]) -> None:
    """Raises DataError where a prompt is part of a test set, by its id or by its request's text and images.

    An id that is a number may be a place in a file: two files have the same ones, and nothing else in common.
    """
    ids = {prompt.id for prompt in prompts if not prompt.id.isdecimal()}
    contents = {_content(prompt): prompt.id for prompt in prompts}
    for name, samples in test_sets:
        common = sorted(ids & {s.id for s in samples})
        same = sorted({contents[c] for s in samples if (c := _content(s)) in contents} - set(common))
        if common or same:
            shown = ", ".join([*common, *same][:5])
            how = "by id" if common else "by text and image"
            raise DataError(
                f"{len(common) + len(same)} calibration prompt(s) are part of the test set {name!r} ({how}): {shown}. "
                "What is calibrated on cannot be tested on; remove them from the prompts."
            )


def _content(sample: Sample) -> str:
    digest = hashlib.sha256(repr([(t.role, t.text.strip()) for t in sample.request]).encode())
    for path in sample.images:
        # A missing image has no content to compare; encoding it says so with the sample's name.
        if Path(path).is_file():
            digest.update(sha256(path).digest())
    return digest.hexdigest()
