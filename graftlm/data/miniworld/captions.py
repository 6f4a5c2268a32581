"""Captions: six templates per modality and visit, each modality in a style of its own."""

import numpy as np

from graftlm.data.miniworld.language import (
    article,
    brightness,
    counted,
    does,
    place,
    relation_words,
    solid_name,
    thing_phrase,
)
from graftlm.data.miniworld.scenes import AudioScene, ImageScene, PointScene, Scene, VideoScene, visit_of
from graftlm.data.miniworld.words import COLORS, INSTRUMENTS, MELODIES, PITCHES, PROPORTIONS, SHAPES, SURFACES, TILTS

__all__ = ["TEMPLATES", "caption", "captions"]

TEMPLATES = 6
"""Templates per modality and visit."""


def caption(scene: Scene, rng: np.random.Generator, template: int | None = None) -> str:
    """A caption in one of the `TEMPLATES` ways, a random one unless told."""
    number = int(rng.integers(TEMPLATES)) if template is None else template
    again = visit_of(scene) == 2
    match scene:
        case ImageScene():
            return _framed_image(scene, rng, number) if again else _image(scene, rng, number)
        case VideoScene():
            return _double_video(scene, rng, number) if again else _video(scene, rng, number)
        case AudioScene():
            return _melody(scene, number) if again else _audio(scene, number)
        case PointScene():
            return _posed_point(scene, number) if again else _point(scene, number)


def captions(scene: Scene, rng: np.random.Generator, count: int) -> list[str]:
    """Captions in ``count`` different templates."""
    return [caption(scene, rng, int(template)) for template in rng.permutation(TEMPLATES)[:count]]


def _image(scene: ImageScene, rng: np.random.Generator, number: int) -> str:
    level = brightness(scene)
    ground = f"on a {level} background" if number % 2 == 0 else f"against a {level} backdrop"
    be = "is" if scene.count == 1 or scene.relation >= 0 else "are"
    if scene.relation < 0:
        what = thing_phrase(scene.things[0], rng, scene.count)
    else:
        first, second = (thing_phrase(thing, rng) for thing in scene.things)
        forth, back = (f"to the {word}" if scene.relation == 0 else word for word in relation_words(scene))
        what = f"{second} {back} {first}" if number % 3 == 2 else f"{first} {forth} {second}"
    return (
        f"a picture of {what} {ground}",
        f"the image shows {what} {ground}",
        f"{what} {ground} in this photo",
        f"there {be} {what} {ground}",
        f"this photo contains {what} {ground}",
        f"we can see {what} {ground}",
    )[number]


def _framed_image(scene: ImageScene, rng: np.random.Generator, number: int) -> str:
    frame, level = COLORS[scene.frame], brightness(scene)
    placed = [f"{thing_phrase(thing, rng)} {place(scene, index)}" for index, thing in enumerate(scene.things)]
    what = " and ".join(placed)
    be = "is" if len(placed) == 1 else "are"
    return (
        f"inside {article(frame)} frame {be} {what} of {article(level)} canvas",
        f"{article(frame)} frame holds {what} of {article(level)} canvas",
        f"{what} of {article(level)} canvas within {article(frame)} border",
        f"framed in {frame} {article(level)} canvas has {what}",
        f"{article(level)} canvas with {frame} edges and {what}",
        f"{what} while {frame} edges surround the {level} canvas",
    )[number]


def _video(scene: VideoScene, rng: np.random.Generator, number: int) -> str:
    what, level = article(f"{COLORS[scene.color]} {SHAPES[scene.shape]}"), brightness(scene)
    moves, moving = does(scene, scene.motion, rng)
    return (
        f"{what} {moves} in a {level} room",
        f"a video of {what} {moving} in a {level} room",
        f"in the clip {what} {moves} over a {level} floor",
        f"{what} is {moving} over a {level} floor",
        f"someone filmed {what} {moving} in a {level} room",
        f"the footage shows how {what} {moves} over a {level} floor",
    )[number]


