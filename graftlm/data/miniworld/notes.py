"""Scenes as text, for a language model that sees nothing: keyword notes and plain sentences."""

import numpy as np

from graftlm.data.miniworld.language import brightness, counted, doing, relation_words, solid_name, thing_name
from graftlm.data.miniworld.scenes import (
    DIRECTIONS,
    AudioScene,
    ImageScene,
    PointScene,
    Scene,
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
    PROPORTIONS,
    RHYTHMS,
    SHAPES,
    SIZES,
    SPEEDS,
    SURFACES,
    TEXTURES,
    TILTS,
)

__all__ = ["SEPARATOR", "notes", "sentence"]

SEPARATOR = " , "
"""Between the notes of a context; what lies between two separators may be read as one superposed token."""

_NOTE = {"grow": "bigger", "shrink": "smaller"}
_SIZES_OF_TWO = (("big", "little"), ("little", "big"), ("equal", "equal"))


def notes(scene: Scene, rng: np.random.Generator) -> list[str]:
    """One short note per aspect of the scene, in random order."""
    match scene:
        case ImageScene():
            groups = _image_notes(scene, rng)
        case VideoScene():
            groups = _video_notes(scene)
        case AudioScene():
            groups = _audio_notes(scene)
        case PointScene():
            groups = _point_notes(scene)
    return [groups[index] for index in rng.permutation(len(groups))]


def _image_notes(scene: ImageScene, rng: np.random.Generator) -> list[str]:
    if scene.places:
        heads = [PLACES[index] for index in scene.places]
    elif scene.relation >= 0:
        heads = [["left", "right"], ["above", "below"]][scene.relation]
    else:
        heads = [NUMBERS[scene.count]]
    groups = []
    for head, thing in zip(heads, scene.things, strict=True):
        words = [COLORS[thing.color], SHAPES[thing.shape], SIZES[thing.size], TEXTURES[thing.texture]]
        groups.append(" ".join([head, *(words[index] for index in rng.permutation(4))]))
    frame = [f"{COLORS[scene.frame]} frame"] if scene.frame >= 0 else []
    return [*groups, *frame, f"{brightness(scene)} background"]


def _motion_note(scene: VideoScene, motion: int) -> str:
    word = MOTIONS[motion]
    color = [COLORS[scene.turned]] if word == "turn" else []
    speed = [SPEEDS[scene.speed]] if motion < DIRECTIONS and scene.speed >= 0 else []
    return " ".join([_NOTE.get(word, word), *color, *speed])


def _video_notes(scene: VideoScene) -> list[str]:
    motion = _motion_note(scene, scene.motion)
    motions = [motion] if scene.then < 0 else [f"first {motion}", f"then {_motion_note(scene, scene.then)}"]
    return [f"{COLORS[scene.color]} {SHAPES[scene.shape]}", *motions, f"{brightness(scene)} background"]


def _audio_notes(scene: AudioScene) -> list[str]:
    instrument = INSTRUMENTS[scene.instrument]
    pitch, count = f"{PITCHES[scene.pitch]} pitch", f"{NUMBERS[scene.count]} notes"
    groups = [pitch, count, f"{NOISES[scene.background]} background"]
    if visit_of(scene) == 2:
        return [f"first {instrument}", f"then {INSTRUMENTS[scene.second]}", f"{MELODIES[scene.melody]} melody", *groups]
    rhythm = [f"{RHYTHMS[scene.rhythm]} rhythm"] if scene.rhythm >= 0 else []
    return [instrument, f"{ENVELOPES[scene.envelope]} volume", *rhythm, *groups]


def _point_notes(scene: PointScene) -> list[str]:
    surface = f"{SURFACES[scene.surface]} surface"
    if len(scene.parts) == 1:
        stance = [TILTS[scene.tilt]] if scene.tilt >= 0 else []
        return [" ".join(["one", solid_name(scene.parts[0]), PROPORTIONS[scene.proportion], *stance]), surface]
    heads = ("top", "below") if scene.stacked else ("next", "next")
    sizes = tuple(f" {size}" for size in _SIZES_OF_TWO[scene.larger]) if scene.larger >= 0 else ("", "")
    parts = [f"{head} {solid_name(part)}{size}" for head, part, size in zip(heads, scene.parts, sizes, strict=True)]
    return [*parts, surface]


def sentence(scene: Scene) -> str:
    """The scene in one neutral sentence, of a style that no caption has."""
    match scene:
        case ImageScene():
            return _image_sentence(scene)
        case VideoScene():
            return _video_sentence(scene)
        case AudioScene():
            return _audio_sentence(scene)
        case PointScene():
            return _point_sentence(scene)


def _detail(thing: Thing) -> str:
    return f"{SIZES[thing.size]} {TEXTURES[thing.texture]} {thing_name(thing)}"


def _image_sentence(scene: ImageScene) -> str:
    details = [_detail(thing) for thing in scene.things]
    if scene.places:
        what = " and ".join(f"{detail} {PLACES[index]}" for detail, index in zip(details, scene.places, strict=True))
        return f"{what} ; frame {COLORS[scene.frame]} ; background {brightness(scene)}"
    pair = f"{details[0]} {relation_words(scene)[0]} {details[1]}" if scene.relation >= 0 else ""
    return f"{pair or counted(scene.count, details[0])} ; background {brightness(scene)}"


def _video_sentence(scene: VideoScene) -> str:
    action = doing(scene, scene.motion)
    if scene.speed >= 0:
        action += f" {SPEEDS[scene.speed]}"
    if scene.then >= 0:
        action += f" then {doing(scene, scene.then)}"
    return f"{COLORS[scene.color]} {SHAPES[scene.shape]} {action} ; background {brightness(scene)}"


def _audio_sentence(scene: AudioScene) -> str:
    played = f"{INSTRUMENTS[scene.instrument]} playing {NUMBERS[scene.count]} {PITCHES[scene.pitch]} notes"
    if visit_of(scene) == 2:
        middle = f"then {INSTRUMENTS[scene.second]} ; melody {MELODIES[scene.melody]}"
    else:
        rhythm = f" ; rhythm {RHYTHMS[scene.rhythm]}" if scene.rhythm >= 0 else ""
        middle = f"; volume {ENVELOPES[scene.envelope]}{rhythm}"
    return f"{played} {middle} ; background {NOISES[scene.background]}"


def _point_sentence(scene: PointScene) -> str:
    names = [solid_name(part) for part in scene.parts]
    if len(names) == 1:
        what = f"{PROPORTIONS[scene.proportion]} {names[0]}" + (f" {TILTS[scene.tilt]}" if scene.tilt >= 0 else "")
    else:
        if scene.larger >= 0:
            names = [f"{size} {name}" for size, name in zip(_SIZES_OF_TWO[scene.larger], names, strict=True)]
        what = f"{names[0]} {'on top of' if scene.stacked else 'next to'} {names[1]}"
    return f"{what} ; surface {SURFACES[scene.surface]}"
