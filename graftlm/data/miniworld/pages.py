"""Pictures beyond scenes: boards of things, charts, pages to read, things in boxes, and signs beside things.

Everything is made of what the mini world's image encoder has learned to see, colours and shapes on the 4 x 4 cells of its
tokens; text is single letters and digits of 5 x 7 dots, as large as the picture allows.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from graftlm.core.errors import DataError
from graftlm.data.miniworld.canvas import PALETTE, SIDE, Array, background, noisy, paint
from graftlm.data.miniworld.scenes import SPLITS, Split, Thing
from graftlm.data.miniworld.words import BRIGHTNESS, LETTERS

__all__ = [
    "DIGITS",
    "GLYPHS",
    "HEIGHTS",
    "Board",
    "Chart",
    "Page",
    "Picture",
    "Scatter",
    "Sign",
    "describe_picture",
    "draw_picture",
    "render_picture",
    "split_of_picture",
]

DIGITS = ("1", "2", "3", "4")
GLYPHS = LETTERS + DIGITS
"""What can be written."""

HEIGHTS = 4
"""A bar is one to four cells high."""

_DOTS = {
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "B": "11110 10001 10001 11110 10001 10001 11110",
    "C": "01111 10000 10000 10000 10000 10000 01111",
    "D": "11110 10001 10001 10001 10001 10001 11110",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "11110 00001 00001 01110 00001 00001 11110",
    "4": "10010 10010 10010 11111 00010 00010 00010",
}
_MASKS = {name: np.array([[int(dot) for dot in row] for row in rows.split()], bool) for name, rows in _DOTS.items()}

_CELL = SIDE // 4
_TRAIN, _VAL = 0.7, 0.8
_ATTEMPTS = 100_000


@dataclass(frozen=True, slots=True)
class Board:
    """Two to four things, each in a quarter of its own: ``quarters`` counts from the top left, row by row."""

    things: tuple[Thing, ...]
    quarters: tuple[int, ...]
    background: int


@dataclass(frozen=True, slots=True)
class Chart:
    """Bars of one colour on a light ground, or a curve's dots, from left to right: heights in cells, from 1."""

    color: int
    heights: tuple[int, ...]
    bars: bool


@dataclass(frozen=True, slots=True)
class Page:
    """A letter of `LETTERS` left of a digit of `DIGITS`, in one colour."""

    letter: int
    digit: int
    color: int
    background: int


@dataclass(frozen=True, slots=True)
class Sign:
    """A thing at the top or the bottom, and in the other half something written."""

    thing: Thing
    glyph: int
    background: int
    below: bool
    """Whether the writing is below the thing."""


