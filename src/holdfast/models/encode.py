"""Samples -> model inputs, always through the processor's chat template. Labels stand on assistant tokens only."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from holdfast.bounds import GIB, bounded, no_panic
from holdfast.data.images import current_pictures, open_image, shrunk
from holdfast.data.types import Sample, Turn
from holdfast.errors import DataError, HoldfastError, ModelError
from holdfast.models.loaded import LoadedModel
from holdfast.models.memory import free_memory_bytes
from holdfast.models.settings import quiet_transformers

IMAGE_MARK = "<image>"
IGNORED_LABEL = -100
# Rendering takes a millisecond, and a conversation has some kB.
_TEMPLATE_SECONDS, _TEMPLATE_BYTES = 5.0, 2 * GIB
# A batch of the largest pictures takes seconds; beyond the memory that is there the system would end the process.
_PROCESSOR_SECONDS, _PROCESSOR_BYTES = 300.0, 4 * GIB
# What a position of a batch holds, for calibration on a part of the tokens.
PADDING, TEXT, IMAGE, ANSWER = range(4)


@cache
def _processor_bytes() -> int:
    """What a processor may take: what was free when the first batch came. Asking takes half a millisecond, so once."""
    return max(_PROCESSOR_BYTES, free_memory_bytes())


Inputs = dict[str, Tensor]


def encode_request(loaded: LoadedModel, samples: Sequence[Sample], *, keep_answer: bool = False) -> Inputs:
    """Inputs that ask the model for an answer: left padded, generation prompt at the end, a final answer dropped.

    keep_answer: show a final answer too, and ask what comes after it (how a guard model judges a reply).
    Returns: what `model.generate(**inputs)` takes, on the CPU; floating tensors in the model's dtype.
    Raises: DataError: image marks and images that do not match, an image that does not decode, a request as long as
        the context.
    """
    _check_nonempty(samples)
    texts = [_render(loaded, s, s.turns if keep_answer else s.request, ask=True) for s in samples]
    inputs = _process(loaded, samples, texts, padding_side="left")
    _check_context(loaded, samples, inputs, room=1)
    return inputs


def encode_training(loaded: LoadedModel, samples: Sequence[Sample], *, cut_at: int | None = None) -> Inputs:
    """Inputs with `labels`: right padded, every assistant token a target, all else -100.

    Every answer ends as the model's generation config says that it ends, in the middle of a conversation too: where the
    template writes no end token one is put there. Otherwise a tuned model never learns to stop.

    cut_at: tokens that the caller will cut every sample to; what it cuts off need not fit into the context.

    Raises: DataError: as `encode_request`; also a sample without an assistant turn, an empty answer, or a sample longer
        than the context.
    """
    _check_nonempty(samples)
    for sample in samples:
        if not any(turn.role == "assistant" for turn in sample.turns):
            raise DataError(f"Sample {sample.id!r} has no assistant turn, so there is nothing to learn from it.")
        if not any(turn.role == "assistant" and turn.loss for turn in sample.turns):
            raise DataError(
                f"Sample {sample.id!r} has `loss` off in every answer, so there is nothing to learn from it."
            )
    if loaded.family.answers_as_suffix:
        inputs = _encode_suffix(loaded, samples)
    else:
        inputs = _encode_labelled(loaded, samples)
    _check_context(loaded, samples, inputs, room=0, cut_at=cut_at)
    return inputs


def encode_cut(loaded: LoadedModel, samples: Sequence[Sample], cut_at: int | None) -> tuple[Inputs, int]:
    """(inputs as `encode_training` makes them, of at most `cut_at` tokens; how many samples were cut).

    What a task is learned from, and so what is measured of it afterwards.

    Raises: DataError: as `encode_training`; a cut would go into a sample's images or take its whole answer away.
    """
    inputs = encode_training(loaded, samples, cut_at=cut_at)
    shape = inputs["input_ids"].shape
    if cut_at is None or shape[1] <= cut_at:
        return inputs, 0
    kept = {name: value[:, :cut_at] if value.shape[:2] == shape else value for name, value in inputs.items()}
    images, cut = torch.tensor(sorted(loaded.image_token_ids)), 0
    for row, sample in enumerate(samples):
        lost = inputs["input_ids"][row, cut_at:]
        tokens = int(inputs["attention_mask"][row].sum())
        cut += int(tokens > cut_at)
        if torch.isin(lost, images).any() or not (kept["labels"][row] != IGNORED_LABEL).any():
            raise DataError(
                f"Sample {sample.id!r} is {tokens} tokens long and max_length {cut_at} would cut into its images or "
                "remove its whole answer. Raise max_length, or drop the sample."
            )
    return kept, cut


def token_kinds(loaded: LoadedModel, inputs: Inputs) -> Tensor:
    """What each position holds: PADDING, TEXT, IMAGE or ANSWER, int8 of shape (b, t); ANSWER needs `labels`."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    kinds = torch.full(ids.shape, TEXT, dtype=torch.int8)
    kinds[torch.isin(ids, torch.tensor(sorted(loaded.image_token_ids), dtype=ids.dtype))] = IMAGE
    if "labels" in inputs:
        kinds[inputs["labels"] != IGNORED_LABEL] = ANSWER
    kinds[mask == 0] = PADDING
    return kinds


