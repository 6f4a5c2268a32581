"""Wording that captions, questions and notes share, and the prompts.

Every text is lower case (but for the option letters A to D) and its words, " ?" and " ." included, are separated by
spaces, so that a vocabulary of words reads it.

The caption prompt is the same sentence for every modality and questions share their wording across modalities; only
the style of the captions differs. That is what makes later modalities overwrite earlier ones.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from graftlm.data.miniworld.scenes import DIRECTIONS, ImageScene, Solid, Thing, VideoScene
from graftlm.data.miniworld.words import (
    BRIGHTNESS,
    COLORS,
    MOTIONS,
    NUMBERS,
    PLACES,
    PLURALS,
    SHAPES,
    SIZES,
    SOLIDS,
    SPEEDS,
    SYNONYMS,
    TEXTURES,
)

__all__ = [
    "CAPTION_PROMPT",
    "SUMMARY_PROMPT",
    "article",
    "brightness",
    "counted",
    "does",
    "doing",
    "loosely",
    "other",
    "pick",
    "place",
    "relation_words",
    "solid_name",
    "thing_name",
    "thing_phrase",
]

T = TypeVar("T")

CAPTION_PROMPT = "describe this ."
SUMMARY_PROMPT = "summarize the notes ."


def pick(rng: np.random.Generator, values: Sequence[T]) -> T:
    """One of the values."""
    return values[int(rng.integers(len(values)))]


def other(rng: np.random.Generator, values: Sequence[str], not_this: str) -> str:
    """One of the values that isn't this one."""
    return pick(rng, [value for value in values if value != not_this])


def article(phrase: str) -> str:
    """The phrase with "a" or "an" in front."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def loosely(rng: np.random.Generator, word: str) -> str:
    """The word or one of its synonyms."""
    return pick(rng, SYNONYMS.get(word, (word,)))


def brightness(scene: ImageScene | VideoScene) -> str:
    """The background's word."""
    return BRIGHTNESS[scene.background]


def thing_name(thing: Thing) -> str:
    """Colour and shape: "red circle"."""
    return f"{COLORS[thing.color]} {SHAPES[thing.shape]}"


def solid_name(part: Solid) -> str:
    """Colour and solid: "red cube"."""
    return f"{COLORS[part.color]} {SOLIDS[part.solid]}"


def thing_phrase(thing: Thing, rng: np.random.Generator, count: int = 1) -> str:
    """What a caption calls it: "a big striped red circle", "three tiny blue rings"."""
    texture = [TEXTURES[thing.texture]] if thing.texture else []
    words = [loosely(rng, SIZES[thing.size]), *texture, COLORS[thing.color]]
    if count == 1:
        return article(" ".join([*words, SHAPES[thing.shape]]))
    return counted(count, " ".join([*words, PLURALS[SHAPES[thing.shape]]]))


def counted(count: int, noun: str) -> str:
    """A number word and a noun that is already in its plural."""
    return f"{NUMBERS[count]} {noun}"


def relation_words(scene: ImageScene) -> tuple[str, str]:
    """How the first thing lies to the second, and the second to the first."""
    return ("left of", "right of") if scene.relation == 0 else ("above", "below")


def place(scene: ImageScene, index: int) -> str:
    """Where a thing sits, as a phrase: "in the center", "at the top left"."""
    word = PLACES[scene.places[index]]
    return f"{'in' if word == 'center' else 'at'} the {word}"


def doing(scene: VideoScene, motion: int) -> str:
    """The answer to "what is it doing ?": "moving left", "turning blue"."""
    word = MOTIONS[motion]
    if motion < DIRECTIONS:
        return f"moving {word}"
    return {
        "still": "staying still",
        "grow": "getting bigger",
        "shrink": "getting smaller",
        "turn": f"turning {COLORS[scene.turned]}",
    }[word]


def does(scene: VideoScene, motion: int, rng: np.random.Generator) -> tuple[str, str]:
    """A motion in a caption: "moves slowly to the left", "moving slowly to the left"."""
    word = MOTIONS[motion]
    if motion < DIRECTIONS:
        speed = f" {loosely(rng, SPEEDS[scene.speed])}" if scene.speed >= 0 else ""
        way = f"to the {word}" if word in ("left", "right") else f"{word}wards"
        return f"moves{speed} {way}", f"moving{speed} {way}"
    return {
        "still": ("does not move", "staying still"),
        "grow": ("gets bigger", "getting bigger"),
        "shrink": ("gets smaller", "getting smaller"),
        "turn": (f"turns {COLORS[scene.turned]}", f"turning {COLORS[scene.turned]}"),
    }[word]
