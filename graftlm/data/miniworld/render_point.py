"""Point scenes as 512 coloured points."""

import numpy as np
from numpy.typing import NDArray

from graftlm.data.miniworld.canvas import PALETTE, Array, Labels
from graftlm.data.miniworld.scenes import PointScene, Solid

__all__ = ["POINTS", "render_point"]

POINTS = 512

Cloud = NDArray[np.float64]

_PROPORTIONS = ((1.0, 1.0, 1.0), (0.6, 0.6, 1.7), (1.3, 1.3, 0.45))
_ROUGHNESS = (0.008, 0.06)
_LENGTH = 1.7
_TILTS = (0.0, 0.7, np.pi / 2)
_LARGE, _LITTLE = 1.1, 0.62


def render_point(scene: PointScene, rng: np.random.Generator) -> tuple[Array, Labels]:
    """A scene as a cloud, in random order.

    Returns:
        Float (512, 6): xyz, then rgb in [0, 1]. Labels, all (): ``arrangement`` (one, stacked, side by side),
        ``color1``, ``solid1``, ``color2``, ``solid2``, ``proportion``, ``surface``, ``tilt``, ``larger``.
    """
    clouds = _single(scene, rng) if len(scene.parts) == 1 else _double(scene, rng)
    noise = _ROUGHNESS[scene.surface]
    cloud = np.concatenate(
        [
            np.concatenate([points + rng.normal(0, noise, points.shape), _colors(part, len(points), rng)], 1)
            for part, points in zip(scene.parts, clouds, strict=True)
        ]
    )
    cloud[:, :3] = _spin(cloud[:, :3], rng.uniform(-0.25, 0.25)) + rng.normal(0, 0.05, 3)
    first, second = scene.parts[0], scene.parts[1] if len(scene.parts) == 2 else Solid(-1, -1)
    labels = {
        "arrangement": np.array(0 if len(scene.parts) == 1 else 1 if scene.stacked else 2),
        "color1": np.array(first.color),
        "solid1": np.array(first.solid),
        "color2": np.array(second.color),
        "solid2": np.array(second.solid),
        "proportion": np.array(scene.proportion),
        "surface": np.array(scene.surface),
        "tilt": np.array(scene.tilt),
        "larger": np.array(scene.larger),
    }
    return rng.permutation(cloud).astype(np.float32), labels


def _single(scene: PointScene, rng: np.random.Generator) -> list[Cloud]:
    points = _surface(scene.parts[0].solid, POINTS, rng) * _PROPORTIONS[scene.proportion] * rng.uniform(0.9, 1.1)
    if scene.tilt >= 0:
        # even a torus must be longer than wide for its stance to show
        points[:, 2] *= _LENGTH / np.ptp(points[:, 2])
    points = _spin(points, rng.uniform(0, 2 * np.pi))
    if scene.tilt > 0:
        # towards +x or -x only: the final turn about z is small, so that the stance stays readable
        angle = (_TILTS[scene.tilt] + rng.uniform(-0.1, 0.1)) * rng.choice([-1, 1])
        points = points @ np.array([[np.cos(angle), 0, -np.sin(angle)], [0, 1, 0], [np.sin(angle), 0, np.cos(angle)]])
    return [points]


def _double(scene: PointScene, rng: np.random.Generator) -> list[Cloud]:
    clouds = []
    for index, part in enumerate(scene.parts):
        sign = 1 - 2 * index
        points = _spin(_surface(part.solid, POINTS // 2, rng), rng.uniform(0, 2 * np.pi)) * rng.uniform(0.75, 1.0)
        if scene.larger in (0, 1):
            points *= _LARGE if scene.larger == index else _LITTLE
        if scene.stacked:
            offset = np.array([rng.normal(0, 0.04), rng.normal(0, 0.04), 0.55 * sign])
        else:
            offset = np.array([-0.68 * sign, rng.normal(0, 0.04), 0.0])
        clouds.append(points + offset)
    return clouds


def _spin(points: Cloud, angle: float) -> Cloud:
    """Turn about the vertical axis."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.asarray(points @ np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]]), np.float64)


def _colors(part: Solid, count: int, rng: np.random.Generator) -> Cloud:
    """(count, 3): the part's colour, jittered as a whole and per point."""
    jitter = rng.normal(0, 0.04, 3) + rng.normal(0, 0.06, (count, 3))
    return np.asarray(np.clip(PALETTE[part.color] + jitter, 0, 1), np.float64)


def _surface(solid: int, count: int, rng: np.random.Generator) -> Cloud:
    """Points (count, 3) on a solid about 1 across: sphere, cube, cylinder, cone, torus or pyramid."""
    height, angle = rng.uniform(0, 1, count), rng.uniform(0, 2 * np.pi, count)
    circle = np.stack([np.cos(angle), np.sin(angle)], 1)
    disc = circle * np.sqrt(rng.random((count, 1)))
    taper = np.sqrt(height)
    match solid:
        case 0:
            points = rng.normal(0, 1, (count, 3))
            return np.asarray(points / np.linalg.norm(points, axis=1, keepdims=True) * 0.62)
        case 1:
            points, axis = rng.uniform(-0.5, 0.5, (count, 3)), rng.integers(3, size=count)
            points[np.arange(count), axis] = np.where(rng.random(count) < 0.5, -0.5, 0.5)
            return points
        case 2:
            ends = np.where(rng.random(count) < 0.5, -0.5, 0.5)
            return _capped(circle * 0.5, height - 0.5, disc * 0.5, ends, 0.33, rng)
        case 3:
            return _capped(circle * 0.6 * taper[:, None], 0.5 - taper, disc * 0.6, np.full(count, -0.5), 0.25, rng)
        case 4:
            tube = rng.uniform(0, 2 * np.pi, count)
            return np.column_stack([circle * (0.5 + 0.19 * np.cos(tube))[:, None], 0.19 * np.sin(tube)])
        case _:
            side, along = rng.integers(4, size=count), rng.uniform(-1, 1, count)
            edge = 0.6 * taper
            sign = np.where(side % 2 == 0, edge, -edge)
            flat = np.column_stack([np.where(side < 2, sign, along * edge), np.where(side < 2, along * edge, sign)])
            return _capped(flat, 0.5 - taper, rng.uniform(-0.6, 0.6, (count, 2)), np.full(count, -0.5), 0.25, rng)


def _capped(wall: Cloud, heights: Cloud, cap: Cloud, ends: Cloud, share: float, rng: np.random.Generator) -> Cloud:
    """A wall (n, 2) at heights (n,), of which a share is moved to the caps (n, 2) at the ends (n,)."""
    capped = rng.random(len(wall)) < share
    return np.column_stack([np.where(capped[:, None], cap, wall), np.where(capped, ends, heights)])
