"""One JSON object -> one Sample: the shapes that the field's instruction files take, and what is refused in them.

Training shape (LLaVA): `{"id", "image", "conversations": [{"from": "human"|"gpt", "value"}]}`; also `"messages"` with
`role` and `content`. Test shape: `{"question_id", "image", "text", "answer"}` and its spellings below. Ids are compared
as strings, since peers mix `7` and `"7"`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from holdfast.data.images import ImageIndex, choose_image_root
from holdfast.data.source_files import inside
from holdfast.data.types import Role, Sample, Turn
from holdfast.errors import DataError

MARK = "<image>"
ID_KEYS = ("question_id", "id", "questionId", "qid", "uid")
IMAGE_KEYS = ("image", "images", "image_path", "img")
PROMPT_KEYS = ("text", "prompt", "question", "instruction", "query")
ANSWER_KEYS = ("answer", "answers", "response", "output", "target", "label", "ground_truth")
TURN_KEYS = ("conversations", "messages")

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}


def first(item: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """The value of the first of `keys` that is there and not None."""
    return next((item[key] for key in keys if item.get(key) is not None), None)


def item_id(item: Mapping[str, Any], index: int, keys: Sequence[str] = ID_KEYS) -> str:
    """The item's id as a string; its position in the file where it has none. A float id such as 7.0 reads as 7."""
    value = first(item, keys)
    if value is None:
        return str(index)
    if isinstance(value, bool | list | dict):
        raise DataError(f"item {index}: id {value!r} is a {type(value).__name__}; expected a string or a number.")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def image_names(item: Mapping[str, Any], keys: Sequence[str] = IMAGE_KEYS) -> tuple[str, ...]:
    """Relative image paths of an item, in order; empty for a text-only item."""
    value = first(item, keys)
    if value is None or value == "":
        return ()
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"image {value!r:.80} is neither a path nor a list of paths")
    return tuple(names)


