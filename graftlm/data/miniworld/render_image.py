"""Image scenes as 48 x 48 pictures."""

import numpy as np

from graftlm.data.miniworld.canvas import PALETTE, SIDE, Array, Labels, background, empty_cells, mark, noisy, paint
from graftlm.data.miniworld.scenes import ImageScene, Thing

__all__ = ["render_image"]

_CENTERS = ((11, 11), (37, 11), (11, 37), (37, 37), (24, 24))
_FRAME = 3


def render_image(scene: ImageScene, rng: np.random.Generator) -> tuple[Array, Labels]:
    """A scene as pixels.

    Returns:
        Float (48, 48, 3) in [0, 1], and labels: ``cell`` (4, 4, 5) of colour, shape, size, texture, presence;
        ``background``, ``count`` (number - 1), ``frame`` (0 none, else colour + 1), ``place`` (of the first thing), ().
    """
    image, cells = background(rng, scene.background), empty_cells()
    if scene.frame >= 0:
        _draw_frame(image, scene.frame, rng)
    for thing, x, y in _layout(scene, rng):
        radius = 4.2 + rng.uniform(-0.5, 0.5) if thing.size == 0 else 7.8 + rng.uniform(-0.6, 0.8)
        paint(image, thing.color, thing.shape, thing.texture, x, y, radius, rng.normal(0, 0.04, 3))
        mark(cells, x, y, thing.color, thing.shape, thing.size, thing.texture)
    labels = {
        "cell": cells,
        "background": np.array(scene.background),
        "count": np.array(scene.count - 1),
        "frame": np.array(scene.frame + 1),
        "place": np.array(scene.places[0] if scene.places else -1),
    }
    return noisy(image, rng), labels


def _layout(scene: ImageScene, rng: np.random.Generator) -> list[tuple[Thing, float, float]]:
    """Every thing to draw, with its centre."""
    if scene.places:
        centers = [_CENTERS[place] + rng.uniform(-1, 1, 2) for place in scene.places]
        return [(thing, float(x), float(y)) for thing, (x, y) in zip(scene.things, centers, strict=True)]
    if len(scene.things) == 2:
        near, far = rng.uniform(9, 15), rng.uniform(33, 39)
        one, other = rng.uniform(14, 34, 2)
        first, second = scene.things
        if scene.relation == 0:
            return [(first, near, one), (second, far, other)]
        return [(first, one, near), (second, other, far)]
    if scene.count == 1:
        x, y = rng.uniform(10, 38, 2)
        return [(scene.things[0], x, y)]
    corners = rng.permutation(4)[: scene.count]
    shifts = rng.uniform(-3.5, 3.5, (scene.count, 2))
    return [
        (scene.things[0], 12 + 24 * (corner % 2) + dx, 12 + 24 * (corner // 2) + dy)
        for corner, (dx, dy) in zip(corners, shifts, strict=True)
    ]


def _draw_frame(image: Array, color: int, rng: np.random.Generator) -> None:
    inner = slice(_FRAME, SIDE - _FRAME)
    middle = image[inner, inner].copy()
    image[:] = np.clip(PALETTE[color] + rng.normal(0, 0.04, 3), 0, 1)
    image[inner, inner] = middle
