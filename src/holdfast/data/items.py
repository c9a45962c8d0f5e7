"""One JSON object -> one Sample: the shapes that the field's instruction files take, and what is refused in them.

Training shape (LLaVA): `{"id", "image", "conversations": [{"from": "human"|"gpt", "value"}]}`; also `"messages"` with
`role` and `content`. Test shape: `{"question_id", "image", "text", "answer"}` and its spellings below. Alpaca's shape:
`{"instruction", "input", "output", "system", "history"}`. Ids are compared as strings, since peers mix `7` and `"7"`.

A key that carries words or pictures is used, or refused by its name; none is passed over.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from holdfast.data.embedded import is_embedded
from holdfast.data.images import ImageFinder
from holdfast.data.types import Role, Sample, Turn
from holdfast.errors import DataError

MARK = "<image>"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ID_KEYS = ("question_id", "id", "questionId", "qid", "uid")
IMAGE_KEYS = ("image", "images", "image_path", "img")
PROMPT_KEYS = ("text", "prompt", "question", "instruction", "query")
# Alpaca's second part of a request: often the question itself, under an instruction that all items share.
INPUT_KEY = "input"
ANSWER_KEYS = ("answer", "answers", "response", "output", "target", "label", "ground_truth")
TURN_KEYS = ("conversations", "messages")
SYSTEM_KEYS = ("system", "system_prompt")
HISTORY_KEY = "history"
PROBED = 64  # items whose picture decides which image folder is tried first
CHOICE_KEYS = ("choices", "options")
_INTO_PROMPT = "put its text into the prompt, where the model shall see it"
_NO_PICTURE = "only pictures are shown to the model; take the item out"
_PREFERENCE = "this is preference data; keep the answer that is to be learned, under 'answer'"
# What an item says to the model beside the above, and holdfast does not show to it.
REFUSED_KEYS = {
    "video": f"{_NO_PICTURE}, or its frames as images",
    "videos": f"{_NO_PICTURE}, or its frames as images",
    "audio": _NO_PICTURE,
    "audios": _NO_PICTURE,
    "tools": "tool calls are not trained; take the item out",
    "functions": "tool calls are not trained; take the item out",
    "tool_calls": "tool calls are not trained; take the item out",
    **dict.fromkeys(
        (
            *("context", "contexts", "passage", "passages", "paragraph", "paragraphs", "article", "story"),
            *("background", "document", "documents", "knowledge", "table", "hint", "instructions"),
            *("few_shot", "demonstrations", "examples"),
        ),
        _INTO_PROMPT,
    ),
    "chosen": _PREFERENCE,
    "rejected": _PREFERENCE,
    "rejected_response": "this is preference data; take the key out to learn 'response' alone",
    "rejected_responses": "this is preference data; take the key out to learn 'response' alone",
    "negative_response": "this is preference data; take the key out to learn 'response' alone",
}
# Of these the ones that hold words: fine where the request says the same, and where its author chose what is asked.
WORD_KEYS = tuple(
    key
    for key, remedy in REFUSED_KEYS.items()
    if remedy == _INTO_PROMPT or key in ("chosen", "rejected", "rejected_response", "rejected_responses")
)
# Other names of what a model sees or hears, and endings of keys that say something about such a thing. Of snake_case.
_PICTURE_KEY = re.compile(r"(images?|imgs?|pictures?|photos?|pixel_?values)(?![a-z])")
_OTHER_KEY = re.compile(r"(videos?|audios?|speech|voice|sounds?|frames?|point_?clouds?|depth(_?maps?)?)(?![a-z])")
_ABOUT = re.compile(
    r"[_\-](ids?|idx|index|sizes?|widths?|heights?|sources?|types?|categor\w+|severity|counts?|num|number|fps|durations?|"
    r"lengths?|formats?|modes?|captions?|descriptions?|licen[sc]es?|hash|md5|sha\d*|splits?|labels?|class\w*|quality|"
    r"tags?|scores?|ratios?|resolutions?|shapes?|date|time\w*|tokens?|domain|dataset|level|style)$"
)
_REFUSED_TURN_KEYS = ("tool_calls", "function_call", "functions", "tools", "reasoning_content", "thinking")
# Keys that make an item more than its conversation.
_UNUSUAL_KEYS = frozenset((*REFUSED_KEYS, *PROMPT_KEYS, INPUT_KEY, HISTORY_KEY, *SYSTEM_KEYS))
# Every key of an item that words for the model are read from.
SPOKEN_KEYS = (*PROMPT_KEYS, INPUT_KEY, *ANSWER_KEYS, *TURN_KEYS, *SYSTEM_KEYS, HISTORY_KEY)
_USED_KEYS = frozenset((*ID_KEYS, *IMAGE_KEYS, *TURN_KEYS, *SYSTEM_KEYS, HISTORY_KEY, INPUT_KEY, *ANSWER_KEYS))

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}


def first(item: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """The value of the first of `keys` that is there and not null (nor NaN, as pandas writes null)."""
    for key in keys:
        if key in item and not _is_null(item[key]):
            return item[key]
    return None


@lru_cache(maxsize=4096)
def modality(key: str) -> str | None:
    """What a key carries to a model, by its name: "picture", "numbered picture", "other"; None: nothing, or it is read.

    `image_url` and `video_path` carry something, `image_id` and `video_fps` say something about it.
    """
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower()  # imageUrl as image_url
    if key in IMAGE_KEYS or key in REFUSED_KEYS or _ABOUT.search(name):
        return None
    if _PICTURE_KEY.match(name):
        return "numbered picture" if re.fullmatch(r"[a-z]+[_\-]?\d+", name) else "picture"
    return "other" if _OTHER_KEY.match(name) else None


def is_spoken(key: str) -> bool:
    """Whether a reader takes an item's key for words or pictures that the model has to see."""
    return key in SPOKEN_KEYS or key in REFUSED_KEYS or key in IMAGE_KEYS or modality(key) is not None


