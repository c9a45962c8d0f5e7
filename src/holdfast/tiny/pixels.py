"""Pictures of the tiny world: 48 x 48 RGB, drawn with numpy alone so that every version of every library agrees.

A picture is a 3 x 3 grid of cells of 16 pixels (an object each), or rows of 8-pixel letters. With patches of 8 pixels
a cell is four patches and a letter is one. `labels` says what each patch shows; the vision tower is first trained on
that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np

from holdfast.tiny.glyphs import ICONS, LETTERS
from holdfast.tiny.lexicon import COLORS, NOUNS, NUMBERS, SHAPES, WRITABLE, Split

SIZE, CELL, PATCH = 48, 16, 8
GRID = SIZE // PATCH

# Classes of the dense head: 0 is background, then shapes, things, handwritten digits, written words.
KINDS = ("nothing", *SHAPES, *NOUNS, *(f"digit {n}" for n in NUMBERS), *(f"word {w}" for w in WRITABLE))
TINTS = ("nothing", *COLORS)

Picture: TypeAlias = np.ndarray  # uint8 (48, 48, 3)


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: a shape, a noun or a digit ("digit four"), its color and its cell (0..8, row by row)."""

    kind: str
    color: str
    cell: int

    @property
    def row(self) -> int:
        """Row of its cell, 0..2, from the top."""
        return self.cell // 3

    @property
    def column(self) -> int:
        """Column of its cell, 0..2, from the left."""
        return self.cell % 3


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows: objects in cells, or written lines ((row 0..5, word), ...)."""

    things: tuple[Thing, ...] = ()
    lines: tuple[tuple[int, str], ...] = ()
    ink: str = "white"


@cache
def _shape_mask(shape: str) -> np.ndarray:
    y, x = np.mgrid[0:14, 0:14] - 6.5
    radius = np.hypot(x, y)
    if shape == "circle":
        return radius < 6.8
    if shape == "square":
        return (abs(x) < 6) & (abs(y) < 6)
    if shape == "triangle":
        return (y > -6) & (y < 6) & (abs(x) < (y + 6.5) * 0.56)
    if shape == "cross":
        return (abs(x) < 2.2) | (abs(y) < 2.2)
    if shape == "ring":
        return (radius < 6.8) & (radius > 3.6)
    angle = np.arctan2(x, -y)
    return radius < 3.2 + 3.6 * np.abs(np.cos(2.5 * angle)) ** 3


@cache
def _icon_mask(noun: str) -> np.ndarray:
    rows = ICONS[noun]
    return np.kron(np.array([[c == "#" for c in row] for row in rows]), np.ones((2, 2), bool))


@cache
def _letter_mask(letter: str) -> np.ndarray:
    return np.array([[c == "#" for c in row] for row in LETTERS[letter]])


@cache
def handwritten() -> tuple[np.ndarray, np.ndarray]:
    """Real digits written by people: (1797, 8, 8) in 0..1 and their classes (scikit-learn's copy of UCI's test set)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return np.asarray(data.images, np.float32) / 16.0, np.asarray(data.target)


@cache
def digit_pool(digit: int, split: Split) -> np.ndarray:
    """Indices of one class in a draw; 70 % train, 10 % validation, 20 % test, fixed by position in the file."""
    wanted = np.flatnonzero(handwritten()[1] == digit)
    rank = np.arange(len(wanted)) % 10
    return wanted[{"train": rank < 7, "validation": rank == 7, "test": rank > 7}[split]]


def draw(scene: Scene, rng: np.random.Generator, split: Split = "train") -> Picture:
    """Paint a scene. Background, tints and places jitter a little; a digit is one of the real ones of `split`."""
    canvas = np.empty((SIZE, SIZE, 3), np.float32)
    canvas[:] = rng.integers(12, 44)
    for thing in scene.things:
        top, left = thing.row * CELL, thing.column * CELL
        tint = np.array(COLORS[thing.color], np.float32) + rng.integers(-12, 13, 3)
        if thing.kind.startswith("digit "):
            pool = digit_pool(NUMBERS.index(thing.kind[6:]), split)
            strokes = np.kron(handwritten()[0][pool[rng.integers(len(pool))]], np.ones((2, 2), np.float32))
            box = canvas[top : top + CELL, left : left + CELL]
            box += strokes[:, :, None] * (tint - box)
            continue
        mask = _shape_mask(thing.kind) if thing.kind in SHAPES else _icon_mask(thing.kind)
        top, left = top + int(rng.integers(3)), left + int(rng.integers(3))
        canvas[top : top + 14, left : left + 14][mask] = tint
    if scene.lines:
        tint = np.array(COLORS[scene.ink], np.float32) + rng.integers(-12, 13, 3)
        for row, word in scene.lines:
            top = row * PATCH + int(rng.integers(2))
            for i, letter in enumerate(word):
                left = i * PATCH + 1
                canvas[top : top + 7, left : left + 5][_letter_mask(letter)] = tint
    return np.clip(canvas, 0, 255).astype(np.uint8)


def labels(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """What each patch shows: (36,) class in KINDS and (36,) class in TINTS."""
    kinds, tints = np.zeros((GRID, GRID), np.int64), np.zeros((GRID, GRID), np.int64)
    for thing in scene.things:
        area = np.s_[2 * thing.row : 2 * thing.row + 2, 2 * thing.column : 2 * thing.column + 2]
        kinds[area], tints[area] = KINDS.index(thing.kind), TINTS.index(thing.color)
    for row, word in scene.lines:
        kinds[row, : len(word)], tints[row, : len(word)] = KINDS.index(f"word {word}"), TINTS.index(scene.ink)
    return kinds.ravel(), tints.ravel()