def _double_video(scene: VideoScene, rng: np.random.Generator, number: int) -> str:
    what, level = article(f"{COLORS[scene.color]} {SHAPES[scene.shape]}"), brightness(scene)
    (moves, moving), (then, then_moving) = does(scene, scene.motion, rng), does(scene, scene.then, rng)
    return (
        f"{what} {moves} and then {then} on a {level} stage",
        f"after {moving} {what} {then} on a {level} stage",
        f"before {then_moving} {what} {moves} on a {level} stage",
        f"first {what} {moves} and later it {then} on a {level} stage",
        f"{what} goes from {moving} to {then_moving} on a {level} stage",
        f"{what} begins by {moving} and ends by {then_moving} on a {level} stage",
    )[number]


_BACKGROUND_SOUNDS = ("in silence", "while rain falls", "over a humming machine", "with clicks in the background")


def _notes(scene: AudioScene) -> str:
    return counted(scene.count, f"{PITCHES[scene.pitch]} {'note' if scene.count == 1 else 'notes'}")


def _audio(scene: AudioScene, number: int) -> str:
    who, notes, ground = article(INSTRUMENTS[scene.instrument]), _notes(scene), _BACKGROUND_SOUNDS[scene.background]
    if number % 2 == 0:
        volume = ("", " getting louder", " getting quieter")[scene.envelope]
        rhythm = ("", " getting faster", " getting slower")[max(scene.rhythm, 0)]
    else:
        volume = (" at a steady volume", " with rising volume", " with falling volume")[scene.envelope]
        rhythm = ("", " at growing speed", " at falling speed")[max(scene.rhythm, 0)]
    how = f"{volume}{rhythm} {ground}"
    return (
        f"{who} plays {notes}{how}",
        f"the sound of {who} playing {notes}{how}",
        f"someone plays {notes} on {who}{how}",
        f"{notes} from {who}{how}",
        f"we hear {notes} of {who}{how}",
        f"{who} is heard playing {notes}{how}",
    )[number]


def _melody(scene: AudioScene, number: int) -> str:
    who, second = article(INSTRUMENTS[scene.instrument]), article(INSTRUMENTS[scene.second])
    tune, notes, ground = f"{MELODIES[scene.melody]} tune", _notes(scene), _BACKGROUND_SOUNDS[scene.background]
    return (
        f"a {tune} of {notes} on {who} followed by {second} {ground}",
        f"{who} plays a {tune} of {notes} and {second} answers {ground}",
        f"after a {tune} of {notes} from {who} comes {second} {ground}",
        f"{notes} of {who} form a {tune} before {second} joins {ground}",
        f"listen to {who} with a {tune} of {notes} and then {second} {ground}",
        f"this recording has a {tune} of {notes} by {who} ending with {second} {ground}",
    )[number]


def _point(scene: PointScene, number: int) -> str:
    names, surface = [solid_name(part) for part in scene.parts], SURFACES[scene.surface]
    if len(names) == 1:
        what = article(f"{PROPORTIONS[scene.proportion]} {names[0]}" if scene.proportion else names[0])
    else:
        first, second = (article(name) for name in names)
        if scene.stacked:
            what = f"{first} on top of {second}" if number % 2 == 0 else f"{second} with {first} on top"
        else:
            what = f"{first} {'next to' if number % 2 == 0 else 'beside'} {second}"
    return (
        f"a 3d model of {what} with a {surface} surface",
        f"{what} with a {surface} finish",
        f"a {surface} 3d object made of {what}",
        f"a {surface} sculpture of {what}",
        f"this shape is {what} with a {surface} surface",
        f"a rendering of {what} that looks {surface}",
    )[number]


def _posed_point(scene: PointScene, number: int) -> str:
    names, surface = [solid_name(part) for part in scene.parts], SURFACES[scene.surface]
    if len(names) == 1:
        what = article(f"{TILTS[scene.tilt]} {names[0]}")
    else:
        sizes = (("big", "little"), ("little", "big"), ("equal", "equal"))[scene.larger]
        first, second = (article(f"{size} {name}") for size, name in zip(sizes, names, strict=True))
        what = f"{first} {'over' if scene.stacked else 'near'} {second}"
    return (
        f"a digital asset of {what} in {surface} clay",
        f"a scan of {what} in {surface} clay",
        f"{what} built from {surface} clay",
        f"{surface} clay shaped as {what}",
        f"a mesh that forms {what} in {surface} clay",
        f"{what} modelled in {surface} clay",
    )[number]