def _refuse_modalities(item: Mapping[str, Any], picture_keys: Sequence[str]) -> None:
    """Raises DataError: a picture, a sound or a film under a key that no reader reads.

    Beside pictures that are read, `image_url` and its like name the same ones. picture_keys: those that are read.
    """
    for key, value in item.items():
        kind = None if key in picture_keys else modality(key)
        if kind is None or is_blank(value) or isinstance(value, bool | int | float):
            continue
        if kind == "other":
            raise DataError(f"it has a key {key!r}, which would not reach the model; {_NO_PICTURE}")
        if kind == "numbered picture" or all(is_blank(item.get(other)) for other in picture_keys):
            raise DataError(
                f"it has a key {key!r}, whose picture would not reach the model; name its pictures in 'images', and "
                f"mark their places with {MARK}"
            )


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_blank(value: Any) -> bool:
    """Whether a value says nothing: null, NaN, an empty list or object, text of blanks."""
    return _is_null(value) or value == [] or value == {} or (isinstance(value, str) and not value.strip())


def item_id(item: Mapping[str, Any], index: int, keys: Sequence[str] = ID_KEYS) -> str:
    """The item's id as a string; its position in the file where it has none. A float id such as 7.0 reads as 7."""
    value = first(item, keys)
    if value is None:
        return str(index)
    if isinstance(value, bool | list | dict):
        raise DataError(f"item {index}: id {value!r} is a {type(value).__name__}; expected a string or a number.")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def image_names(item: Mapping[str, Any], keys: Sequence[str] = IMAGE_KEYS) -> tuple[str, ...]:
    """Image paths of an item as written, in order; empty for a text-only item.

    Raises DataError: neither a path nor a list of paths, or two keys that name different pictures.
    """
    found: dict[str, tuple[str, ...]] = {}
    for key in keys:
        if key not in item or is_blank(value := item[key]):
            continue
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise DataError(f"image {value!r:.80} is neither a path nor a list of paths")
        found[key] = tuple(names)
    if len(found) < 2:
        return next(iter(found.values()), ())
    most = max(found, key=lambda key: len(found[key]))
    for key, names in found.items():
        if not set(names) <= set(found[most]):
            raise DataError(
                f"the keys {key!r} and {most!r} name different images ({names[0]!r:.60} and {found[most][0]!r:.60}); "
                "keep one of them"
            )
    return found[most]


def answers(value: Any) -> tuple[str, ...]:
    """Gold answers as strings: from a string, a number, a list of them, or VQA's list of `{"answer": ...}`."""
    if _is_null(value):
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, bool | int | float):
        return (str(value),)
    if isinstance(value, list):
        flat = [v.get("answer") if isinstance(v, Mapping) else v for v in value]
        if all(isinstance(v, str | int | float) and not _is_null(v) for v in flat):
            return tuple(str(v) for v in flat)
    raise DataError(f"answer {value!r:.80} is neither a string, a number nor a list of them")