@dataclass(frozen=True, slots=True)
class Scatter:
    """Things on the grid of cells, each in the cells of its box: a small one fills one, a large one two by two.

    Attributes:
        corners: column and row of each box's upper left cell.
    """

    things: tuple[Thing, ...]
    corners: tuple[tuple[int, int], ...]
    background: int

    def box(self, index: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom edge of a thing's box, in cells."""
        (column, row), side = self.corners[index], 1 + self.things[index].size
        return column, row, column + side, row + side


Picture = Board | Chart | Page | Scatter | Sign
P = TypeVar("P", Board, Chart, Page, Scatter, Sign)


def describe_picture(picture: Picture) -> dict[str, Any]:
    """Everything the picture shows, as plain values: its canonical description."""
    return {"picture": type(picture).__name__.lower(), **asdict(picture)}


def split_of_picture(picture: Picture) -> Split:
    """The split a picture belongs to, for good, as `scenes.split_of`: 70 / 10 / 20 by a hash of its description."""
    text = json.dumps(describe_picture(picture), sort_keys=True, separators=(",", ":"))
    share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    return SPLITS[0 if share < _TRAIN else 1 if share < _VAL else 2]


def draw_picture(draw: Callable[[np.random.Generator], P], rng: np.random.Generator, split: Split) -> P:
    """A random picture of a split: drawn again until it falls there.

    Raises:
        DataError: none turned up.
    """
    for _ in range(_ATTEMPTS):
        picture = draw(rng)
        if split_of_picture(picture) == split:
            return picture
    raise DataError(
        f"no picture of split '{split}' after {_ATTEMPTS} draws - there must be more than a handful; vary it more."
    )


def render_picture(picture: Picture, rng: np.random.Generator) -> Array:
    """Float (48, 48, 3) in [0, 1]."""
    light = len(BRIGHTNESS) - 1
    ground = picture.background if isinstance(picture, Board | Page | Scatter | Sign) else light
    image = background(rng, ground)
    match picture:
        case Board():
            for thing, quarter in zip(picture.things, picture.quarters, strict=True):
                _put(image, thing, 12 + 24 * (quarter % 2), 12 + 24 * (quarter // 2), rng)
        case Chart():
            _chart(image, picture, rng)
        case Page():
            _page(image, picture, rng)
        case Scatter():
            for index, thing in enumerate(picture.things):
                left, top, right, bottom = picture.box(index)
                _put(image, thing, _CELL * (left + right) / 2, _CELL * (top + bottom) / 2, rng, shift=1)
        case Sign():
            x = 24 + rng.uniform(-10, 10)
            _put(image, picture.thing, x, 12 if picture.below else 36, rng)
            left = 16 + int(rng.integers(-2, 3))
            _write(image, GLYPHS[picture.glyph], left, 26 if picture.below else 2, 3, _ink(picture.background))
    return noisy(image, rng)


def _put(image: Array, thing: Thing, x: float, y: float, rng: np.random.Generator, shift: float = 2) -> None:
    dx, dy = rng.uniform(-shift, shift, 2)
    radius = 4.2 + rng.uniform(-0.5, 0.5) if thing.size == 0 else 7.8 + rng.uniform(-0.6, 0.8)
    paint(image, thing.color, thing.shape, thing.texture, x + dx, y + dy, radius, rng.normal(0, 0.04, 3))


def _chart(image: Array, chart: Chart, rng: np.random.Generator) -> None:
    tint = rng.normal(0, 0.04, 3)
    for index, height in enumerate(chart.heights):
        middle, top = SIDE / len(chart.heights) * (index + 0.5), SIDE - _CELL * height
        if chart.bars:
            columns = slice(round(middle - 4), round(middle + 4))
            image[top + int(rng.integers(1, 4)) : SIDE - 1, columns] = np.clip(PALETTE[chart.color] + tint, 0, 1)
        else:
            _dot(image, chart.color, middle, top + _CELL / 2, rng)


def _dot(image: Array, color: int, x: float, y: float, rng: np.random.Generator) -> None:
    """A disc of about a cell."""
    dx, dy = rng.uniform(-1, 1, 2)
    paint(image, color, 0, 0, x + dx, y + dy, 5, rng.normal(0, 0.04, 3))


def _page(image: Array, page: Page, rng: np.random.Generator) -> None:
    ink = np.clip(PALETTE[page.color] + rng.normal(0, 0.04, 3), 0, 1)
    for glyph, left in ((LETTERS[page.letter], 2), (DIGITS[page.digit], 26)):
        dx, dy = rng.integers(0, 2), rng.integers(-1, 2)
        _write(image, glyph, left + int(dx), 10 + int(dy), 4, ink)


def _write(image: Array, glyph: str, left: int, top: int, scale: int, ink: NDArray[np.floating]) -> None:
    """One glyph with its upper left corner there; what does not fit is cut off."""
    mask = np.kron(_MASKS[glyph], np.ones((scale, scale), bool))
    window = image[top : top + mask.shape[0], left : left + mask.shape[1]]
    window[mask[: window.shape[0], : window.shape[1]]] = ink


def _ink(brightness: int) -> NDArray[np.floating]:
    """Black on light ground, white on dark."""
    return np.full(3, 0.02 if brightness == len(BRIGHTNESS) - 1 else 0.98)