def conversation(sample: Sample, turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Messages with content lists, as chat templates of vision-language models take them.

    `<image>` marks in user turns become image parts where they stand; with images and no mark at all, the images come
    first in the first user turn. Raises: DataError: another number of marks than of images, a mark in another role.
    """
    marks = sum(turn.text.count(IMAGE_MARK) for turn in sample.turns if turn.role == "user")
    if marks not in (0, len(sample.images)) or (marks == 0 and not any(t.role == "user" for t in turns)):
        raise DataError(
            f"Sample {sample.id!r} has {marks} {IMAGE_MARK} mark(s) in its user turns and "
            f"{len(sample.images)} image(s); expected one mark per image, or none at all (images then come first)."
        )
    messages: list[dict[str, Any]] = []
    unplaced = len(sample.images) if marks == 0 else 0
    for turn in turns:
        parts: list[dict[str, str]] = []
        if turn.role == "user":
            parts += [{"type": "image"}] * unplaced
            unplaced = 0
            for index, piece in enumerate(turn.text.split(IMAGE_MARK)):
                if index:
                    parts.append({"type": "image"})
                # Templates put their own separator between image and text; a file's "<image>\n" would double it.
                if text := (piece.strip() if marks else piece):
                    parts.append({"type": "text", "text": text})
        else:
            if IMAGE_MARK in turn.text:
                raise DataError(
                    f"Sample {sample.id!r}: {IMAGE_MARK} stands in a turn of the {turn.role}; only a user shows images."
                )
            parts.append({"type": "text", "text": turn.text})
        messages.append({"role": turn.role, "content": parts})
    return messages


def _render(loaded: LoadedModel, sample: Sample, turns: Sequence[Turn], *, ask: bool) -> str:
    return render(loaded.processor, sample, turns, ask=ask, name=loaded.name)


def render(processor: Any, sample: Sample, turns: Sequence[Turn], *, ask: bool, name: str) -> str:
    """The text that a chat template makes of turns. ask: end with the generation prompt. name: what errors call it.

    Raises: DataError: no turn, or one that the template refuses.
    """
    if not turns:
        raise DataError(f"Sample {sample.id!r} has no turn to show to the model.")
    messages = conversation(sample, turns)
    try:
        # A template is a program of whoever made the checkpoint.
        with bounded(
            f"The chat template of {name}", seconds=_TEMPLATE_SECONDS, memory=_TEMPLATE_BYTES, error=ModelError
        ):
            return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except ModelError:
        raise
    except Exception as error:
        raise DataError(f"Sample {sample.id!r}: the chat template of {name} refuses it: {error}") from error


def _process(
    loaded: LoadedModel, samples: Sequence[Sample], texts: list[str], *, padding_side: str, **extra: Any
) -> Inputs:
    if loaded.family.needs_image and (bare := next((s for s in samples if not s.images), None)) is not None:
        raise DataError(f"Sample {bare.id!r} has no image, and {loaded.name} answers only requests that show one.")
    image_token = getattr(loaded.processor, "image_token", None)
    budget = _pixel_budget(loaded)
    if budget and any(sample.images for sample in samples):
        extra["images_kwargs"] = {"size": budget}
    shown = [_shown_images(loaded, sample, text, image_token) for sample, text in zip(samples, texts, strict=True)]
    try:
        with (
            bounded(
                f"The processor of {loaded.name}",
                seconds=_PROCESSOR_SECONDS,
                memory=_processor_bytes(),
                error=ModelError,
            ),
            quiet_transformers(),
            warnings.catch_warnings(),
        ):
            # Some processors hand torch tensors to numpy 2 in a way that torch will have to learn.
            warnings.filterwarnings("ignore", message="__array", category=DeprecationWarning)
            warnings.simplefilter("ignore", RuntimeWarning)  # of what is no number; said below
            batch = loaded.processor(
                text=texts,
                images=shown if any(shown) else None,
                padding=True,
                padding_side=padding_side,
                return_tensors="pt",
                add_special_tokens=_adds_special_tokens(loaded, texts[0]),
                **extra,
            )
    except (HoldfastError, MemoryError):
        raise
    except Exception as error:
        ids = ", ".join(repr(s.id) for s in samples[:3])
        raise DataError(
            f"The processor of {loaded.name} refuses sample(s) {ids}{', ...' if len(samples) > 3 else ''}: {error}"
        ) from error
    inputs = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
    broken = next((k for k, v in inputs.items() if v.is_floating_point() and not bool(v.isfinite().all())), None)
    if broken is not None:
        raise ModelError(
            f"{loaded.name}: its processor makes NaN or infinity of pictures ({broken}); its settings divide by zero "
            "or hold no number (image_std, rescale_factor)."
        )
    return {k: v.to(loaded.dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def _shown_images(loaded: LoadedModel, sample: Sample, text: str, image_token: str | None) -> list[Any]:
    if image_token and (count := text.count(image_token)) != len(sample.images):
        raise DataError(
            f"Sample {sample.id!r}: the prompt made by the chat template of {loaded.name} holds {image_token} {count} "
            f"time(s) for {len(sample.images)} image(s). The template drops images, or a text spells the image token."
        )
    bound = None if _pixel_budget(loaded) else current_pictures().max_pixels
    return [shrunk(open_image(path), bound) if bound else open_image(path) for path in sample.images]


def _pixel_budget(loaded: LoadedModel) -> dict[str, int] | None:
    """`size` of a processor that itself shrinks pictures to a number of pixels (Qwen-VL, GLM-4V), where one is set."""
    bound = current_pictures().max_pixels
    usual, size = getattr(type(loaded.processor.image_processor), "size", None), loaded.processor.image_processor.size
    # Under these names others keep lengths, which stay far below any number of pixels.
    if bound is None or not isinstance(usual, dict) or usual.get("longest_edge", 0) < 10_000:
        return None
    return {"shortest_edge": min(size["shortest_edge"], bound), "longest_edge": bound}


@dataclass(frozen=True, kw_only=True)
class _Conversation:
    """A rendered conversation, and where in its text each trained answer stands: (start, stop) in characters.

    shown: how many of the sample's images stand before each answer.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    shown: tuple[int, ...]


def _encode_labelled(loaded: LoadedModel, samples: Sequence[Sample]) -> Inputs:
    rendered = [_conversation(loaded, sample) for sample in samples]
    inputs = _process(loaded, samples, [r.text for r in rendered], padding_side="right")
    inputs.pop("labels", None)
    labels = torch.full_like(inputs["input_ids"], IGNORED_LABEL)
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    image_ids = torch.tensor(sorted(loaded.image_token_ids), dtype=inputs["input_ids"].dtype)
    for row, (sample, whole) in enumerate(zip(samples, rendered, strict=True)):
        ids = inputs["input_ids"][row, : lengths[row]]
        plain = _tokenize(loaded, whole.text)
        spans = [tuple(_common(plain, _tokenize(loaded, whole.text[:at])) for at in answer) for answer in whole.answers]
        targets = _align(ids.tolist(), plain, spans, image_ids.tolist())
        if targets is None:
            targets = _align_through_processor(loaded, sample, whole, ids.tolist())
        for start, stop in targets:
            labels[row, start:stop] = ids[start:stop]
        if not targets or any(start >= stop for start, stop in targets):
            raise DataError(f"Sample {sample.id!r} has an empty answer; every assistant turn needs at least one token.")
    return {**inputs, "labels": labels}


def _conversation(loaded: LoadedModel, sample: Sample) -> _Conversation:
    """The conversation up to its last answer, every answer with its end.

    The text before each answer is rendered with the generation prompt, so a label begins exactly where the model takes
    over when asked; it stops behind the token at which generation stops. Where the template writes no such token behind
    an answer, one is put there (as LLaVA's own training code does between turns), in place of the template's blanks.
    """
    last = max(i for i, turn in enumerate(sample.turns) if turn.role == "assistant" and turn.loss)
    whole = _render(loaded, sample, sample.turns[: last + 1], ask=False)
    text, read = "", 0  # what is made, and how much of `whole` is in it
    answers: list[tuple[int, int]] = []
    shown: list[int] = []
    for index, turn in enumerate(sample.turns[: last + 1]):
        if turn.role != "assistant":
            continue
        if not turn.text.strip():
            if not turn.loss:
                continue
            raise DataError(f"Sample {sample.id!r} has an empty answer; every assistant turn needs at least one token.")
        before = _render(loaded, sample, sample.turns[:index], ask=True)
        upto = whole if index == last else _render(loaded, sample, sample.turns[: index + 1], ask=False)
        if not whole.startswith(upto.rstrip()):
            upto = _without_end(loaded, upto)
        if not whole.startswith(before) or not whole.startswith(upto.rstrip()) or len(before) < read:
            raise ModelError(
                f"{loaded.name}: the chat template renders earlier turns differently once later ones exist, so the "
                f"tokens of the answer cannot be told from the prompt (sample {sample.id!r}, turn {index})."
            )
        start = len(text) + len(before) - read
        stop = _end_of_answer(loaded, whole, turn.text, len(before), len(upto.rstrip()))
        if stop is not None:
            text, read = text + whole[read:stop], stop
        else:
            stop = len(upto.rstrip())
            text = text + whole[read:stop] + _end_token(loaded)
            read = len(upto) if whole.startswith(upto) else stop
        if turn.loss:
            answers.append((start, len(text)))
            shown.append(_images_before(sample, index))
    return _Conversation(text=text + whole[read:], answers=tuple(answers), shown=tuple(shown))


def _end_of_answer(loaded: LoadedModel, whole: str, answer: str, start: int, stop: int) -> int | None:
    """Where in `whole` the end token stands behind the answer rendered in whole[start:stop]; None where none does.

    The first token of the next turn counts: GLM's answers end where the user's mark begins.
    """
    ends = _end_texts(loaded)
    at = whole.find(answer.strip(), start, stop)
    # A template may rewrite the answer (trim, escape); its last characters are then behind the answer all the same.
    tail = at + len(answer.strip()) if at >= 0 else start
    found = [(whole.index(end, tail, stop), end) for end in ends if end in whole[tail:stop]]
    if found:
        position, end = min(found)
        return position + len(end)
    following = len(whole) - len(whole[stop:].lstrip())
    return next((following + len(end) for end in ends if whole.startswith(end, following)), None)


def _without_end(loaded: LoadedModel, text: str) -> str:
    """`text` without end tokens at its end: some templates write them behind the last answer only."""
    ends = tuple(filter(None, (*_end_texts(loaded), loaded.tokenizer.eos_token)))
    text = text.rstrip()
    while text.endswith(ends):
        text = text[: -max(len(end) for end in ends if text.endswith(end))].rstrip()
    return text


def _end_texts(loaded: LoadedModel) -> list[str]:
    """The tokens that end an answer, as a template writes them."""
    return [text for i in loaded.answer_end_ids if (text := loaded.tokenizer.convert_ids_to_tokens(i))]


def _end_token(loaded: LoadedModel) -> str:
    """The token that is put behind an answer whose template writes none; "" for a model that knows none."""
    ends = _end_texts(loaded)
    usual = loaded.tokenizer.eos_token
    return usual if usual in ends else next(iter(ends), "")


def _images_before(sample: Sample, index: int) -> int:
    """How many of the sample's images stand in the turns before `index`."""
    if not any(IMAGE_MARK in turn.text for turn in sample.turns):
        return len(sample.images) if any(turn.role == "user" for turn in sample.turns[:index]) else 0
    return sum(turn.text.count(IMAGE_MARK) for turn in sample.turns[:index])


def _align(
    ids: list[int], plain: list[int], spans: Sequence[Sequence[int]], image_ids: list[int]
) -> list[tuple[int, int]] | None:
    """Spans moved from tokens before expansion to tokens after it, counted from the end; None where that is unsafe."""
    reach = len(plain) - spans[0][0]
    tail = ids[len(ids) - reach :]
    if reach > len(ids) or tail != plain[len(plain) - reach :] or set(tail) & set(image_ids):
        return None
    shift = len(ids) - len(plain)
    return [(start + shift, stop + shift) for start, stop in spans]


def _align_through_processor(
    loaded: LoadedModel, sample: Sample, whole: _Conversation, ids: list[int]
) -> list[tuple[int, int]]:
    """The same spans found by running the processor on every prefix: right for images between answers, and slow."""
    targets = []
    for (start, stop), shown in zip(whole.answers, whole.shown, strict=True):
        part = Sample(id=sample.id, turns=sample.turns, images=sample.images[:shown])
        places = [
            _common(ids, _process(loaded, [part], [whole.text[:at]], padding_side="right")["input_ids"][0].tolist())
            for at in (start, stop)
        ]
        targets.append((places[0], places[1]))
    return targets


def _encode_suffix(loaded: LoadedModel, samples: Sequence[Sample]) -> Inputs:
    for sample in samples:
        if sum(turn.role == "assistant" for turn in sample.turns) != 1 or sample.turns[-1].role != "assistant":
            raise DataError(
                f"Sample {sample.id!r} has several answers; {loaded.name} takes one question and one answer."
            )
        if not sample.turns[-1].text.strip():
            raise DataError(f"Sample {sample.id!r} has an empty answer; every assistant turn needs at least one token.")
    texts = [_render(loaded, sample, sample.request, ask=True) for sample in samples]
    # The processor writes the tokenizer's own end token behind the suffix.
    end = "" if _end_token(loaded) == loaded.tokenizer.eos_token else _end_token(loaded)
    return _process(loaded, samples, texts, padding_side="right", suffix=[s.turns[-1].text + end for s in samples])


def _tokenize(loaded: LoadedModel, text: str) -> list[int]:
    with no_panic(f"The tokenizer of {loaded.name}", error=ModelError):
        return loaded.tokenizer(text, add_special_tokens=_adds_special_tokens(loaded, text))["input_ids"]


def _adds_special_tokens(loaded: LoadedModel, text: str) -> bool:
    return adds_special_tokens(loaded.tokenizer, text)


def adds_special_tokens(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer puts its own beginning before a rendered prompt: a server has to be told the same.

    Most templates spell <bos> themselves; a second one would shift everything the model was trained on.
    """
    bos = tokenizer.bos_token
    return not (bos and text.startswith(bos))


def decode(tokenizer: Any, ids: Any, *, name: str) -> str:
    """The text of an answer's tokens, without special ones. name: what errors call it. Raises ModelError."""
    with no_panic(f"The tokenizer of {name}", error=ModelError):
        return str(tokenizer.decode(ids, skip_special_tokens=True))


def _common(left: list[int], right: list[int]) -> int:
    length = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        length += 1
    return length


def _check_nonempty(samples: Sequence[Sample]) -> None:
    if not samples:
        raise DataError("There is no sample to encode; expected at least one.")


def _check_context(
    loaded: LoadedModel, samples: Sequence[Sample], inputs: Inputs, *, room: Literal[0, 1], cut_at: int | None = None
) -> None:
    bound = loaded.context_length
    if bound is None:
        return
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        if length + room > bound and (cut_at is None or cut_at > bound):
            answer = int((inputs["labels"][row] != IGNORED_LABEL).sum()) if "labels" in inputs else 0
            raise DataError(
                f"Sample {sample.id!r} is {length} tokens long ({length - answer} of request and images, {answer} of "
                f"answer); {loaded.name} has a context of {bound}. Shorten or drop this sample."
            )