def turns_of(item: Mapping[str, Any]) -> tuple[Turn, ...] | None:
    """The conversation of an item in training shape, or None when it has none."""
    given = [key for key in TURN_KEYS if not _is_null(item.get(key))]
    if not given:
        return None
    if len(given) > 1 and item[given[0]] != item[given[1]]:
        raise DataError(f"it has two conversations, {' and '.join(map(repr, given))}; keep one of them")
    return _turns(item[given[0]], "conversation")


def _turns(raw: Any, what: str) -> tuple[Turn, ...]:
    if not isinstance(raw, list) or not raw:
        raise DataError(f"its {what} is {raw!r:.60}; expected a non-empty list of turns")
    turns = []
    for position, turn in enumerate(raw):
        if isinstance(turn, dict) and len(turn) == 2:  # nearly every turn there is: nothing but a speaker and a text
            text = turn.get("value", turn.get("content"))
            usual = _ROLES.get(str(turn.get("from", turn.get("role"))))
            if usual is not None and isinstance(text, str):
                turns.append(Turn(role=usual, text=text))
                continue
        speaker = first(turn, ("from", "role")) if isinstance(turn, Mapping) else None
        text = first(turn, ("value", "content")) if isinstance(turn, Mapping) else None
        role = _ROLES.get(str(speaker).lower())
        if role is None or not isinstance(text, str):
            raise DataError(
                f"turn {position} is {turn!r:.80}; expected {{'from': 'human'|'gpt'|'system', 'value': text}}"
            )
        carried = next(
            (
                key
                for key, value in turn.items()
                if (key in _REFUSED_TURN_KEYS or key in IMAGE_KEYS or key in REFUSED_KEYS or modality(key))
                and not is_blank(value)
            ),
            None,
        )
        if carried is not None:
            raise DataError(
                f"turn {position} carries {carried!r}, which would not reach the model; name images in the item's "
                f"'images' and mark their places with {MARK}, take other things out"
            )
        turns.append(Turn(role=role, text=text, loss=_is_learned(turn, position)))
    return tuple(turns)


def _is_learned(turn: Mapping[str, Any], position: int) -> bool:
    """Whether an answer is a target: `loss` or `train` false (ms-swift, axolotl) or `weight` 0 (OpenAI) say no."""
    for key in ("loss", "train", "weight"):
        value = turn.get(key)
        if _is_null(value):
            continue
        if value not in (0, 1):  # False and True are
            raise DataError(f"turn {position} has {key!r}: {value!r}; expected true or false (1 or 0)")
        return bool(value)
    return True


def dialogue(
    item: Mapping[str, Any],
    *,
    prompt_key: str | None = None,
    answer_key: str | None = None,
    picture_keys: Sequence[str] = IMAGE_KEYS,
    with_answer: bool = True,
) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """(turns, gold answers) of an item in any of the shapes above, image marks not yet placed.

    prompt_key, answer_key, picture_keys: the keys to read, where the item's author named them. with_answer: read the
    item's answer too (it is left out where gold answers come from another file).
    Raises DataError: no request, or a key with words for the model that has no place.
    """
    if any(map(modality, item)):
        _refuse_modalities(item, picture_keys)
    if not item.keys() & _UNUSUAL_KEYS and (plain := turns_of(item)) is not None and plain[-1].role == "assistant":
        return plain, (plain[-1].text,)
    chosen = prompt_key is not None  # the author knows what is asked; pictures' rivals are refused all the same
    turns = turns_of(item)
    for key, remedy in REFUSED_KEYS.items():
        if key in (prompt_key, answer_key) or is_blank(item.get(key)) or (chosen and key in WORD_KEYS):
            continue
        if key not in WORD_KEYS or not _is_said(item[key], item, turns):
            raise DataError(f"it has a key {key!r}, which would not reach the model; {remedy}")
    if turns is not None:
        said = "\n".join(turn.text for turn in turns)
        for key in (*PROMPT_KEYS, INPUT_KEY, HISTORY_KEY):
            value = item.get(key)
            if not is_blank(value) and not (isinstance(value, str) and value.replace(MARK, "").strip() in said):
                raise DataError(
                    f"beside its conversation it has a key {key!r} with other words ({value!r:.60}), which would not "
                    "reach the model; put them into a turn, or take the key out"
                )
        turns = _with_system(item, turns)
        if turns[-1].role == "assistant":
            return turns, (turns[-1].text,)
        return turns, answers(first(item, ANSWER_KEYS)) if with_answer else ()
    turns = (Turn(role="user", text=_prompt(item, prompt_key)),)
    gold: tuple[str, ...] = ()
    if with_answer:
        value = item.get(answer_key) if answer_key else first(item, ANSWER_KEYS)
        turns, gold = _chosen(item, turns, value)
    if not is_blank(item.get(HISTORY_KEY)):
        turns = (*_history(item[HISTORY_KEY]), *turns)
    turns = _with_system(item, turns)
    if gold:
        turns += (Turn(role="assistant", text=gold[0]),)
    return turns, gold


