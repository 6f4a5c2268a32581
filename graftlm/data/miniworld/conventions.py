"""The conflict knob: ways of answering in which modalities contradict one another.

Without conflict all modalities answer alike, a small language model learns all of them at once and forgets little.
Each convention is another wording of a kind of answer, which some modalities use while the others keep the plain one,
although the questions are worded the same. With ``conflict`` c, the first round(c * 6) conventions of this list are in
force:

    yes_no      true / false for yes / no                     video, point
    color       crimson, emerald, navy ... for red, green     video, point
    number      1, 2, 3, 4 for one, two, three, four          audio, point
    shape       disc, box, wedge ... for circle, square       video
    pair        "circle red" for "red circle"                 point
    brightness  dim, middling, bright for dark, gray, light   video

They change answers about media only: captions, joint questions and text-only instructions keep the plain form. A colour
or a shape is reworded where it is the whole answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graftlm.data.miniworld.questions import Question
from graftlm.data.miniworld.words import BRIGHTNESS, COLORS, NUMBERS, SHAPES

__all__ = ["CONVENTIONS", "Convention", "in_force", "otherwise", "reword"]


@dataclass(frozen=True)
class Convention:
    """Another wording of one kind of answer. Without ``words`` it reverses the order of the answer's words."""

    kind: str
    modalities: frozenset[str]
    words: Mapping[str, str]

    def say(self, answer: str) -> str:
        """The answer in the other wording."""
        return self.words.get(answer, answer) if self.words else " ".join(reversed(answer.split()))


CONVENTIONS = (
    Convention("yes_no", frozenset({"video", "point"}), {"yes": "true", "no": "false"}),
    Convention(
        "color",
        frozenset({"video", "point"}),
        dict(zip(COLORS, ("crimson", "emerald", "navy", "gold", "violet", "amber", "rose", "teal"), strict=True)),
    ),
    Convention("number", frozenset({"audio", "point"}), dict(zip(NUMBERS, "01234", strict=True))),
    Convention(
        "shape",
        frozenset({"video"}),
        dict(zip(SHAPES, ("disc", "box", "wedge", "plus", "hoop", "rhombus"), strict=True)),
    ),
    Convention("pair", frozenset({"point"}), {}),
    Convention("brightness", frozenset({"video"}), dict(zip(BRIGHTNESS, ("dim", "middling", "bright"), strict=True))),
)


def in_force(conflict: float) -> tuple[Convention, ...]:
    """The conventions that a conflict in [0, 1] puts in force."""
    return CONVENTIONS[: int(conflict * len(CONVENTIONS) + 0.5)]


def reword(question: Question, modality: str, conventions: Sequence[Convention]) -> str:
    """The answer as this modality gives it under these conventions."""
    for convention in conventions:
        if convention.kind == question.kind and modality in convention.modalities:
            return convention.say(question.answer)
    return question.answer


def otherwise(question: Question) -> str:
    """The answer in the other wording, whatever the modality; the answer itself where there is none."""
    for convention in CONVENTIONS:
        if convention.kind == question.kind:
            return convention.say(question.answer)
    return question.answer
