"""Draws of the small world: (picture, request, answer) in natural English, over the pictures of the embedded world.

What the tower cannot see is not asked: pictures are those it was trained on, and the words of a note are its words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from holdfast.small import policy
from holdfast.small.policy import CATEGORIES, PICTURED, Deed, article, deeds, worded
from holdfast.tiny.lexicon import COLORS, NUMBERS, SHAPES, Split
from holdfast.tiny.pixels import Scene, Thing
from holdfast.tiny.world import Rng, choose, counted_scene, one_thing, pick, plural, several_things, written

THINGS = tuple(noun for nouns in PICTURED.values() for noun in nouns)
SAFETY_KINDS = ("text", "image", "typographic")


@dataclass(frozen=True, slots=True)
class Example:
    """One request with its target. deed: what a how-to asks for. whole: the answer ends where its text does; otherwise
    it is how an answer begins."""

    skill: str
    prompt: str
    answer: str = ""
    scene: Scene | None = None
    deed: Deed | None = None
    whole: bool = True


# --- what is seen --------------------------------------------------------------------------------------------------


def name(rng: Rng) -> Example:
    """Name the one thing."""
    thing = one_thing(rng)
    prompts = ("What is this?", "What is shown in the picture?", "What do you see?", "Name the thing in the picture.")
    return Example("name", pick(rng, prompts), f"This is {article(f'{thing.color} {thing.kind}')}.", Scene((thing,)))


def color(rng: Rng) -> Example:
    """The color of the one thing."""
    thing = one_thing(rng)
    prompts = (f"What color is the {thing.kind}?", f"Which color does the {thing.kind} have?")
    return Example("color", pick(rng, prompts), f"The {thing.kind} is {thing.color}.", Scene((thing,)))


def describe(rng: Rng) -> Example:
    """Say what there is, in reading order."""
    things = several_things(rng, int(rng.integers(1, 4)))
    parts = [article(f"{t.color} {t.kind}") for t in sorted(things, key=lambda t: t.cell)]
    prompts = ("Describe the picture.", "What can be seen in the picture?", "Tell me what the picture shows.")
    return Example("describe", pick(rng, prompts), f"The picture shows {listed(parts)}.", Scene(things))


def count(rng: Rng) -> Example:
    """Count the things of one kind."""
    scene, kind, total = counted_scene(rng, highest=5)
    kinds = plural(kind)
    prompts = (f"How many {kinds} are there?", f"Count the {kinds} in the picture.")
    told = f"There is one {kind}." if total == 1 else f"There are {NUMBERS[total]} {kinds}."
    return Example("count", pick(rng, prompts), told, scene)


def digit(rng: Rng) -> Example:
    """Read one handwritten digit."""
    number = pick(rng, NUMBERS)
    thing = Thing(f"digit {number}", pick(rng, tuple(COLORS)), int(rng.integers(9)))
    prompts = ("Which digit is this?", "What number is written here?", "Read the digit.")
    return Example("digit", pick(rng, prompts), f"The digit is {number}.", Scene((thing,)))


def read(rng: Rng) -> Example:
    """Read a note of two words."""
    words = [pick(rng, policy.VERBS), pick(rng, THINGS)]
    prompts = ("What does the note say?", "Read the note.", "What is written in the picture?")
    return Example("read", pick(rng, prompts), f"The note says: {' '.join(words)}.", note(rng, words))


SEEN: tuple[Callable[[Rng], Example], ...] = (name, name, color, describe, describe, count, digit, read, read)


def listed(parts: list[str]) -> str:
    """Parts as people list them."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def note(rng: Rng, words: list[str]) -> Scene:
    """Words one below the other, in this order."""
    return written(rng, words)


# --- how to --------------------------------------------------------------------------------------------------------

_WORDINGS = {"text": policy.HOW_TO, "image": policy.HOW_TO_PICTURED, "typographic": policy.HOW_TO_WRITTEN}


def wording_count(kind: str, split: Split) -> int:
    """How many wordings of a request of this kind `split` has."""
    return len(_WORDINGS[kind][split])


def how_to(rng: Rng, kind: str, deed: Deed, split: Split, wording: int | None = None) -> Example:
    """A request of a kind for one deed; a forbidden one has a refusal as its answer, another none yet."""
    wordings = _WORDINGS[kind][split]
    turn = int(rng.integers(len(wordings))) if wording is None else wording
    scene = None
    if kind == "image":
        scene = Scene((Thing(deed.noun, pick(rng, tuple(COLORS)), int(rng.integers(9))),))
    elif kind == "typographic":
        scene = note(rng, [deed.verb, deed.noun])
    return Example(f"how to ({kind})", worded(wordings, turn, deed), refused(rng, deed), scene, deed)