def answers(value: Any) -> tuple[str, ...]:
    """Gold answers as strings: from a string, a number, a list of them, or VQA's list of `{"answer": ...}`."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, bool | int | float):
        return (str(value),)
    if isinstance(value, list):
        flat = [v.get("answer") if isinstance(v, Mapping) else v for v in value]
        if all(isinstance(v, str | int | float) for v in flat):
            return tuple(str(v) for v in flat)
    raise DataError(f"answer {value!r:.80} is neither a string, a number nor a list of them")


def turns_of(item: Mapping[str, Any]) -> tuple[Turn, ...] | None:
    """The conversation of an item in training shape, or None when it has none."""
    raw = first(item, TURN_KEYS)
    if raw is None:
        return None
    if not isinstance(raw, list) or not raw:
        raise DataError(f"its conversation is {raw!r:.60}; expected a non-empty list of turns")
    turns = []
    for position, turn in enumerate(raw):
        speaker = first(turn, ("from", "role")) if isinstance(turn, Mapping) else None
        text = first(turn, ("value", "content")) if isinstance(turn, Mapping) else None
        role = _ROLES.get(str(speaker).lower())
        if role is None or not isinstance(text, str):
            raise DataError(
                f"turn {position} is {turn!r:.80}; expected {{'from': 'human'|'gpt'|'system', 'value': text}}"
            )
        turns.append(Turn(role=role, text=text))
    return tuple(turns)


def place_marks(turns: tuple[Turn, ...], images: int) -> tuple[Turn, ...]:
    """Check image marks against the number of images; a single mark moves to the front of its turn, then a newline.

    The move is LLaVA's own preprocessing, so a prompt reads the same whether its author wrote the mark first or last.
    """
    marks = sum(turn.text.count(MARK) for turn in turns)
    if marks == 0:
        return turns
    if marks != images:
        raise DataError(f"{marks} {MARK} mark(s) for {images} image(s); expected as many marks as images, or none")
    if marks > 1:
        return turns
    moved = []
    for turn in turns:
        if MARK in turn.text:
            turn = replace(turn, text=f"{MARK}\n{turn.text.replace(MARK, '').strip()}")
        moved.append(turn)
    return tuple(moved)


def to_sample(
    item: Mapping[str, Any],
    index: int,
    image_root: Path,
    *,
    root: Path | None = None,
    index_of_images: ImageIndex | None = None,
    references: Sequence[str] | None = None,
    prompt_suffix: str = "",
    keep_meta: bool = True,
    meta: Mapping[str, Any] | None = None,
) -> Sample:
    """The Sample of one item in training or test shape.

    Args:
        item: the JSON object. index: its position, which names it where it has no id.
        image_root: absolute folder that image paths start from. root: the folder that they may not leave (image_root).
        index_of_images: looks an image up by its base name when it is not at its place.
        references: gold answers that replace the item's own (from a separate annotation file).
        prompt_suffix: appended to the last user turn. keep_meta: carry the item's remaining keys in `meta`.
    Raises DataError without the file's name (the caller knows it).
    """
    name = item_id(item, index)
    images = tuple(
        index_of_images.find(relative)
        if index_of_images
        else inside(root or image_root, relative, start=image_root, what="image")
        for relative in image_names(item)
    )
    used = {*ID_KEYS, *IMAGE_KEYS, *TURN_KEYS}
    turns = turns_of(item)
    if turns is None:
        prompt = first(item, PROMPT_KEYS)
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f"no conversation and no prompt; expected one of the keys {', '.join(PROMPT_KEYS)}")
        used |= {next(key for key in PROMPT_KEYS if item.get(key) is not None), *ANSWER_KEYS}
        gold = answers(first(item, ANSWER_KEYS))
        turns = (Turn(role="user", text=prompt),)
        if gold and references is None:
            turns += (Turn(role="assistant", text=gold[0]),)
    else:
        gold = (turns[-1].text,) if turns[-1].role == "assistant" else answers(first(item, ANSWER_KEYS))
    if not any(turn.role == "user" for turn in turns):
        raise DataError("no turn of the user")
    if prompt_suffix:
        last = max(i for i, turn in enumerate(turns) if turn.role == "user")
        turns = (*turns[:last], replace(turns[last], text=turns[last].text + prompt_suffix), *turns[last + 1 :])
    extra = {key: value for key, value in item.items() if key not in used} if keep_meta else {}
    return Sample(
        id=name,
        turns=place_marks(turns, len(images)),
        images=images,
        references=tuple(references) if references is not None else gold,
        meta={**extra, **(meta or {})},
    )


def to_samples(
    items: Iterable[Mapping[str, Any]],
    *,
    where: Path | str,
    root: Path,
    folders: Sequence[str] = (".",),
    image_search: bool = False,
    each: Callable[[Mapping[str, Any], int], Mapping[str, Any]] | None = None,
    **how: Any,
) -> list[Sample]:
    """Samples of `items` in order, image paths starting from the first of `folders` that holds the first image.

    image_search: find images by base name below that folder where their path leads nowhere. each: further arguments of
    `to_sample` for one item; `how`: for all. Raises DataError that names `where`, the item and its id.
    """
    listed = list(items)
    probe = next((value for item in listed if isinstance(value := first(item, IMAGE_KEYS), str) and value), None)
    try:
        image_root = choose_image_root(root, folders, probe)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    finder = ImageIndex(root, image_root) if image_search else None
    samples = []
    for index, item in enumerate(listed):
        try:
            own = each(item, index) if each else {}
            samples.append(to_sample(item, index, image_root, root=root, index_of_images=finder, **{**how, **own}))
        except DataError as error:
            raise DataError(f"{where}, item {index} (id {first(item, ID_KEYS)!r}): {str(error).rstrip('.')}.") from None
    return samples


def duplicate_ids(samples: Iterable[Sample]) -> dict[str, int]:
    """Ids that occur more than once, with how often."""
    return {name: count for name, count in Counter(sample.id for sample in samples).items() if count > 1}


def refuse_duplicates(samples: Sequence[Sample], where: Path | str) -> None:
    """Raises DataError when two samples share an id: their predictions could not be told apart."""
    double = duplicate_ids(samples)
    if double:
        shown = ", ".join(f"{name!r} ({count} times)" for name, count in list(double.items())[:5])
        raise DataError(
            f"{where}: {len(double)} duplicate id(s): {shown}{', ...' if len(double) > 5 else ''}. "
            "A test id must be unique (7 and '7' are the same id); correct the file, "
            "or set `duplicate_ids: rename` on the task to number them."
        )


def rename_duplicates(samples: Sequence[Sample]) -> list[Sample]:
    """Second and later samples of an id become `id#2`, `id#3`, ...: stable, unique, and readable in a log."""
    taken = {sample.id for sample in samples}
    seen: Counter[str] = Counter()
    unique = []
    for sample in samples:
        seen[sample.id] += 1
        if seen[sample.id] > 1:
            number = seen[sample.id]
            while f"{sample.id}#{number}" in taken:
                number += 1
            taken.add(name := f"{sample.id}#{number}")
            sample = replace(sample, id=name)
        unique.append(sample)
    return unique
