"""Synthetic scenes: which objects are where, how they look, what is said and asked about them.

Objects of a theme come together in training (each of the four with probability 0.85) and are torn apart in testing
(two of the four, among strangers), and some objects are hardly visible. So a model learns to say what it
only expects, and can be caught at it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from scripts.toy_vlm.glyphs import OBJECTS, SIZE, THEMES, bitmaps

GRID = 5
IMAGE_SIZE = GRID * SIZE

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 50, 47), "green": (60, 170, 60), "blue": (50, 90, 220),
    "yellow": (235, 215, 60), "purple": (150, 60, 190), "white": (245, 245, 245),
}  # fmt: skip
COLOUR_NAMES = tuple(COLOURS)
BACKGROUND = (26, 26, 30)
NOISE = 18.0  # standard deviation, of 255

MEMBER_PRESENT = 0.85
MOST_STRANGERS = 3
FAINT = 0.25  # share of objects that are hardly visible
FAINT_CONTRAST = (0.0, 0.12)  # of the way from the background to the object's colour
CLEAR_CONTRAST = (0.6, 1.0)

Kind = Literal["natural", "broken"]
Ability = Literal["colour", "count", "existence"]
ABILITIES: tuple[Ability, ...] = ("colour", "count", "existence")
ASKED_OF_EACH = 4

_BITMAPS = bitmaps()
_THEME_SIZE = len(THEMES[0])


@dataclass(frozen=True)
class Placed:
    """One object in a scene; ``what`` and ``colour`` index OBJECTS and COLOUR_NAMES, ``cell`` the grid."""

    what: int
    colour: int
    cell: int
    contrast: float

    @property
    def name(self) -> str:
        """The object's noun."""
        return OBJECTS[self.what]


@dataclass(frozen=True)
class Question:
    """A question with a one-word answer."""

    ability: Ability
    words: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Scene:
    """Objects, their picture as (IMAGE_SIZE, IMAGE_SIZE, 3) bytes, one caption and questions."""

    objects: tuple[Placed, ...]
    picture: NDArray[np.uint8]
    caption: tuple[str, ...]
    questions: tuple[Question, ...]

    @property
    def names(self) -> frozenset[str]:
        """What is there, seen or hardly seen."""
        return frozenset(placed.name for placed in self.objects)


def scenes(kind: Kind, seed: int, stream: int) -> Iterator[Scene]:
    """Endless scenes; the same for the same ``kind``, ``seed`` and ``stream``."""
    rng = np.random.default_rng([seed, stream, kind == "broken"])
    while True:
        objects = _place(_natural(rng) if kind == "natural" else _broken(rng), rng)
        yield Scene(objects, _picture(objects, rng), _caption(objects, rng), _questions(objects, rng))


def _natural(rng: np.random.Generator) -> list[int]:
    """Most members of one theme, and up to three strangers."""
    theme = int(rng.integers(len(THEMES)))
    members = [theme * _THEME_SIZE + int(i) for i in np.flatnonzero(rng.random(_THEME_SIZE) < MEMBER_PRESENT)]
    strangers = _strangers(theme, int(rng.integers(MOST_STRANGERS + 1)), rng)
    return members + strangers or _natural(rng)


def _broken(rng: np.random.Generator) -> list[int]:
    """Two members of one theme, and three strangers."""
    theme = int(rng.integers(len(THEMES)))
    members = rng.permutation(_THEME_SIZE)[: _THEME_SIZE // 2]
    return [theme * _THEME_SIZE + int(i) for i in members] + _strangers(theme, MOST_STRANGERS, rng)


def _strangers(theme: int, n: int, rng: np.random.Generator) -> list[int]:
    """``n`` objects of other themes, no two of one."""
    others = rng.permutation([t for t in range(len(THEMES)) if t != theme])[:n]
    return [int(t) * _THEME_SIZE + int(rng.integers(_THEME_SIZE)) for t in others]


def _place(what: Sequence[int], rng: np.random.Generator) -> tuple[Placed, ...]:
    cells = rng.permutation(GRID * GRID)
    placed = []
    for number, cell in zip(what, cells, strict=False):
        low, high = FAINT_CONTRAST if rng.random() < FAINT else CLEAR_CONTRAST
        placed.append(
            Placed(number, int(rng.integers(len(COLOURS))), int(cell), float(rng.uniform(low, high)))
        )
    return tuple(placed)


def _picture(objects: Sequence[Placed], rng: np.random.Generator) -> NDArray[np.uint8]:
    background = np.array(BACKGROUND, dtype=np.float64)
    canvas = np.broadcast_to(background, (IMAGE_SIZE, IMAGE_SIZE, 3)).copy()
    for placed in objects:
        row, column = divmod(placed.cell, GRID)
        colour = np.array(COLOURS[COLOUR_NAMES[placed.colour]], dtype=np.float64)
        ink = placed.contrast * _BITMAPS[placed.what][:, :, None] * (colour - background)
        canvas[row * SIZE : (row + 1) * SIZE, column * SIZE : (column + 1) * SIZE] += ink
    canvas += rng.normal(0.0, NOISE, canvas.shape)
    return canvas.round().clip(0, 255).astype(np.uint8)


def _caption(objects: Sequence[Placed], rng: np.random.Generator) -> tuple[str, ...]:
    """The nouns in random order, each closed by a full stop, so that after any of them the caption may end."""
    words: list[str] = []
    for i in rng.permutation(len(objects)):
        words += [objects[int(i)].name, "."]
    return tuple(words)


def _questions(objects: Sequence[Placed], rng: np.random.Generator) -> tuple[Question, ...]:
    """ASKED_OF_EACH of each ability; half of the existence questions are about what is not there; shuffled."""

    def any_of(choices: Sequence[int]) -> int:
        return choices[int(rng.integers(len(choices)))]

    asked: list[Question] = []
    half = range(ASKED_OF_EACH // 2)
    for _ in range(ASKED_OF_EACH):
        placed = objects[any_of(range(len(objects)))]
        asked.append(Question("colour", ("colour", placed.name), COLOUR_NAMES[placed.colour]))
    shown = [any_of([placed.colour for placed in objects]) for _ in half]
    for colour in shown + [any_of(range(len(COLOURS))) for _ in half]:
        count = sum(placed.colour == colour for placed in objects)
        asked.append(Question("count", ("count", COLOUR_NAMES[colour]), str(count)))
    present = [placed.what for placed in objects]
    absent = [what for what in range(len(OBJECTS)) if what not in present]
    # Half of the absent ones are of a theme that is there: what one would expect to see.
    expected = [what for what in absent if what // _THEME_SIZE in {p // _THEME_SIZE for p in present}]
    for _ in half:
        not_there = any_of(expected if expected and rng.random() < 0.5 else absent)
        for what, answer in ((any_of(present), "yes"), (not_there, "no")):
            asked.append(Question("existence", ("exists", OBJECTS[what]), answer))
    return tuple(asked[int(i)] for i in rng.permutation(len(asked)))
