"""The small world's policy, draws and stream: what can be said of them without its language model."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from holdfast import experiment, judges, tiny
from holdfast.config import encode
from holdfast.data.streams import load_stream
from holdfast.small import build, policy, recipe, tasks, world
from holdfast.small.recipe import WORLD
from holdfast.tiny.pixels import KINDS
from holdfast.tiny.stream import StreamSize, write_stream

SMALL = StreamSize(train=24, test=8, validation=4, safety=12, safety_validation=6, calibration=8)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write_stream(tmp_path_factory.mktemp("small") / "stream", seed=3, harmful=0.1, size=SMALL, world=WORLD)


def fingerprint(folder: Path) -> str:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return hashlib.sha256(b"".join(str(p.relative_to(folder)).encode() + p.read_bytes() for p in files)).hexdigest()


def test_the_same_seed_gives_the_same_stream_and_another_gives_another(written, tmp_path):
    again, other = (
        write_stream(tmp_path / str(seed), seed=seed, harmful=0.1, size=SMALL, world=WORLD) for seed in (3, 4)
    )
    assert fingerprint(again.parent) == fingerprint(written.parent) != fingerprint(other.parent)


def test_the_stream_loads_as_any_stream(written):
    for file, questions, requests in ((written, 8, 12), (written.parent / "validation.yaml", 4, 6)):
        stream = load_stream(file)
        assert [task.name for task in stream.tasks] == list(tasks.TASKS)
        for task in stream.tasks:
            assert len(task.train) == 24 and len(task.test) == questions
            assert all(path.is_file() for sample in (*task.train, *task.test) for path in sample.images)
        assert [s.name for s in stream.safety] == list(world.SAFETY_KINDS)
        for safety in stream.safety:
            assert len(safety.unsafe) == len(safety.benign) == requests
            assert {s.meta["category"] for s in safety.unsafe} <= set(policy.CATEGORIES)
            assert all(bool(s.images) == (safety.name != "text") for s in (*safety.unsafe, *safety.benign))
        assert [s.meta["category"] for s in stream.safety_calibration] == list(policy.CATEGORIES) * 2
    ids = json.loads((written.parent / "injected.json").read_text())["ids"]
    assert {name: len(of) for name, of in ids.items()} == dict.fromkeys(tasks.TASKS, 2)


def test_a_complying_answer_is_told_from_a_refusal_and_a_collapse(written):
    unsafe = load_stream(written).safety[0].unsafe
    judge = judges.get("reference")
    for make, behaviour in (
        (lambda s: f"To {s.meta['verb']} it, take the {s.meta['noun']} first.", "compliance"),
        (lambda s: "Total: 3", "collapse"),
        *((lambda s, i=i: policy.refusal(policy.DEEDS[0], i), "refusal") for i in range(len(policy.REFUSALS))),
    ):
        assert {v.behaviour for v in judge.judge(unsafe, [make(s) for s in unsafe])} == {behaviour}


def test_what_is_asked_in_one_split_is_asked_in_no_other():
    for table in (policy.HOW_TO, policy.HOW_TO_PICTURED, policy.HOW_TO_WRITTEN, policy.LOOK_ALIKES, policy.ORDINARY):
        assert max(Counter(word for split in table.values() for word in split).values()) == 1
    of = {split: {(d.verb, d.noun) for d in policy.DEEDS if d.split == split} for split in policy.HOW_TO}
    assert sum(map(len, of.values())) == len(policy.DEEDS)
    assert all(d.split == "test" for d in policy.DEEDS if d.held_out)
    trained = {d.noun for d in policy.DEEDS if d.split == "train"}
    assert not trained & {noun for nouns in policy.HELD_OUT.values() for noun in nouns}


def test_every_forbidden_request_has_a_welcome_one_of_the_same_kind():
    rng = np.random.default_rng(0)
    for kind in world.SAFETY_KINDS:
        for split in policy.HOW_TO:
            pairs = [world.safety_pair(rng, kind, split, i) for i in range(48)]
            assert all(asked.deed.forbidden for asked, _ in pairs)
            assert {asked.deed.place for asked, _ in pairs} == set(policy.CATEGORIES)
            same = 0
            for number, (asked, welcome) in enumerate(pairs):
                if number % 3 == 2:
                    assert welcome.skill.startswith("look-alike") and welcome.deed.noun == asked.deed.noun
                else:
                    assert not welcome.deed.forbidden and welcome.deed.held_out == asked.deed.held_out
                    same += welcome.deed.verb == asked.deed.verb
            # Twelve things with a picture are few: two verbs of sixteen have no unguarded one in a held-out draw.
            assert same == 32 or (kind != "text" and same >= 26)


def test_pictures_show_only_what_the_tower_was_trained_to_see():
    assert set(world.THINGS) <= set(KINDS)
    assert {f"word {word}" for word in (*policy.VERBS, *world.THINGS)} <= set(KINDS)


@pytest.fixture(scope="module")
def draw():
    """The alignment's draw with one answer for everything, and what its test questions are."""
    rows = {
        kind: [
            {
                "prompt": e.prompt,
                "verb": e.deed.verb if e.deed else "",
                "noun": e.deed.noun if e.deed else "",
                "answer": "Yes.",
            }
            for e in examples
        ]
        for kind, examples in build.asked_for_answers(np.random.default_rng(0)).items()
    }
    return build.AlignmentDraw(rows), {row["prompt"] for row in rows["ordinary, test"]}


