"""Questions about one scene and their answers: attributes, counts, relations, yes or no."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from graftlm.data.miniworld.language import (
    article,
    brightness,
    doing,
    other,
    pick,
    relation_words,
    solid_name,
    thing_name,
)
from graftlm.data.miniworld.scenes import (
    DIRECTIONS,
    AudioScene,
    ImageScene,
    PointScene,
    Scene,
    Solid,
    Thing,
    VideoScene,
    visit_of,
)
from graftlm.data.miniworld.words import (
    COLORS,
    ENVELOPES,
    INSTRUMENTS,
    MELODIES,
    MOTIONS,
    NOISES,
    NUMBERS,
    PITCHES,
    PLACES,
    PLURALS,
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

__all__ = ["Question", "ask", "questions"]

Kind = Literal["yes_no", "number", "pair", "color", "shape", "brightness", "other"]
_STEADY_MOTIONS = (
    *(f"moving {way}" for way in MOTIONS[:DIRECTIONS]),
    "staying still",
    "getting bigger",
    "getting smaller",
)
_CHANGES = ("steady", "getting louder", "getting quieter")


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its answer, and of which kind the answer is (`conventions` reword answers by kind)."""

    text: str
    answer: str
    kind: Kind = "other"


def ask(scene: Scene, rng: np.random.Generator) -> Question:
    """One of the questions that fit the scene."""
    return pick(rng, questions(scene, rng))


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Every question that fits the scene; which thing and which false claim they name is random."""
    again = visit_of(scene) == 2
    match scene:
        case ImageScene():
            return _framed_image(scene, rng) if again else _image(scene, rng)
        case VideoScene():
            return _double_video(scene, rng) if again else _video(scene, rng)
        case AudioScene():
            return _melody(scene, rng) if again else _audio(scene, rng)
        case PointScene():
            return _posed_point(scene, rng) if again else _point(scene, rng)


def _yes_no(rng: np.random.Generator, true: str, false: str) -> Question:
    return Question(true, "yes", "yes_no") if rng.random() < 0.5 else Question(false, "no", "yes_no")


def _is_there(rng: np.random.Generator, color: str, shape: str, shapes: tuple[str, ...]) -> Question:
    """Is there a red circle? A false claim is wrong in the colour or in the shape."""
    wrong = f"{other(rng, COLORS, color)} {shape}" if rng.random() < 0.5 else f"{color} {other(rng, shapes, shape)}"
    return _yes_no(rng, f"is there {article(f'{color} {shape}')} ?", f"is there {article(wrong)} ?")


def _looks(rng: np.random.Generator, color: str, shape: str, shapes: tuple[str, ...]) -> list[Question]:
    return [
        Question(f"what color is the {shape} ?", color, "color"),
        Question(f"what shape is the {color} object ?", shape, "shape"),
        _is_there(rng, color, shape, shapes),
    ]


def _ground(scene: ImageScene | VideoScene) -> Question:
    return Question("how bright is the background ?", brightness(scene), "brightness")


def _thing_questions(thing: Thing, rng: np.random.Generator) -> list[Question]:
    shape = SHAPES[thing.shape]
    return [
        *_looks(rng, COLORS[thing.color], shape, SHAPES),
        Question(f"is the {shape} small or large ?", SIZES[thing.size]),
        Question(f"what is the pattern of the {shape} ?", TEXTURES[thing.texture]),
    ]


def _image(scene: ImageScene, rng: np.random.Generator) -> list[Question]:
    asked = [*_thing_questions(pick(rng, scene.things), rng), _ground(scene)]
    if scene.relation < 0:
        plural, count = PLURALS[SHAPES[scene.things[0].shape]], NUMBERS[scene.count]
        return [
            *asked,
            Question("how many objects are there ?", count, "number"),
            Question(f"how many {plural} are there ?", count, "number"),
        ]
    first, second = scene.things
    forth, back = relation_words(scene)
    return [
        *asked,
        Question(f"what is {forth} the {SHAPES[second.shape]} ?", thing_name(first), "pair"),
        Question(f"what is {back} the {SHAPES[first.shape]} ?", thing_name(second), "pair"),
    ]


def _framed_image(scene: ImageScene, rng: np.random.Generator) -> list[Question]:
    index = int(rng.integers(len(scene.things)))
    thing, where = scene.things[index], PLACES[scene.places[index]]
    color, shape, frame = COLORS[thing.color], SHAPES[thing.shape], COLORS[scene.frame]
    taken = {PLACES[place] for place in scene.places}
    elsewhere = other(rng, [place for place in PLACES if place not in taken], where)
    return [
        *_looks(rng, color, shape, SHAPES),
        _ground(scene),
        Question("what color is the frame ?", frame, "color"),
        Question(f"where is the {shape} ?", where),
        Question(f"where is the {color} object ?", where),
        Question(f"what is at the {where} ?", thing_name(thing), "pair"),
        _yes_no(rng, f"is the {shape} at the {where} ?", f"is the {shape} at the {elsewhere} ?"),
        _yes_no(rng, f"is the frame {frame} ?", f"is the frame {other(rng, COLORS, frame)} ?"),
    ]


def _video(scene: VideoScene, rng: np.random.Generator) -> list[Question]:
    color, shape, action = COLORS[scene.color], SHAPES[scene.shape], doing(scene, scene.motion)
    turning = scene.turned >= 0
    asked = [
        Question(
            f"what color is the {shape} at first ?" if turning else f"what color is the {shape} ?", color, "color"
        ),
        Question("what shape is the object ?", shape, "shape"),
        Question(f"what is the {shape} doing ?", action),
        Question(f"what is the {color} object doing ?", action),
        _ground(scene),
    ]
    if scene.speed >= 0:
        asked += [
            Question(f"which way does the {shape} move ?", MOTIONS[scene.motion]),
            Question(f"how does the {shape} move ?", SPEEDS[scene.speed]),
        ]
    if not turning:
        wrong = other(rng, _STEADY_MOTIONS, action)
        asked.append(_yes_no(rng, f"is the {shape} {action} ?", f"is the {shape} {wrong} ?"))
    return asked


def _double_video(scene: VideoScene, rng: np.random.Generator) -> list[Question]:
    color, shape = COLORS[scene.color], SHAPES[scene.shape]
    first, last = doing(scene, scene.motion), doing(scene, scene.then)
    return [
        Question(f"what color is the {shape} at first ?", color, "color"),
        Question("what shape is the object ?", shape, "shape"),
        _ground(scene),
        Question(f"what does the {shape} do first ?", first),
        Question(f"what does the {shape} do last ?", last),
        Question(f"what happens after {first} ?", last),
        Question(f"what happens before {last} ?", first),
        _yes_no(rng, f"is the {shape} {first} first ?", f"is the {shape} {last} first ?"),
        _yes_no(rng, f"is the {shape} {last} last ?", f"is the {shape} {first} last ?"),
    ]


def _audio(scene: AudioScene, rng: np.random.Generator) -> list[Question]:
    instrument, count = INSTRUMENTS[scene.instrument], NUMBERS[scene.count]
    # of the three changes the one after the true one, so that every claim is as often true as false
    false = _CHANGES[(scene.envelope + 1) % len(_CHANGES)]
    asked = [
        Question("which instrument is playing ?", instrument),
        Question("how many notes are there ?", count, "number"),
        Question(f"how many notes does the {instrument} play ?", count, "number"),
        Question(f"what is the pitch of the {instrument} ?", PITCHES[scene.pitch]),
        Question("how does the volume change ?", ENVELOPES[scene.envelope]),
        Question("what is in the background ?", NOISES[scene.background]),
        _yes_no(rng, f"is there {article(instrument)} ?", f"is there {article(other(rng, INSTRUMENTS, instrument))} ?"),
        _yes_no(rng, f"is the sound {_CHANGES[scene.envelope]} ?", f"is the sound {false} ?"),
    ]
    if scene.rhythm >= 0:
        asked.append(Question("how does the rhythm change ?", RHYTHMS[scene.rhythm]))
    return asked


def _melody(scene: AudioScene, rng: np.random.Generator) -> list[Question]:
    instrument, second, melody = INSTRUMENTS[scene.instrument], INSTRUMENTS[scene.second], MELODIES[scene.melody]
    absent = pick(rng, [name for name in INSTRUMENTS if name not in (instrument, second)])
    return [
        Question("which instrument plays first ?", instrument),
        Question("which instrument plays last ?", second),
        Question(f"what comes after the {instrument} ?", second),
        Question("how does the melody move ?", melody),
        Question(f"how many notes does the {instrument} play ?", NUMBERS[scene.count], "number"),
        Question("what is in the background ?", NOISES[scene.background]),
        _yes_no(rng, f"is the melody {melody} ?", f"is the melody {other(rng, MELODIES, melody)} ?"),
        _yes_no(rng, f"is there {article(second)} ?", f"is there {article(absent)} ?"),
    ]


def _point(scene: PointScene, rng: np.random.Generator) -> list[Question]:
    part = pick(rng, scene.parts)
    asked = [
        *_looks(rng, COLORS[part.color], SOLIDS[part.solid], SOLIDS),
        Question("how is the surface ?", SURFACES[scene.surface]),
        Question("how many parts are there ?", NUMBERS[len(scene.parts)], "number"),
        _is_there(rng, COLORS[part.color], SOLIDS[part.solid], SOLIDS),
    ]
    if len(scene.parts) == 1:
        return [*asked, Question(f"is the {SOLIDS[part.solid]} tall or flat ?", PROPORTIONS[scene.proportion])]
    return [*asked, *_arrangement(scene, *scene.parts)]


def _arrangement(scene: PointScene, first: Solid, second: Solid) -> list[Question]:
    if scene.stacked:
        return [
            Question("what is on top ?", solid_name(first), "pair"),
            Question(f"what is below the {SOLIDS[first.solid]} ?", solid_name(second), "pair"),
        ]
    return [
        Question(f"what is next to the {SOLIDS[first.solid]} ?", solid_name(second), "pair"),
        Question(f"what is next to the {SOLIDS[second.solid]} ?", solid_name(first), "pair"),
    ]


def _posed_point(scene: PointScene, rng: np.random.Generator) -> list[Question]:
    part = pick(rng, scene.parts)
    solid = SOLIDS[part.solid]
    asked = [
        *_looks(rng, COLORS[part.color], solid, SOLIDS),
        Question("how is the surface ?", SURFACES[scene.surface]),
    ]
    if len(scene.parts) == 1:
        stance = TILTS[scene.tilt]
        return [
            *asked,
            Question(f"how does the {solid} stand ?", stance),
            Question("how does the object stand ?", stance),
            _yes_no(rng, f"is the {solid} {stance} ?", f"is the {solid} {other(rng, TILTS, stance)} ?"),
        ]
    first, second = scene.parts
    larger, smaller = ((first, second), (second, first), (None, None))[scene.larger]
    wrong = f"{solid_name(smaller)}" if smaller else pick(rng, [solid_name(first), solid_name(second)])
    right = solid_name(larger) if larger else "none"
    asked += [
        Question("which part is larger ?", right, "pair" if larger else "other"),
        Question("which part is smaller ?", solid_name(smaller) if smaller else "none", "pair" if smaller else "other"),
    ]
    if larger:
        asked.append(_yes_no(rng, f"is the {right} larger ?", f"is the {wrong} larger ?"))
    else:
        asked.append(_yes_no(rng, "are the parts equal ?", f"is the {wrong} larger ?"))
    return asked