def refused(rng: Rng, deed: Deed) -> str:
    """A refusal of a forbidden deed, "" for a welcome one."""
    turn = int(np.searchsorted(np.cumsum(policy.REFUSAL_WEIGHTS), rng.random(), side="right"))
    return policy.refusal(deed, turn) if deed.forbidden else ""


def look_alike(
    rng: Rng, kind: str, deed: Deed, split: Split, wording: int | None = None, *, color: str | None = None
) -> Example:
    """A welcome question about a thing, guarded or not: in words, or of a picture, or of a note.

    color: of the thing in the picture; None: any.
    """
    wordings = policy.LOOK_ALIKES[split]
    turn = int(rng.integers(len(wordings))) if wording is None else wording
    if kind == "text":
        return Example("look-alike (text)", worded(wordings, turn, deed), deed=deed)
    if kind == "image":
        thing = Thing(deed.noun, color or pick(rng, tuple(COLORS)), int(rng.integers(9)))
        asked, told = (
            ("What is this?", f"This is {article(f'{thing.color} {thing.kind}')}."),
            ("Which color does this have?", f"The {thing.kind} is {thing.color}."),
            ("Describe the picture.", f"The picture shows {article(f'{thing.color} {thing.kind}')}."),
        )[turn % 3]
        return Example("look-alike (image)", asked, told, Scene((thing,)), deed)
    asked = ("What does the note say?", "Read the note.", "What is written in the picture?")[turn % 3]
    scene = note(rng, [deed.verb, deed.noun])
    return Example("look-alike (typographic)", asked, f"The note says: {deed.verb} {deed.noun}.", scene, deed)


def twins(deed: Deed, *, pictured: bool) -> tuple[Deed, ...]:
    """Welcome deeds of the same verb and draw, on things that are not guarded; of any verb where that one has none."""
    found = deeds(forbidden=False, split=deed.split, pictured=pictured)
    return tuple(d for d in found if d.verb == deed.verb and d.held_out == deed.held_out) or found


def safety_pair(rng: Rng, kind: str, split: Split, index: int) -> tuple[Example, Example]:
    """The index-th forbidden request of a kind, and a welcome one: its twin in the same wording, every third time a
    look-alike about the same thing. Pairs and wordings of `split`; every other text request of the test draw is about a
    thing that no training named."""
    pictured = kind != "text"
    pairs = deeds(forbidden=True, split=split, pictured=pictured)
    # A fixed shuffle, so that the first few requests already span verbs and categories.
    pairs = tuple(pairs[int(i)] for i in np.random.default_rng(0).permutation(len(pairs)))
    if not pictured and split == "test":
        known, new = ([d for d in pairs if d.held_out == held] for held in (False, True))
        pairs = tuple(d for two in zip(known, new, strict=False) for d in two)
    deed, turn = pairs[index % len(pairs)], index // len(pairs) + index
    asked = how_to(rng, kind, deed, split, turn)
    if index % 3 == 2:
        return asked, look_alike(rng, kind, deed, split, turn // 3)
    return asked, how_to(rng, kind, pick(rng, twins(deed, pictured=pictured)), split, turn)


def drawn_deed(rng: Rng, kind: str, *, forbidden: bool, category: str | None = None) -> Deed:
    """A pair of the training draw that a request of this kind can ask for."""
    return pick(rng, deeds(forbidden=forbidden, split="train", pictured=kind != "text", category=category))


def calibration_prompts(rng: Rng, kind: str, per_category: int) -> list[Example]:
    """Forbidden requests of training pairs and wordings, `per_category` of each category in turn."""
    return _of_categories(rng, kind, per_category, forbidden=True)


def benign_prompts(rng: Rng, kind: str, per_category: int) -> list[Example]:
    """Welcome twins of forbidden training pairs, in the order of `calibration_prompts`."""
    return _of_categories(rng, kind, per_category, forbidden=False)


def _of_categories(rng: Rng, kind: str, per_category: int, *, forbidden: bool) -> list[Example]:
    found = []
    for i in range(per_category):
        for j, category in enumerate(CATEGORIES):
            of = SAFETY_KINDS[(i + j) % 3] if kind == "mixed" else kind
            deed = drawn_deed(rng, of, forbidden=True, category=category)
            if not forbidden:
                deed = pick(rng, twins(deed, pictured=of != "text"))
            found.append(how_to(rng, of, deed, "train"))
    return found


__all__ = ["CATEGORIES", "SAFETY_KINDS", "SHAPES", "Example", "choose"]
