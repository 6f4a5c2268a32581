"""Questions over all four inputs at once, in the manner of MCUB-4: what do they share?

Each question has four options, of which exactly one is true of every input it names; wrong options are true of
only some of the inputs where the scenes allow it.

Paper:   Chen et al., Model Composition for Multimodal Large Language Models, ACL 2024, arXiv:2402.12750 (MCUB).
Differs: scenes are drawn to share something and questions come from templates, not from GPT-4 reading captions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftlm.data.miniworld.language import pick
from graftlm.data.miniworld.scenes import AudioScene, ImageScene, PointScene, Scene, Split, VideoScene, draw
from graftlm.data.miniworld.words import BRIGHTNESS, COLORS, INSTRUMENTS, LETTERS, NUMBERS

__all__ = ["KINDS", "JointQuestion", "colors_of", "draw_joint", "offer", "shuffled"]


@dataclass(frozen=True, slots=True)
class JointQuestion:
    """A question over several scenes.

    Attributes:
        scenes: per modality, all four.
        names: the modalities that the answer depends on.
        text: the question with its lettered options.
        options: in the order of their letters; ``options[LETTERS.index(letter)]`` is right.
    """

    kind: str
    scenes: dict[str, Scene]
    names: tuple[str, ...]
    text: str
    options: tuple[str, ...]
    letter: str


def draw_joint(
    rng: np.random.Generator, split: Split, letter: str | None = None, kind: str | None = None
) -> JointQuestion:
    """A random question of a kind, whose right option stands under a letter."""
    kind = kind or pick(rng, KINDS)
    letter = letter or pick(rng, LETTERS)
    scenes, text, right, wrong = _DRAW[kind](rng, split)
    text, options = offer(rng, text, right, wrong, letter)
    return JointQuestion(kind, scenes, _NAMES[kind], text, options, letter)


def offer(
    rng: np.random.Generator, text: str, right: str, wrong: Sequence[str], letter: str
) -> tuple[str, tuple[str, ...]]:
    """The question with four lettered options, the right one under its letter, and the options in order."""
    options = [wrong[index] for index in rng.permutation(len(LETTERS) - 1)]
    options.insert(LETTERS.index(letter), right)
    listed = " ".join(f"{letter} {option}" for letter, option in zip(LETTERS, options, strict=True))
    return f"{text} {listed} . answer with a letter .", tuple(options)


_Drawn = tuple[dict[str, Scene], str, str, list[str]]


def shuffled(rng: np.random.Generator, values: Sequence[int]) -> list[int]:
    """The values in random order."""
    return [values[index] for index in rng.permutation(len(values))]


def colors_of(scene: Scene) -> set[int]:
    """The colours that a picture, a clip or a model shows; a sound has none."""
    match scene:
        case ImageScene():
            return {thing.color for thing in scene.things}
        case VideoScene():
            return {scene.color, scene.turned} - {-1}
        case PointScene():
            return {part.color for part in scene.parts}
        case AudioScene():
            return set()


def _same_color(rng: np.random.Generator, split: Split) -> tuple[dict[str, Scene], int, list[int]]:
    """Scenes whose pictures share one colour only; that colour; the others, first those that some picture shows."""
    while True:
        color = int(rng.integers(len(COLORS)))
        scenes: dict[str, Scene] = {
            "image": draw("image", rng, split, wanted=lambda scene: color in colors_of(scene)),  # noqa: B023
            "video": draw("video", rng, split, wanted=lambda scene: color in colors_of(scene)),  # noqa: B023
            "audio": draw("audio", rng, split),
            "point": draw("point", rng, split, wanted=lambda scene: color in colors_of(scene)),  # noqa: B023
        }
        shown = _shown(scenes)
        shared, some = set.intersection(*shown), set.union(*shown) - {color}
        if shared == {color} and some:
            absent = [other for other in range(len(COLORS)) if other not in some and other != color]
            return scenes, color, shuffled(rng, sorted(some)) + shuffled(rng, absent)


def _shown(scenes: dict[str, Scene]) -> list[set[int]]:
    """The colours of each picture."""
    return [colors_of(scene) for name, scene in scenes.items() if name != "audio"]


def _color(rng: np.random.Generator, split: Split) -> _Drawn:
    scenes, color, others = _same_color(rng, split)
    text = "which color appears in the picture and the video and the model ?"
    return scenes, text, COLORS[color], [COLORS[other] for other in others[:3]]


def _combination(rng: np.random.Generator, split: Split) -> _Drawn:
    """The shared colour and the instrument: one option is wrong in the colour, one in the instrument, one in both."""
    scenes, color, others = _same_color(rng, split)
    audio = scenes["audio"]
    assert isinstance(audio, AudioScene)  # narrows the type; `draw` made it
    right = COLORS[color], INSTRUMENTS[audio.instrument]
    silent = shuffled(rng, [index for index in range(len(INSTRUMENTS)) if index != audio.instrument])
    color_of_some, silent_one = COLORS[others[0]], INSTRUMENTS[silent[0]]
    wrong = [(color_of_some, right[1]), (right[0], silent_one), (color_of_some, silent_one)]
    text = "which color do all views share and which instrument plays ?"
    return scenes, text, _both(right), [_both(option) for option in wrong]


def _both(option: tuple[str, str]) -> str:
    return f"{option[0]} and {option[1]}"


def _number(rng: np.random.Generator, split: Split) -> _Drawn:
    """As many objects as notes; the model has another number of parts."""
    number = int(rng.integers(1, 5))
    scenes: dict[str, Scene] = {
        "image": draw("image", rng, split, wanted=lambda scene: scene.count == number),
        "video": draw("video", rng, split),
        "audio": draw("audio", rng, split, wanted=lambda scene: scene.count == number),
        "point": draw("point", rng, split, wanted=lambda scene: len(scene.parts) != number),
    }
    wrong = [NUMBERS[other] for other in range(1, 5) if other != number]
    return scenes, "which number do the objects of the picture and the notes share ?", NUMBERS[number], wrong


def _brightness(rng: np.random.Generator, split: Split) -> _Drawn:
    """One brightness of two backgrounds, or two different ones."""
    options = [*BRIGHTNESS, "different"]
    answer = int(rng.integers(len(options)))
    image = draw("image", rng, split, wanted=lambda scene: answer == len(BRIGHTNESS) or scene.background == answer)
    assert isinstance(image, ImageScene)  # narrows the type; `draw` made it
    same = answer < len(BRIGHTNESS)
    scenes: dict[str, Scene] = {
        "image": image,
        "video": draw("video", rng, split, wanted=lambda scene: (scene.background == image.background) == same),
        "audio": draw("audio", rng, split),
        "point": draw("point", rng, split),
    }
    text = "which background do the picture and the video share ?"
    return scenes, text, options.pop(answer), options


_NAMES = {
    "color": ("image", "video", "point"),
    "combination": ("image", "video", "audio", "point"),
    "number": ("image", "audio"),
    "brightness": ("image", "video"),
}
_DRAW: dict[str, Callable[[np.random.Generator, Split], Any]] = {
    "color": _color,
    "combination": _combination,
    "number": _number,
    "brightness": _brightness,
}
KINDS = tuple(_DRAW)
"""What may be asked."""
