"""Labels, padding and image marks, checked against what the model is shown when it is asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import model_zoo
from holdfast.data.types import Sample, Turn
from holdfast.errors import DataError
from holdfast.models import encode
from holdfast.models.encode import ANSWER, IMAGE, PADDING, TEXT, encode_request, encode_training, token_kinds
from holdfast.models.loaded import LoadedModel


def targets(loaded: LoadedModel, inputs: dict[str, torch.Tensor], row: int) -> str:
    labels = inputs["labels"][row]
    return loaded.tokenizer.decode(labels[labels != -100])


def test_labels_are_the_assistants_tokens_and_its_end(loaded: LoadedModel, samples: list[Sample]) -> None:
    inputs = encode_training(loaded, samples)
    assert targets(loaded, inputs, 0) == " Hello there.</s>"
    assert targets(loaded, inputs, 2) == " the second one</s>"
    assert targets(loaded, inputs, 3) == " A square.</s> Yes.</s>"


def test_labels_begin_where_the_request_ends(loaded: LoadedModel, samples: list[Sample]) -> None:
    for sample in samples:
        if len(sample.turns) > 2:
            continue
        request = encode_request(loaded, [sample])["input_ids"][0]
        training = encode_training(loaded, [sample])
        first = int((training["labels"][0] != -100).nonzero()[0])
        assert training["input_ids"][0, :first].tolist() == request.tolist()


def test_a_kept_answer_stands_before_the_question_that_follows(loaded: LoadedModel, samples: list[Sample]) -> None:
    ids = encode_request(loaded, [samples[1]], keep_answer=True)["input_ids"][0]
    text = loaded.tokenizer.decode(ids)
    assert text.endswith("ASSISTANT: Red ASSISTANT:")
    assert "Red" not in loaded.tokenizer.decode(encode_request(loaded, [samples[1]])["input_ids"][0])


def test_a_sample_is_encoded_alike_alone_and_in_a_batch(loaded: LoadedModel, samples: list[Sample]) -> None:
    batch = encode_training(loaded, samples)
    for row, sample in enumerate(samples):
        alone = encode_training(loaded, [sample])
        n = alone["input_ids"].shape[1]
        assert batch["input_ids"][row, :n].tolist() == alone["input_ids"][0].tolist()
        assert batch["labels"][row, :n].tolist() == alone["labels"][0].tolist()
        assert batch["attention_mask"][row].sum() == n
    requests = encode_request(loaded, samples)
    assert bool((requests["attention_mask"][:, -1] == 1).all())


def test_the_slow_way_through_the_processor_finds_the_same_labels(
    loaded: LoadedModel, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = encode_training(loaded, samples)["labels"]
    monkeypatch.setattr(encode, "_align", lambda *args: None)
    assert torch.equal(encode_training(loaded, samples)["labels"], fast)


def test_images_between_answers_keep_labels_on_answers(loaded: LoadedModel, pictures: list[Path]) -> None:
    turns = (
        Turn(role="user", text="<image>\nThis?"),
        Turn(role="assistant", text="One."),
        Turn(role="user", text="And <image>?"),
        Turn(role="assistant", text="Two."),
    )
    sample = Sample(id="interleaved", turns=turns, images=tuple(pictures[:2]))
    assert targets(loaded, encode_training(loaded, [sample]), 0) == " One.</s> Two.</s>"


def test_token_kinds_name_every_position(loaded: LoadedModel, samples: list[Sample]) -> None:
    inputs = encode_training(loaded, samples)
    kinds = token_kinds(loaded, inputs)
    assert torch.equal(kinds == PADDING, inputs["attention_mask"] == 0)
    assert torch.equal(kinds == ANSWER, inputs["labels"] != -100)
    assert [(kinds[row] == IMAGE).sum().item() for row in range(5)] == [0, 4, 8, 4, 4]
    assert bool(((kinds == TEXT).sum(dim=1) > 0).all())


def test_marks_and_images_must_match(loaded: LoadedModel, pictures: list[Path]) -> None:
    sample = Sample.single("odd", "<image> and <image>?", "x", images=pictures[:1])
    with pytest.raises(DataError, match=r"'odd' has 2 <image> mark.* and 1 image\(s\); expected one mark"):
        encode_training(loaded, [sample])


def test_a_mark_in_an_answer_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(DataError, match="only a user shows images"):
        encode_training(loaded, [Sample.single("spoken", "Hi", "see <image>")])


def test_a_sample_longer_than_the_context_is_named(loaded: LoadedModel) -> None:
    with pytest.raises(DataError, match=r"'long' is \d+ tokens long .*601 of answer\); .* has a context of 512"):
        encode_training(loaded, [Sample.single("short", "Hi", "ok"), Sample.single("long", "Hi", "a" * 599)])
    with pytest.raises(DataError, match=r"'asked' is .* context of 512"):
        encode_request(loaded, [Sample.single("asked", "q" * 600)])


@pytest.mark.parametrize("answer", ["", "  "])
def test_an_empty_answer_is_refused(loaded: LoadedModel, answer: str) -> None:
    with pytest.raises(DataError, match="'hollow' has an empty answer"):
        encode_training(loaded, [Sample.single("hollow", "Hi", answer)])


def test_a_sample_without_an_answer_cannot_train(loaded: LoadedModel) -> None:
    with pytest.raises(DataError, match="has no assistant turn"):
        encode_training(loaded, [Sample.single("mute", "Hi")])


def test_an_image_that_does_not_decode_is_named(loaded: LoadedModel, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"broken\.png"):
        encode_request(loaded, [Sample.single("bad", "What?", images=[broken])])


# Ways in which templates write the end of an answer, and the ids at which the model's generation config stops.
ENDS = {
    "none": ("{{ m['role'] + ': ' + c['text'] + ' ' }}", ["</s>"]),
    "none, a newline": ("{{ m['role'] + ': ' + c['text'] + '\n' }}", ["</s>"]),
    "none, glued": ("{{ '[' + m['role'] + ']' + c['text'] }}", ["</s>"]),
    "eos": ("{{ m['role'] + ': ' + c['text'] + (eos_token if m['role'] == 'assistant' else ' ') }}", ["</s>"]),
    "marker": ("{{ '<|a|>' + m['role'] + '\n' + c['text'] + '<|b|>\n' }}", ["<|b|>"]),
    "marker beside eos": ("{{ '<|a|>' + m['role'] + '\n' + c['text'] + '<|b|>\n' }}", ["</s>", "<|b|>"]),
    "marker that does not stop it": ("{{ '<|a|>' + m['role'] + '\n' + c['text'] + '<|b|>\n' }}", ["</s>"]),
    "eos that does not stop it": ("{{ m['role'] + ': ' + c['text'] + eos_token }}", ["<|b|>"]),
    "the next turn": ("{{ ('<|a|>' if m['role'] == 'user' else '<|b|>') + '\n' + c['text'] }}", ["</s>", "<|a|>"]),
    "eos behind the last turn only": (
        "{{ m['role'] + ': ' + c['text'] + (eos_token if m == messages[-1] and m['role'] != 'user' else ' ') }}",
        ["</s>"],
    ),
    "eos behind all but the last turn": (
        "{{ m['role'] + ': ' + c['text'] + ('' if m == messages[-1] or m['role'] == 'user' else eos_token) }}",
        ["</s>"],
    ),
    "marker and eos behind the last turn": (
        "{{ '<|a|>' + m['role'] + '\n' + c['text'] + "
        "('<|b|></s>' if m == messages[-1] and m['role'] != 'user' else '\n') }}",
        ["<|b|>"],
    ),
    "no id named": ("{{ m['role'] + ': ' + c['text'] + ' ' }}", []),
    "trimmed": ("{{ m['role'] + ': ' + c['text'] | trim + ' ' }}", ["</s>"]),
}


@pytest.mark.parametrize("kind", ENDS)
def test_every_answer_ends_as_the_generation_config_says(loaded: LoadedModel, kind: str) -> None:
    from copy import deepcopy

    template, ends = ENDS[kind]
    tokens = model_zoo.tokenizer(["<|a|>", "<|b|>"], image_token="<image>")
    processor, model = deepcopy(loaded.processor), deepcopy(loaded.model)
    processor.tokenizer = tokens
    roles = "".join(
        f"{{% for m in ms %}}{{% for c in m['content'] %}}{part}{{% endfor %}}{{% endfor %}}" for part in [template]
    )
    prompt = template.split("c['text']")[0].replace("m['role']", "'assistant'").rstrip(" +(")
    prompt = prompt.replace("('<|a|>' if 'assistant' == 'user' else '<|b|>')", "'<|b|>'") + " }}"
    processor.chat_template = (
        "{% set ms = messages %}" + roles + "{% if add_generation_prompt %}" + prompt + "{% endif %}"
    )
    model.generation_config.eos_token_id = tokens.convert_tokens_to_ids(ends) or None
    ends = ends or ["</s>"]  # the tokenizer's own
    changed = LoadedModel(model=model, processor=processor, name=kind)
    answers = ["Yes.", "i", " It is: 3 ", "no\n"]
    turns = [
        turn
        for number, answer in enumerate(answers)
        for turn in (Turn(role="user", text=f"Question {number}?"), Turn(role="assistant", text=answer))
    ]
    inputs = encode_training(changed, [Sample(id="turns", turns=tuple(turns)), Sample.single("one", "Hi", "Hello")])
    for row, expected in enumerate((answers, ["Hello"])):
        runs = answers_of(inputs["labels"][row])
        assert len(runs) == len(expected)
        for run, answer in zip(runs, expected, strict=True):
            *words, end = run
            assert tokens.convert_ids_to_tokens(end) in ends
            said = tokens.decode(words).replace("<|b|>", "").replace("</s>", "")
            assert said.strip() == answer.strip()
            assert not set(words) & set(tokens.convert_tokens_to_ids(ends))


def answers_of(labels: torch.Tensor) -> list[list[int]]:
    """The labels in unbroken runs: one per answer."""
    runs: list[list[int]] = []
    inside = False
    for value in labels.tolist():
        if value != -100:
            if not inside:
                runs.append([])
            runs[-1].append(value)
        inside = value != -100
    return runs


def test_an_answer_that_is_no_target_is_shown_and_not_learned(loaded: LoadedModel) -> None:
    turns = tuple(
        Turn(role=role, text=text, loss=loss)
        for role, text, loss in [
            ("user", "One?", True),
            ("assistant", "first", False),
            ("user", "Two?", True),
            ("assistant", "second", True),
            ("user", "Three?", True),
            ("assistant", "third", False),
        ]
    )
    inputs = encode_training(loaded, [Sample(id="some", turns=turns)])
    assert targets(loaded, inputs, 0) == " second</s>"
    assert "first" in loaded.tokenizer.decode(inputs["input_ids"][0])
    with pytest.raises(DataError, match="'none' has `loss` off in every answer"):
        encode_training(loaded, [Sample(id="none", turns=turns[:2])])


def test_a_template_that_rewrites_earlier_turns_is_refused(loaded: LoadedModel, samples: list[Sample]) -> None:
    from copy import copy

    from holdfast.errors import ModelError

    processor = copy(loaded.processor)
    processor.chat_template = "{{ messages | length }}:" + loaded.processor.chat_template
    with pytest.raises(ModelError, match="renders earlier turns differently"):
        encode_training(replace(loaded, processor=processor), samples[3:4])