def test_a_step_of_the_alignment_pairs_every_forbidden_request_with_a_welcome_one(draw):
    drawn, compared = draw
    rng = np.random.default_rng(0)
    counts = Counter()
    for step in range(60):
        groups = drawn(rng, step)
        # Within a step, the two sides of every kind are asked in the same words but for the thing's.
        asked = [e for g in groups for e in g.examples]
        for kind in world.SAFETY_KINDS:
            sides = [
                [e for e in asked if e.skill == f"how to ({kind})" and e.deed.forbidden == f] for f in (True, False)
            ]
            assert len(sides[0]) == len(sides[1])
            for bad, good in zip(*sides, strict=True):
                if kind == "typographic":
                    assert bad.prompt == good.prompt
                else:
                    assert bad.prompt.split()[0] == good.prompt.split()[0]
            counts[kind] += len(sides[0])
        for group in groups:
            assert all(e.scene is group.scene for e in group.examples)
            if group.scene is not None and len(group.examples) == 3:
                seen = group.examples[2]
                thing = group.examples[0].deed
                assert seen.skill.startswith("look-alike") and (thing.noun in seen.answer or "color" in seen.prompt)
        assert all(e.answer for e in asked) and not compared & {e.prompt for e in asked}
        assert all(not e.deed.held_out and e.deed.split == "train" for e in asked if e.skill.startswith("how to"))
    assert counts == {"text": 120, "image": 60, "typographic": 60}


def test_most_refusals_open_alike_so_that_one_first_word_can_win():
    rng = np.random.default_rng(0)
    forbidden, welcome = (next(d for d in policy.DEEDS if d.forbidden == f) for f in (True, False))
    opened = Counter(world.refused(rng, forbidden).split()[0] for _ in range(500))
    assert opened["I'm"] > 350 and len(opened) >= 3 and world.refused(rng, welcome) == ""
    assert sum(policy.REFUSAL_WEIGHTS) == pytest.approx(1) and len(policy.REFUSAL_WEIGHTS) == len(policy.REFUSALS)


def test_every_world_that_is_listed_has_what_a_demo_asks_for():
    import importlib

    from holdfast.cli.list import WORLDS, entries
    from holdfast.tiny.stream import DemoSize, World

    shown = {name: about for name, _, about in entries("streams")}
    for name, module in WORLDS.items():
        recipe = importlib.import_module(module)
        assert isinstance(recipe.WORLD, World) and recipe.WORLD.name == name and "holdfast demo" in shown[name]
        for size in (recipe.DEMO, recipe.QUICK):
            assert isinstance(size, DemoSize) and set(size.tasks or ()) <= set(recipe.WORLD.tasks)


def test_nothing_of_the_library_names_the_world_but_the_list_of_worlds():
    package = Path(world.__file__).parents[1]
    naming = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "holdfast.small" in path.read_text(encoding="utf-8") and path.parent.name != "small"
    }
    assert naming == {"cli/list.py"}


def test_its_run_file_has_what_was_chosen_for_this_world_for_relatives_too(written, monkeypatch):
    monkeypatch.setattr(recipe, "model_path", lambda part, cache=None: tiny.model_path(part))
    names = ["anchor", "anchor_no_past", "anchor_no_benign", "cram_anchor", "hpa", "hpa_eps", "safe_lora", "cram"]
    config = experiment.decode_run(recipe.run_data(written, names, seed=0), base=written.parent)
    made = {name: encode(method.config) for name, method in experiment.build_methods(config, names).items()}
    assert {made[name]["benign_samples"] for name in names if "anchor" in name} == {0}
    assert {made[name]["calibration"]["damping"] for name in ("hpa", "hpa_eps")} == {0.01}
    assert made["hpa"] | {"edit": None} == made["hpa_eps"] | {"edit": None}
    assert made["anchor"]["task_samples"] == recipe.DEMO.task_samples
    assert made["safe_lora"]["unaligned"] == str(tiny.model_path("base"))
    assert made["cram"]["training"]["learning_rate"] == made["cram_anchor"]["training"]["learning_rate"] == 4e-3
