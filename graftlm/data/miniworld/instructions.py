"""Text-only tasks: notes about a scene, and an instruction that says in which form to answer."""

from dataclasses import dataclass

import numpy as np

from graftlm.data.miniworld.joint import offer
from graftlm.data.miniworld.language import pick
from graftlm.data.miniworld.notes import SEPARATOR, notes, sentence
from graftlm.data.miniworld.questions import Question, questions
from graftlm.data.miniworld.scenes import MODALITIES, AudioScene, ImageScene, PointScene, Scene, Split, VideoScene, draw
from graftlm.data.miniworld.words import (
    BRIGHTNESS,
    COLORS,
    ENVELOPES,
    INSTRUMENTS,
    LETTERS,
    NOISES,
    NUMBERS,
    PITCHES,
    SHAPES,
    SIZES,
    SOLIDS,
    SURFACES,
    TEXTURES,
)

__all__ = ["FORMATS", "Instruction", "draw_instruction", "pool_of"]

FORMATS = ("word", "letter", "list", "yes_no", "sentence")
"""Forms of an answer, each named in the instruction."""

_POOLS = (COLORS, SHAPES, SOLIDS, NUMBERS[1:], INSTRUMENTS, NOISES)


@dataclass(frozen=True, slots=True)
class Instruction:
    """Notes, what to do with them, and the answer. ``scene`` is what the notes are about."""

    form: str
    scene: Scene
    context: str
    text: str
    answer: str


def draw_instruction(rng: np.random.Generator, split: Split, form: str | None = None) -> Instruction:
    """A random instruction that asks for a form of answer."""
    form = form or pick(rng, FORMATS)
    while True:
        scene = draw(pick(rng, MODALITIES), rng, split, wanted=_is_ordered)
        asked = _ask(form, scene, rng)
        if asked:
            context = SEPARATOR.join(notes(scene, rng))
            return Instruction(form, scene, context, *asked)


def _is_ordered(scene: Scene) -> bool:
    """Whether notes say which of two things comes first; of two solids side by side they do not."""
    return not isinstance(scene, PointScene) or len(scene.parts) == 1 or scene.stacked


def _ask(form: str, scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """The instruction and its answer; None where the scene offers no such question."""
    if form == "sentence":
        return "summarize the notes in one sentence .", sentence(scene)
    if form == "list":
        return _list(scene, rng)
    fitting = [question for question in questions(scene, rng) if _fits(question, form)]
    if not fitting:
        return None
    question = pick(rng, fitting)
    if form == "letter":
        pool = pool_of(question.answer)
        wrong = [word for word in pool if word != question.answer]
        picked = [wrong[index] for index in rng.permutation(len(wrong))[:3]]
        letter = pick(rng, LETTERS)
        return offer(rng, question.text, question.answer, picked, letter)[0], letter
    end = "answer yes or no ." if form == "yes_no" else "answer with one word ."
    return f"{question.text} {end}", question.answer


def _fits(question: Question, form: str) -> bool:
    match form:
        case "yes_no":
            return question.kind == "yes_no"
        case "letter":
            return bool(pool_of(question.answer))
        case _:
            return question.kind != "yes_no" and " " not in question.answer


def pool_of(answer: str) -> tuple[str, ...]:
    """The words among which an answer can be chosen by letter; empty where there are no others of its kind."""
    return next((pool for pool in _POOLS if answer in pool), ())


def _list(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    aspects = _aspects(scene)
    names = list(aspects)
    count = 1 if "two colors" in aspects else int(rng.integers(2, 4))
    chosen = [names[index] for index in rng.permutation(len(names))[:count]]
    wanted = " and ".join(f"the {name}" for name in chosen)
    return f"list {wanted} . answer with a list .", " , ".join(aspects[name] for name in chosen)


def _aspects(scene: Scene) -> dict[str, str]:
    """What can be listed: several aspects of one thing, or one aspect of two."""
    match scene:
        case ImageScene() if scene.relation >= 0:
            return _of_two(
                [COLORS[thing.color] for thing in scene.things], [SHAPES[thing.shape] for thing in scene.things]
            )
        case ImageScene():
            thing = scene.things[0]
            return {
                "color": COLORS[thing.color],
                "shape": SHAPES[thing.shape],
                "size": SIZES[thing.size],
                "pattern": TEXTURES[thing.texture],
                "number": NUMBERS[scene.count],
                "background": BRIGHTNESS[scene.background],
            }
        case VideoScene():
            return {
                "color": COLORS[scene.color],
                "shape": SHAPES[scene.shape],
                "background": BRIGHTNESS[scene.background],
            }
        case AudioScene():
            return {
                "instrument": INSTRUMENTS[scene.instrument],
                "pitch": PITCHES[scene.pitch],
                "number": NUMBERS[scene.count],
                "volume": ENVELOPES[scene.envelope],
                "background": NOISES[scene.background],
            }
        case PointScene() if len(scene.parts) == 2:
            return _of_two([COLORS[part.color] for part in scene.parts], [SOLIDS[part.solid] for part in scene.parts])
        case PointScene():
            part = scene.parts[0]
            return {"color": COLORS[part.color], "shape": SOLIDS[part.solid], "surface": SURFACES[scene.surface]}


def _of_two(colors: list[str], shapes: list[str]) -> dict[str, str]:
    return {"two colors": " , ".join(colors), "two shapes": " , ".join(shapes)}
