"""Video scenes as eight frames of 48 x 48 pixels, one second."""

import numpy as np

from graftlm.data.miniworld.canvas import Array, Labels, background, empty_cells, mark, noisy, paint
from graftlm.data.miniworld.scenes import DIRECTIONS, VideoScene
from graftlm.data.miniworld.words import MOTIONS

__all__ = ["FRAMES", "render_video"]

FRAMES = 8

_STEPS = ((-1, 0), (1, 0), (0, -1), (0, 1))
_GROW, _SHRINK, _TURN = (MOTIONS.index(word) for word in ("grow", "shrink", "turn"))
_DISTANCE = (12.0, 24.0)
_DISTANCE_OF_TWO = 14.0
_GROWTH = 6.6
_RADII: dict[int | None, tuple[float, float]] = {_GROW: (3.4, 4.2), _SHRINK: (9.5, 11.0)}


def render_video(scene: VideoScene, rng: np.random.Generator) -> tuple[Array, Labels]:
    """A scene as frames. With two motions the first four frames show the first one.

    Returns:
        Float (8, 48, 48, 3) in [0, 1], and labels: ``cell`` (8, 4, 4, 5) of colour, shape, -1, 0, presence;
        ``background``, ``motion``, ``speed``, ``then``, all ().
    """
    center, growth, turned = _course(scene, rng)
    radius = _radius(scene, rng)
    tint, empty = rng.normal(0, 0.04, 3), background(rng, scene.background)
    frames, cells = [], []
    for frame in range(FRAMES):
        image, labels = empty.copy(), empty_cells()
        color = scene.turned if turned[frame] else scene.color
        x, y = np.clip(center[frame] + rng.normal(0, 0.4, 2), 4, 44)
        paint(image, color, scene.shape, 0, x, y, radius + growth[frame], tint)
        mark(labels, x, y, color, scene.shape, -1, 0)
        frames.append(noisy(image, rng))
        cells.append(labels)
    labels_of_clip = {
        "cell": np.stack(cells),
        "background": np.array(scene.background),
        "motion": np.array(scene.motion),
        "speed": np.array(scene.speed),
        "then": np.array(scene.then),
    }
    return np.stack(frames), labels_of_clip


def _radius(scene: VideoScene, rng: np.random.Generator) -> float:
    """Radius at the start: with room for whichever of growing and shrinking comes first."""
    first = next((motion for motion in (scene.motion, scene.then) if motion in (_GROW, _SHRINK)), None)
    return float(rng.uniform(*_RADII.get(first, (5.5, 7.5))))


def _course(scene: VideoScene, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Per frame the centre (8, 2), what is added to the radius (8,), and whether the colour has turned (8,)."""
    time = np.linspace(0, 1, FRAMES, dtype=np.float32)
    motions = [(scene.motion, time)]
    if scene.then >= 0:
        motions = [(scene.motion, np.clip(time * 2, 0, 1)), (scene.then, np.clip(time * 2 - 1, 0, 1))]
    distance = _DISTANCE[max(scene.speed, 0)] if scene.then < 0 else _DISTANCE_OF_TWO
    shift = np.zeros((FRAMES, 2), np.float32)
    growth, turned = np.zeros(FRAMES, np.float32), np.zeros(FRAMES, np.float32)
    for motion, progress in motions:
        if motion < DIRECTIONS:
            shift += progress[:, None] * np.array(_STEPS[motion], np.float32) * distance
        elif motion in (_GROW, _SHRINK):
            growth += progress * (_GROWTH if motion == _GROW else -_GROWTH)
        elif motion == _TURN:
            turned += progress > 0.5
    start = rng.uniform(18, 30, 2) - (shift.max(0) + shift.min(0)) / 2
    start = np.clip(start, 8 - shift.min(0), 40 - shift.max(0))
    return (start + shift).astype(np.float32), growth, turned