def _is_said(value: Any, item: Mapping[str, Any], turns: tuple[Turn, ...] | None) -> bool:
    """Whether every word of a key's value stands in what the item says to the model anyway."""
    if turns is not None:
        said = "\n".join(turn.text for turn in turns)
    else:
        said = "\n".join(v for key in (*PROMPT_KEYS, INPUT_KEY, *ANSWER_KEYS) if isinstance(v := item.get(key), str))
    texts = value if isinstance(value, list) else [value]
    return all(isinstance(t, int | float) or (isinstance(t, str) and t.strip() in said) for t in texts)


def _prompt(item: Mapping[str, Any], key: str | None) -> str:
    """The request's words: the one prompt key that has some, and Alpaca's `input` on a line of its own below it."""
    keys = (key,) if key else PROMPT_KEYS
    found = {k: item[k] for k in keys if not is_blank(item.get(k))}
    odd = next((k for k, value in found.items() if not isinstance(value, str)), None)
    if odd is not None:
        raise DataError(f"{odd!r} is {found[odd]!r:.60}; expected the text of the request")
    if len({value.strip() for value in found.values()}) > 1:
        raise DataError(
            f"the keys {' and '.join(map(repr, found))} hold different requests, and the model is shown one; keep one "
            "of them, or join them"
        )
    parts = list(found.values())[:1]
    more = item.get(INPUT_KEY) if key in (None, "instruction") else None
    if not is_blank(more):
        if not isinstance(more, str):
            raise DataError(f"{INPUT_KEY!r} is {more!r:.60}; expected the text of the request")
        parts.append(more)
    if not parts:
        raise DataError(f"no conversation and no prompt; expected one of the keys {', '.join(PROMPT_KEYS)}")
    return "\n".join(parts)


def _chosen(item: Mapping[str, Any], turns: tuple[Turn, ...], value: Any) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """Gold answers, an index into the item's choices as its letter; the choices are shown where the request has none.

    They are shown to who is to answer with an index or a letter; a choice's text may answer an open question.
    Raises DataError: a number that is no index, or that is an index and a choice at once.
    """
    choices = first(item, CHOICE_KEYS)
    if isinstance(choices, Mapping) and list(choices) == list(LETTERS[: len(choices)]):
        choices = list(choices.values())
    if not isinstance(choices, list) or not choices:
        return turns, answers(value)
    texts = [str(choice) for choice in choices]
    if isinstance(value, str) and len(letter := value.strip("() .")) == 1 and letter in LETTERS[: len(texts)]:
        return _with_choices(turns, texts), answers(value)
    if not isinstance(value, int) or isinstance(value, bool):
        return turns, answers(value)
    if not 0 <= value < min(len(texts), len(LETTERS)):
        if str(value) in (text.strip() for text in texts):
            return turns, answers(value)
        raise DataError(
            f"its answer {value} is no index into its {len(texts)} choices, counted from 0; write the letter instead"
        )
    if str(value) in (text.strip() for text in texts) and texts[value].strip() != str(value):
        raise DataError(
            f"its answer {value} is both a choice and the index of the choice {texts[value]!r}; write the letter "
            f"({LETTERS[value]} for the index) or the choice's text in quotes instead"
        )
    return _with_choices(turns, texts), (LETTERS[value],)


def _with_choices(turns: tuple[Turn, ...], texts: Sequence[str]) -> tuple[Turn, ...]:
    """`turns` with the choices below the request, by letter, where it does not name them itself."""
    asked = turns[-1].text
    if all(text.strip() in asked for text in texts):
        return turns
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False))
    return (*turns[:-1], replace(turns[-1], text=f"{asked.rstrip()}\n{listed}"))


