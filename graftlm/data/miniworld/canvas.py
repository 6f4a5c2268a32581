"""Drawing shapes on small images: what the image and the video renderer share."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["CELLS", "PALETTE", "SIDE", "Array", "Labels", "background", "empty_cells", "mark", "noisy", "paint"]

Array = NDArray[np.float32]
Labels = dict[str, NDArray[np.int64]]

SIDE = 48
"""Pixels of an image's side."""
CELLS = 4
"""Label cells per side."""

PALETTE = np.array(
    [
        [0.85, 0.12, 0.12],
        [0.12, 0.65, 0.15],
        [0.12, 0.20, 0.85],
        [0.92, 0.85, 0.10],
        [0.50, 0.12, 0.60],
        [0.95, 0.55, 0.10],
        [0.98, 0.60, 0.75],
        [0.10, 0.80, 0.85],
    ],
    np.float32,
)
"""(8, 3) colours in the order of `words.COLORS`."""

_LEVELS = (0.05, 0.45, 0.92)
_ROWS, _COLUMNS = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)


def background(rng: np.random.Generator, brightness: int) -> Array:
    """(48, 48, 3) of one brightness, slightly tinted."""
    return np.full((SIDE, SIDE, 3), _LEVELS[brightness], np.float32) + rng.normal(0, 0.03, 3).astype(np.float32)


def _inside(shape: int, dx: Array, dy: Array, radius: float) -> NDArray[np.bool_]:
    across, along = np.abs(dx), np.abs(dy)
    match shape:
        case 0:
            return np.hypot(dx, dy) < radius
        case 1:
            return np.maximum(across, along) < 0.85 * radius
        case 2:
            return (dy < 0.7 * radius) & (dy > -radius) & (across < (dy + radius) * 0.55)
        case 3:
            wide, thin = radius, 0.3 * radius
            return ((across < thin) & (along < wide)) | ((along < thin) & (across < wide))
        case 4:
            distance = np.hypot(dx, dy)
            return (distance < radius) & (distance > 0.55 * radius)
        case _:
            return across + along < 1.15 * radius


def paint(
    image: Array, color: int, shape: int, texture: int, x: float, y: float, radius: float, tint: NDArray[np.floating]
) -> None:
    """Draw a shape into an image, in place. ``tint`` (3,) is added to its colour."""
    dx, dy = _COLUMNS - np.float32(x), _ROWS - np.float32(y)
    if texture == 1:
        shade = np.where((dx + dy) % 6 < 3, 1.0, 0.45)
    elif texture == 2:
        shade = np.where((dx % 5 < 2.2) & (dy % 5 < 2.2), 0.35, 1.0)
    else:
        shade = np.ones_like(dx)
    inside = _inside(shape, dx, dy, radius)
    image[inside] = shade[inside][:, None] * np.clip(PALETTE[color] + tint, 0, 1)


def noisy(image: Array, rng: np.random.Generator) -> Array:
    """The image with pixel noise, in [0, 1]."""
    return np.clip(image + rng.normal(0, 0.06, image.shape), 0, 1).astype(np.float32)


def empty_cells() -> NDArray[np.int64]:
    """(4, 4, 5) of -1: per cell colour, shape, size, texture, and 1 where the centre of a shape lies."""
    return np.full((CELLS, CELLS, 5), -1, np.int64)


def mark(cells: NDArray[np.int64], x: float, y: float, *values: int) -> None:
    """Note a shape in the cell that holds its centre."""
    cells[int(y * CELLS // SIDE), int(x * CELLS // SIDE)] = (*values, 1)
