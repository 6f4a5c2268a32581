"""Questions with lettered options: over every combination of inputs, and over one input alone.

A model that was composed of experts of single modalities is asked over pairs, triples and all four (`draw_combined`). As in
MUSIC-AVQA and MCUB some questions compare inputs and some are about one of them, with the others there to mislead; the
questions of a combination need, together, all of its inputs:

    color    all views (picture, video, model) share one colour; wrong are colours that only some of them show
    number   the picture shows as many objects as the sound has notes
    sound    the instrument, the number of notes, or the noise in the background
    video    the colour or the shape of what moves

Lettered questions over a single input (`draw_choice`) are for the experts, who learn from them to answer with a letter.

Paper:   MMER, ACL 2025, arXiv:2505.17110, Table 1 (combinations PI, IA, VI, VA, AVI, AVP, AIP, VIP and AVIP).
Differs: scenes are drawn to share something and questions come from templates; the paper takes MCUB, MUSIC-AVQA and
    ModelNet40 with images.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from graftlm.data.miniworld.instructions import pool_of
from graftlm.data.miniworld.joint import colors_of, offer, shuffled
from graftlm.data.miniworld.language import pick
from graftlm.data.miniworld.questions import Question, questions
from graftlm.data.miniworld.scenes import AudioScene, ImageScene, Scene, Split, draw
from graftlm.data.miniworld.words import COLORS, LETTERS, NUMBERS

__all__ = ["COMBINATIONS", "Choice", "CombinedQuestion", "draw_choice", "draw_combined"]

COMBINATIONS: Mapping[str, tuple[str, ...]] = {
    "pi": ("image", "point"),
    "ia": ("image", "audio"),
    "vi": ("image", "video"),
    "va": ("video", "audio"),
    "avi": ("image", "video", "audio"),
    "avp": ("video", "audio", "point"),
    "aip": ("image", "audio", "point"),
    "vip": ("image", "video", "point"),
    "avip": ("image", "video", "audio", "point"),
}
"""The combinations of the paper's Table 1, by its letters; inputs in the order of their slots."""

VIEWS = {"image": "the picture", "video": "the video", "point": "the model"}
"""Inputs that have colours, and how questions name them."""


@dataclass(frozen=True, slots=True)
class CombinedQuestion:
    """A question over the inputs of a combination.

    Attributes:
        kind: "color", "number", "sound" or "video".
        scenes: per modality of the combination, in the order of their slots.
        text: the question with its lettered options.
    """

    kind: str
    scenes: dict[str, Scene]
    text: str
    letter: str


@dataclass(frozen=True, slots=True)
class Choice:
    """A lettered question over one scene."""

    text: str
    letter: str


_Drawn = tuple[dict[str, Scene], str, str, list[str]]


def draw_combined(
    rng: np.random.Generator, split: Split, combination: str, letter: str | None = None
) -> CombinedQuestion:
    """A random question over a combination of `COMBINATIONS`, whose right option stands under a letter."""
    inputs = COMBINATIONS[combination]
    letter = letter or pick(rng, LETTERS)
    kind = pick(rng, _kinds(inputs))
    scenes, text, right, wrong = _DRAW[kind](rng, split, inputs)
    return CombinedQuestion(kind, scenes, offer(rng, text, right, wrong, letter)[0], letter)


def _kinds(inputs: tuple[str, ...]) -> list[str]:
    """The kinds of question that together need every one of these inputs."""
    kinds = ["color"] if sum(name in VIEWS for name in inputs) > 1 else []
    if "audio" in inputs:
        kinds.append("number" if "image" in inputs else "sound")
    return [*kinds, "video"] if inputs == ("video", "audio") else kinds


def _color(rng: np.random.Generator, split: Split, inputs: tuple[str, ...]) -> _Drawn:
    """The only colour that all views show; wrong are first the colours that some show."""
    views = [name for name in inputs if name in VIEWS]
    while True:
        color = int(rng.integers(len(COLORS)))

        def shows(scene: Scene, color: int = color) -> bool:
            return color in colors_of(scene)

        scenes = {name: draw(name, rng, split, wanted=shows if name in VIEWS else None) for name in inputs}
        shown = [colors_of(scenes[name]) for name in views]
        some = set.union(*shown) - {color}
        if set.intersection(*shown) == {color} and some:
            break
    absent = [other for other in range(len(COLORS)) if other not in some and other != color]
    wrong = shuffled(rng, sorted(some)) + shuffled(rng, absent)
    text = f"which color appears in {' and '.join(VIEWS[name] for name in views)} ?"
    return scenes, text, COLORS[color], [COLORS[other] for other in wrong[:3]]


def _number(rng: np.random.Generator, split: Split, inputs: tuple[str, ...]) -> _Drawn:
    """As many objects as notes."""
    number = int(rng.integers(1, 5))

    def counts(scene: ImageScene | AudioScene) -> bool:
        return scene.count == number

    scenes = {name: draw(name, rng, split, wanted=counts if name in ("image", "audio") else None) for name in inputs}
    wrong = [NUMBERS[other] for other in range(1, 5) if other != number]
    return scenes, "which number do the objects of the picture and the notes share ?", NUMBERS[number], wrong


def _about(name: str, rng: np.random.Generator, split: Split, inputs: tuple[str, ...]) -> _Drawn:
    """A question about one of the inputs."""
    scenes = {each: draw(each, rng, split) for each in inputs}
    question, wrong = _with_options(scenes[name], rng)
    return scenes, question.text, question.answer, wrong


_DRAW: dict[str, Callable[[np.random.Generator, Split, tuple[str, ...]], _Drawn]] = {
    "color": _color,
    "number": _number,
    "sound": partial(_about, "audio"),
    "video": partial(_about, "video"),
}


def draw_choice(scene: Scene, rng: np.random.Generator, letter: str | None = None) -> Choice:
    """A random lettered question over one scene; the wrong options are words of the same kind."""
    letter = letter or pick(rng, LETTERS)
    question, wrong = _with_options(scene, rng)
    return Choice(offer(rng, question.text, question.answer, wrong, letter)[0], letter)


def _with_options(scene: Scene, rng: np.random.Generator) -> tuple[Question, list[str]]:
    """A question whose answer is one of a list of words, and three others of that list."""
    question = pick(rng, [each for each in questions(scene, rng) if pool_of(each.answer)])
    wrong = [word for word in pool_of(question.answer) if word != question.answer]
    return question, [wrong[index] for index in rng.permutation(len(wrong))[: len(LETTERS) - 1]]
