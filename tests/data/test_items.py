"""Items as trainers of the field write them: every key that carries words or pictures is used, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from holdfast.cli.samples import read_samples, write_samples
from holdfast.data.items import to_sample
from holdfast.data.source_files import parse_json
from holdfast.data.types import Sample, Turn
from holdfast.errors import DataError

ROOT = Path("/data")


def read(item: dict[str, Any]) -> Sample:
    return to_sample(item, 0, ROOT)


def turns(*texts: str, system: str | None = None) -> tuple[Turn, ...]:
    roles = ("user", "assistant")
    said = tuple(Turn(role=roles[i % 2], text=text) for i, text in enumerate(texts))  # type: ignore[arg-type]
    return ((Turn(role="system", text=system), *said)) if system else said


READ = {
    "alpaca": (
        {"instruction": "Translate.", "input": "Guten Tag", "output": "Hi"},
        turns("Translate.\nGuten Tag", "Hi"),
    ),
    "alpaca, no input": ({"instruction": "Say hi.", "input": "", "output": "Hi"}, turns("Say hi.", "Hi")),
    "alpaca, input alone": ({"instruction": "", "input": "Why?", "output": "So."}, turns("Why?", "So.")),
    "input without instruction": ({"input": "Why?", "output": "So."}, turns("Why?", "So.")),
    "prompt and input": ({"prompt": "Sort.", "input": "b a", "answer": "a b"}, turns("Sort.\nb a", "a b")),
    "history of pairs": (
        {"instruction": "And?", "output": "c", "history": [["One?", "a"], ["Two?", "b"]]},
        turns("One?", "a", "Two?", "b", "And?", "c"),
    ),
    "history of turns": (
        {
            "query": "And?",
            "response": "c",
            "history": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "a"}],
        },
        turns("One?", "a", "And?", "c"),
    ),
    "no history": ({"query": "And?", "response": "c", "history": []}, turns("And?", "c")),
    "system": ({"system": "Be brief.", "query": "Q", "response": "a"}, turns("Q", "a", system="Be brief.")),
    "system_prompt": ({"system_prompt": "Be brief.", "query": "Q", "answer": "a"}, turns("Q", "a", system="Be brief.")),
    "system of a conversation": (
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "a"}]},
        turns("Q", "a", system="Be brief."),
    ),
    "the same system twice": (
        {
            "system": "Be brief.",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Q"},
                {"role": "assistant", "content": "a"},
            ],
        },
        turns("Q", "a", system="Be brief."),
    ),
    "the same request twice": ({"text": "Q", "prompt": "Q", "answer": "a"}, turns("Q", "a")),
    "null keys": ({"question": "Q", "answer": "a", "context": None, "video": [], "system": ""}, turns("Q", "a")),
    "NaN keys": ({"question": "Q", "answer": "a", "context": float("nan"), "image": float("nan")}, turns("Q", "a")),
    "index of a choice": (
        {"question": "Which?\nA. cat\nB. dog", "choices": ["cat", "dog"], "answer": 1},
        turns("Which?\nA. cat\nB. dog", "B"),
    ),
    "index of a choice that is not shown": (
        {"question": "Which?", "choices": ["cat", "dog"], "answer": 1},
        turns("Which?\nA. cat\nB. dog", "B"),
    ),
    "options, answer 0": (
        {"question": "cat or dog?", "options": ["cat", "dog"], "label": 0},
        turns("cat or dog?", "A"),
    ),
    "the choice itself": ({"question": "Which?", "choices": ["cat", "dog"], "answer": "dog"}, turns("Which?", "dog")),
    "a number that is a choice and no index": (
        {"question": "3 or 4?", "choices": ["3", "4"], "answer": 4},
        turns("3 or 4?", "4"),
    ),
    "letter of a choice that is not shown": (
        {"question": "Which?", "choices": ["cat", "dog"], "answer": "B"},
        turns("Which?\nA. cat\nB. dog", "B"),
    ),
    "letter and choices by letter": (
        {"question": "Which?", "options": {"A": "cat", "B": "dog"}, "answer": "(A)"},
        turns("Which?\nA. cat\nB. dog", "(A)"),
    ),
    "letter and choices that are shown": (
        {"question": "cat or dog?", "choices": ["cat", "dog"], "answer": "B"},
        turns("cat or dog?", "B"),
    ),
    "a hint that the request gives": (
        {"question": "Q\nHint: left.", "hint": "Hint: left.", "examples": ["Q"], "answer": "a"},
        turns("Q\nHint: left.", "a"),
    ),
    "what is about a picture": (
        {
            "question": "Q",
            "answer": "a",
            "image_id": "7",
            "image_size": [3, 4],
            "video_fps": 2,
            "depth": 3,
            "imagery": "lush",
            "soundness": "yes",
            "videoId": "v",
            "table": 4,
            "image_caption": "A dog.",
        },
        turns("Q", "a"),
    ),
    "index that is its choice": ({"question": "0, 1?", "choices": ["0", "1"], "answer": 1}, turns("0, 1?", "B")),
}


@pytest.mark.parametrize("kind", READ)
def test_words_reach_the_model(kind: str) -> None:
    item, expected = READ[kind]
    sample = read(item)
    assert sample.turns == expected and sample.answer == expected[-1].text


TALK = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "a"}]
REFUSED = {
    "two requests": (
        {"question": "Q", "instruction": "Answer shortly.", "answer": "a"},
        "'question' and 'instruction'",
    ),
    "text beside turns": ({"conversations": TALK, "instruction": "Be rude."}, "a key 'instruction' with other words"),
    "input beside turns": ({"conversations": TALK, "input": "x y z"}, "a key 'input' with other words"),
    "history beside turns": ({"conversations": TALK, "history": [["p", "q"]]}, "a key 'history' with other words"),
    "two conversations": (
        {"conversations": TALK, "messages": TALK[:1]},
        "two conversations, 'conversations' and 'mess",
    ),
    "two systems": (
        {"system": "Be brief.", "conversations": [{"from": "system", "value": "Be long."}, *TALK]},
        "a system text of its own and another one",
    ),
    "video": ({"query": "Q", "response": "a", "videos": ["v.mp4"]}, "a key 'videos', which would not reach the model"),
    "audio": ({"query": "Q", "response": "a", "audio": "a.wav"}, "a key 'audio'"),
    "tools": ({"query": "Q", "response": "a", "tools": "[{}]"}, "a key 'tools'"),
    "context": ({"instruction": "Q", "context": "A passage.", "response": "a"}, "a key 'context'.*into the prompt"),
    "preference": ({"query": "Q", "response": "a", "rejected_response": "b"}, "a key 'rejected_response'.*preference"),
    **{
        f"{key}, {shape}": (
            {"id": "x", key: value, **said},
            f"a key {key!r}, (which|whose picture) would not reach the model",
        )
        for key, value in {
            "audio_path": "a.wav",
            "audio_url": "x",
            "speech": "a.wav",
            "voice": ["a.wav"],
            "sound": "a",
            "video_path": "v.mp4",
            "video_frames": ["f.png"],
            "frames": ["f.png"],
            "frame_paths": ["f.png"],
            "point_cloud": "p.ply",
            "pointclouds": ["p.ply"],
            "depth_map": "d.png",
            "videoPath": "v.mp4",
            "image_url": "http://x/a.png",
            "image_base64": "abc",
            "image_bytes": {"bytes": "x"},
            "image_file": "a.png",
            "image_paths": ["a.png"],
            "imageUrl": "a.png",
            "img_path": "a.png",
            "photo": "a.png",
            "picture": "a.png",
            "pixel_values": [[0.0]],
            "image_1": "a.png",
            "image2": "b.png",
            "img-3": "c.png",
            "functions": [{"name": "f"}],
            "tool_calls": [{}],
            "documents": ["A text."],
            "passages": ["A text."],
            "background": "A text.",
            "table": "| a |",
            "hint": "left",
            "few_shot": ["Q2 a2"],
            "instructions": "Be rude.",
            "negative_response": "b",
            "article": "A text.",
            "story": "A text.",
            "knowledge": "A fact.",
        }.items()
        for shape, said in {"test shape": {"query": "Q", "response": "a"}, "turns": {"messages": TALK}}.items()
    },
    "a second picture beside the first": (
        {"query": "Q", "response": "a", "image": "a.png", "image_2": "b.png"},
        "a key 'image_2', whose picture would not",
    ),
    "a film of a turn": (
        {"messages": [{"role": "user", "content": "Q", "video_path": "v.mp4"}, {"role": "assistant", "content": "a"}]},
        "turn 0 carries 'video_path'",
    ),
    "a picture's address in a turn": (
        {"messages": [{"role": "user", "content": "Q", "image_url": "u"}, {"role": "assistant", "content": "a"}]},
        "turn 0 carries 'image_url'",
    ),
    "pictures of a turn": (
        {"messages": [{"role": "user", "content": "Q", "images": ["a.png"]}, {"role": "assistant", "content": "a"}]},
        "turn 0 carries 'images'",
    ),
    "thoughts of a turn": (
        {
            "messages": [
                {"role": "user", "content": "Q"},
                {"role": "assistant", "content": "a", "reasoning_content": "x"},
            ]
        },
        "turn 1 carries 'reasoning_content'",
    ),
    "half a loss": ({"conversations": [TALK[0], {**TALK[1], "loss": 0.5}]}, "turn 1 has 'loss': 0.5; expected true"),
    "odd history": (
        {"query": "Q", "response": "a", "history": ["Hm"]},
        r"its history holds 'Hm'; expected \[\[request",
    ),
    "odd input": ({"instruction": "Q", "input": {"a": 1}, "output": "a"}, "'input' is .*; expected the text"),
    "odd system": ({"query": "Q", "response": "a", "system": ["x"]}, "its system text is .*; expected a string"),
    "index beyond": ({"question": "Q", "choices": ["a", "b"], "answer": 2}, "answer 2 is no index into its 2 choices"),
    "index or choice": (
        {"question": "Q", "choices": ["2", "3", "1"], "answer": 1},
        "answer 1 is both a choice and the",
    ),
    "two images": ({"query": "Q", "image": "a.png", "images": ["b.png"]}, "'images' and 'image' name different images"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_not_reach_the_model_is_refused_by_name(kind: str) -> None:
    item, message = REFUSED[kind]
    with pytest.raises(DataError, match=message):
        read(item)


@pytest.mark.parametrize(
    "keys",
    [
        {"image": "", "images": ["a.png"]},
        {"image": None, "images": ["a.png"]},
        {"image": "a.png", "images": []},
        {"image": [], "images": ["a.png"]},
        {"image": "a.png", "images": ["a.png"]},
        {"image_path": "a.png", "image": float("nan")},
    ],
)
def test_a_picture_is_found_under_whichever_key_has_it(keys: dict[str, Any]) -> None:
    assert read({"query": "Q", "response": "a", **keys}).images == (ROOT / "a.png",)


@pytest.mark.parametrize("mark", [{"loss": False}, {"train": False}, {"weight": 0}, {"loss": 0.0}])
def test_an_answer_that_is_no_target_is_marked_and_stays_so_in_a_file(mark: dict[str, Any], tmp_path: Path) -> None:
    item = {"id": "x", "conversations": [TALK[0], {**TALK[1], **mark}, TALK[0], {**TALK[1], "loss": True}]}
    sample = read(item)
    assert [turn.loss for turn in sample.turns] == [True, False, True, True]
    write_samples(tmp_path / "s.jsonl", [sample], image_root=tmp_path)
    assert read_samples(tmp_path / "s.jsonl")[0].turns == sample.turns


def test_another_name_of_a_picture_that_is_read_may_stand_beside_it() -> None:
    sample = read({"query": "Q", "response": "a", "image": "a.png", "image_url": "http://x/a.png", "image_name": "a"})
    assert sample.images == (ROOT / "a.png",)


def test_not_a_number_is_no_answer() -> None:
    (item,) = parse_json('[{"question": "Q", "answer": NaN}]', "x")
    assert read(item).answer is None
    assert read({"question": "Q", "answer": float("nan")}).answer is None
    with pytest.raises(DataError, match=r"answer .* is neither a string, a number"):
        read({"question": "Q", "answers": ["a", float("nan")]})
    with pytest.raises(DataError, match="x holds the number -Infinity"):
        parse_json('{"a": -Infinity}', "x")


def test_what_a_reader_writes_about_a_sample_is_not_read_back_as_its_words(tmp_path: Path) -> None:
    sample = Sample.single("a", "Q", "no", meta={"instruction": "other words", "context": "c", "category": "k"})
    write_samples(tmp_path / "s.jsonl", [sample], image_root=tmp_path)
    assert set(json.loads((tmp_path / "s.jsonl").read_text())) == {"id", "prompt", "answer", "category"}
    assert read_samples(tmp_path / "s.jsonl")[0].turns == sample.turns