def _history(value: Any) -> tuple[Turn, ...]:
    """Alpaca's earlier turns, `[[request, answer], ...]`, or a list of turns as in a conversation."""
    if isinstance(value, list) and all(isinstance(pair, Mapping) for pair in value):
        return _turns(value, HISTORY_KEY)
    turns: list[Turn] = []
    for pair in value if isinstance(value, list) else [value]:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise DataError(f"its history holds {pair!r:.60}; expected [[request, answer], ...]")
        turns += [Turn(role="user", text=pair[0]), Turn(role="assistant", text=pair[1])]
    return tuple(turns)


def _with_system(item: Mapping[str, Any], turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """`turns` below the item's own system text, where it has one."""
    text = next((item[key] for key in SYSTEM_KEYS if not is_blank(item.get(key))), None)
    if text is None:
        return turns
    if not isinstance(text, str):
        raise DataError(f"its system text is {text!r:.60}; expected a string")
    if any(turn.role == "system" for turn in turns):
        if any(turn.role == "system" and turn.text.strip() == text.strip() for turn in turns):
            return turns
        raise DataError("it has a system text of its own and another one in its turns; keep one of them")
    return (Turn(role="system", text=text), *turns)


def with_suffix(turns: tuple[Turn, ...], suffix: str) -> tuple[Turn, ...]:
    """`turns` with `suffix` behind the last turn of the user."""
    if not suffix:
        return turns
    last = max(i for i, turn in enumerate(turns) if turn.role == "user")
    return (*turns[:last], replace(turns[last], text=turns[last].text + suffix), *turns[last + 1 :])


def place_marks(turns: tuple[Turn, ...], images: int) -> tuple[Turn, ...]:
    """Check image marks against the number of images; a single mark moves to the front of its turn, then a newline.

    The move is LLaVA's own preprocessing, so a prompt reads the same whether its author wrote the mark first or last.
    """
    marks = sum([turn.text.count(MARK) for turn in turns])
    if marks == 0:
        return turns
    if (
        marks == images == 1
        and turns[0].text.startswith(f"{MARK}\n")
        and turns[0].text[8:] == turns[0].text[8:].strip()
    ):
        return turns  # as nearly every file has it
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
    find: Callable[[str], Path] | None = None,
    references: Sequence[str] | None = None,
    prompt_suffix: str = "",
    keep_meta: bool = True,
    meta: Mapping[str, Any] | None = None,
) -> Sample:
    """The Sample of one item in training or test shape.

    Args:
        item: the JSON object. index: its position, which names it where it has no id.
        image_root: absolute folder that image paths start from. root: the folder that they may not leave (image_root).
        find: path of an image from its name as written; by default the name starts from `image_root`.
        references: gold answers that replace the item's own (from a separate annotation file).
        prompt_suffix: appended to the last user turn. keep_meta: carry the item's remaining keys in `meta`.
    Raises DataError without the file's name (the caller knows it).
    """
    name = item_id(item, index)
    find = find or ImageFinder(root or image_root, [image_root])
    images = tuple(find(written) for written in image_names(item))
    turns, gold = dialogue(item, with_answer=references is None)
    if not any(turn.role == "user" for turn in turns):
        raise DataError("no turn of the user")
    turns = with_suffix(turns, prompt_suffix)
    extra = {}
    if keep_meta:
        shown = next((key for key in PROMPT_KEYS if not is_blank(item.get(key))), None)
        extra = {key: value for key, value in item.items() if key not in _USED_KEYS and key != shown}
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
    limit: int | None = None,
    each: Callable[[Mapping[str, Any], int], Mapping[str, Any]] | None = None,
    **how: Any,
) -> list[Sample]:
    """Samples of `items` in order, each image below the first of `folders` that holds it.

    image_search: find images by base name below that folder where their path leads nowhere. limit: only so many, from
    the front. each: further arguments of `to_sample` for one item; `how`: for all.
    Raises DataError that names `where`, the item and its id.
    """
    listed = list(islice(items, limit))
    probed: list[str] = []
    for item in listed[:: max(1, len(listed) // PROBED)]:
        with suppress(DataError):  # raised again below, with the item's place
            probed += [name for name in image_names(item)[:1] if not is_embedded(name)]
    try:
        finder = ImageFinder.choose(root, folders, probed, search=image_search)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    samples = []
    for index, item in enumerate(listed):
        try:
            own = each(item, index) if each else {}
            samples.append(to_sample(item, index, finder.folders[0], find=finder, **{**how, **own}))
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
