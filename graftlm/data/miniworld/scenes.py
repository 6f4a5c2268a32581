"""What is hidden behind the files: a scene per modality, how scenes are drawn, and to which split each belongs.

Attributes are positions in the lists of `words`; -1 means "does not apply". A scene holds nothing that its
rendering doesn't show, so two scenes are equal exactly when they show the same.

On a modality's second visit its scenes have attributes that the first never has: images get places and a
coloured frame, videos a second motion, sounds a melody and a second instrument, solids a stance or relative sizes.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from graftlm.core.errors import DataError
from graftlm.data.miniworld.words import (
    BRIGHTNESS,
    COLORS,
    ENVELOPES,
    INSTRUMENTS,
    LARGER,
    MELODIES,
    MOTIONS,
    NOISES,
    PITCHES,
    PLACES,
    PROPORTIONS,
    RHYTHMS,
    SHAPES,
    SIZES,
    SOLIDS,
    SPEEDS,
    SURFACES,
    TEXTURES,
    TILTS,
)

__all__ = [
    "DIRECTIONS",
    "MODALITIES",
    "SPLITS",
    "AudioScene",
    "ImageScene",
    "PointScene",
    "Scene",
    "Solid",
    "Split",
    "Thing",
    "VideoScene",
    "Visit",
    "describe",
    "draw",
    "modality_of",
    "split_of",
    "visit_of",
]

MODALITIES = ("image", "video", "audio", "point")
Split = Literal["train", "val", "test"]
Visit = Literal[1, 2]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
DIRECTIONS = 4
"""Motions below this number are directions, and have a speed."""

_TRAIN, _VAL = 0.7, 0.8
_TURN = MOTIONS.index("turn")
_ATTEMPTS = 100_000


@dataclass(frozen=True, slots=True)
class Thing:
    """A flat shape of an image."""

    color: int
    shape: int
    size: int
    texture: int


@dataclass(frozen=True, slots=True)
class ImageScene:
    """``count`` equal things, or two different ones: the first left of (relation 0) or above (1) the second.

    Second visit: one thing or two, each at its place; a frame around the image.
    """

    things: tuple[Thing, ...]
    count: int
    background: int
    relation: int = -1
    places: tuple[int, ...] = ()
    frame: int = -1


@dataclass(frozen=True, slots=True)
class VideoScene:
    """A shape that moves or changes. ``turned`` is the colour it turns into; second visit: ``then`` a second motion."""

    color: int
    shape: int
    motion: int
    background: int
    speed: int = -1
    turned: int = -1
    then: int = -1


@dataclass(frozen=True, slots=True)
class AudioScene:
    """Notes of one instrument; a rhythm needs three. Second visit: a melody, then a note of a ``second`` instrument."""

    instrument: int
    pitch: int
    count: int
    envelope: int
    background: int
    rhythm: int = -1
    melody: int = -1
    second: int = -1


@dataclass(frozen=True, slots=True)
class Solid:
    """A body of a point cloud."""

    color: int
    solid: int


@dataclass(frozen=True, slots=True)
class PointScene:
    """One solid with a proportion, or two: stacked (the first on top) or side by side.

    Second visit: a single solid is tall and has a stance; of two, one may be ``larger``.
    """

    parts: tuple[Solid, ...]
    surface: int
    stacked: bool = False
    proportion: int = -1
    tilt: int = -1
    larger: int = -1


Scene = ImageScene | VideoScene | AudioScene | PointScene

_MODALITY: dict[type[Scene], str] = {ImageScene: "image", VideoScene: "video", AudioScene: "audio", PointScene: "point"}


def modality_of(scene: Scene) -> str:
    """The modality that shows this scene."""
    return _MODALITY[type(scene)]


def visit_of(scene: Scene) -> Visit:
    """The visit on which the modality shows such scenes."""
    match scene:
        case ImageScene():
            again = scene.frame >= 0
        case VideoScene():
            again = scene.then >= 0
        case AudioScene():
            again = scene.melody >= 0
        case PointScene():
            again = scene.tilt >= 0 or scene.larger >= 0
    return 2 if again else 1


def describe(scene: Scene) -> dict[str, Any]:
    """Everything the scene shows, as plain values: its canonical description."""
    return {"modality": modality_of(scene), **asdict(scene)}


def split_of(scene: Scene) -> Split:
    """The split a scene belongs to, for good: 70 / 10 / 20 by a hash of its description."""
    text = json.dumps(describe(scene), sort_keys=True, separators=(",", ":"))
    share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    return "train" if share < _TRAIN else "val" if share < _VAL else "test"


def draw(
    modality: str,
    rng: np.random.Generator,
    split: Split | None = None,
    visit: Visit = 1,
    wanted: Callable[[Any], bool] | None = None,
) -> Scene:
    """A random scene of a split (None: of any), drawn again until it falls there and is ``wanted``.

    Raises:
        DataError: the modality is unknown, or no such scene turned up.
    """
    if modality not in _DRAW:
        raise DataError(f"the mini world has no modality '{modality}' - expected one of {', '.join(MODALITIES)}.")
    for _ in range(_ATTEMPTS):
        scene = _DRAW[modality](rng, visit == 2)
        if (wanted is None or wanted(scene)) and (split is None or split_of(scene) == split):
            return scene
    raise DataError(
        f"no {modality} scene of split '{split}' (visit {visit}) meets the condition after {_ATTEMPTS} draws - "
        "the condition must be possible; loosen it."
    )


def _below(rng: np.random.Generator, values: tuple[str, ...]) -> int:
    return int(rng.integers(len(values)))


def _two(rng: np.random.Generator, values: tuple[str, ...]) -> tuple[int, int]:
    """Two different positions, in random order."""
    first, step = int(rng.integers(len(values))), int(rng.integers(1, len(values)))
    return first, (first + step) % len(values)


def _draw_image(rng: np.random.Generator, again: bool) -> ImageScene:
    single = bool(rng.random() < 0.5)
    looks = zip(_two(rng, COLORS), _two(rng, SHAPES), strict=True)
    pair = [Thing(color, shape, _below(rng, SIZES), _below(rng, TEXTURES)) for color, shape in looks]
    things = tuple(pair[:1] if single else pair)
    background = _below(rng, BRIGHTNESS)
    if again:
        places = (_below(rng, PLACES),) if single else _two(rng, PLACES[:4])
        return ImageScene(things, len(things), background, places=places, frame=_below(rng, COLORS))
    if single:
        return ImageScene(things, int(rng.integers(1, 5)), background)
    return ImageScene(things, 2, background, relation=int(rng.integers(2)))


def _draw_video(rng: np.random.Generator, again: bool) -> VideoScene:
    motion, then = _two(rng, MOTIONS)
    color, turned = _two(rng, COLORS)
    shape, speed, background = _below(rng, SHAPES), _below(rng, SPEEDS), _below(rng, BRIGHTNESS)
    if not again:
        then = -1
    return VideoScene(
        color,
        shape,
        motion,
        background,
        speed=speed if motion < DIRECTIONS and not again else -1,
        turned=turned if _TURN in (motion, then) else -1,
        then=then,
    )


def _draw_audio(rng: np.random.Generator, again: bool) -> AudioScene:
    instrument, second = _two(rng, INSTRUMENTS)
    pitch, background = _below(rng, PITCHES), _below(rng, NOISES)
    if again:
        count, melody = int(rng.integers(2, 5)), _below(rng, MELODIES)
        return AudioScene(instrument, pitch, count, 0, background, melody=melody, second=second)
    count, envelope, rhythm = int(rng.integers(1, 5)), _below(rng, ENVELOPES), _below(rng, RHYTHMS)
    return AudioScene(instrument, pitch, count, envelope, background, rhythm=rhythm if count >= 3 else -1)


def _draw_point(rng: np.random.Generator, again: bool) -> PointScene:
    arrangement = int(rng.integers(3))
    looks = zip(_two(rng, COLORS), _two(rng, SOLIDS), strict=True)
    parts = tuple(Solid(color, solid) for color, solid in looks)
    surface = _below(rng, SURFACES)
    if arrangement == 0:
        proportion = PROPORTIONS.index("tall") if again else _below(rng, PROPORTIONS)
        return PointScene(parts[:1], surface, proportion=proportion, tilt=_below(rng, TILTS) if again else -1)
    return PointScene(parts, surface, stacked=arrangement == 1, larger=_below(rng, LARGER) if again else -1)


_DRAW: dict[str, Callable[[np.random.Generator, bool], Scene]] = {
    "image": _draw_image,
    "video": _draw_video,
    "audio": _draw_audio,
    "point": _draw_point,
}
