"""The text-only corpus of the base language model, and the vocabulary of the whole mini world.

The base must know the language of every modality before it sees any: it reads notes or a sentence about a scene and
answers, summarises, or describes in a caption's style. Two things made later training work in our trials: captions
are part of the corpus, and a note (what lies between two `notes.SEPARATOR`) can be fed as one superposed token,
the sum of its words, because a connector's token must carry several attributes too.
"""

from functools import lru_cache

import numpy as np

from graftlm.core.seeds import rng as named_rng
from graftlm.data.miniworld import words
from graftlm.data.miniworld.captions import TEMPLATES, caption
from graftlm.data.miniworld.conventions import CONVENTIONS, otherwise
from graftlm.data.miniworld.instructions import FORMATS, draw_instruction
from graftlm.data.miniworld.joint import KINDS, JointQuestion, draw_joint, offer
from graftlm.data.miniworld.language import CAPTION_PROMPT, SUMMARY_PROMPT, pick
from graftlm.data.miniworld.notes import SEPARATOR, notes, sentence
from graftlm.data.miniworld.questions import ask, questions
from graftlm.data.miniworld.scenes import MODALITIES, Visit, draw

__all__ = ["OTHER_WORDS", "letter_sample", "text_sample", "vocabulary"]

OTHER_WORDS = "in other words ."
"""After a question: answer as a `conventions.Convention` would, so that the base knows those words too."""

_JOINT, _INSTRUCTION = 0.15, 0.20
_LOOK_UP = 0.25
_SECOND_VISIT, _NOTES, _QUESTION, _STYLED, _OTHERWISE = 0.25, 0.85, 0.6, 0.5, 0.08


def text_sample(rng: np.random.Generator) -> tuple[str, str, str]:
    """Context, question and answer about scenes of the train split.

    15 % ask about several scenes, with lettered options; 20 % say the form of the answer; of the rest, 60 % are
    questions about one scene, 20 % neutral summaries and 20 % captions, a quarter about scenes of second visits.
    """
    kind = rng.random()
    if kind < _JOINT:
        return _joint_sample(rng)
    if kind < _JOINT + _INSTRUCTION:
        instruction = draw_instruction(rng, "train")
        return instruction.context, instruction.text, instruction.answer
    return _scene_sample(rng)


def letter_sample(rng: np.random.Generator) -> tuple[str, str, str]:
    """The lesson in letters: half of the samples offer options, from plain look-ups to joint questions.

    A tiny model does not find out by itself that the letter before the right word is the answer, and the look-up, whose
    right word stands in the context as it is, teaches that alone.
    """
    kind = rng.random()
    if kind < _LOOK_UP:
        pool = pick(rng, (words.COLORS, words.SHAPES, words.SOLIDS, words.NUMBERS[1:], words.INSTRUMENTS, words.NOISES))
        chosen = [pool[index] for index in rng.permutation(len(pool))[: len(words.LETTERS)]]
        letter = pick(rng, words.LETTERS)
        right = chosen[words.LETTERS.index(letter)]
        return right, offer(rng, "", right, [word for word in chosen if word != right], letter)[0].strip(), letter
    if kind < 0.5:
        instruction = draw_instruction(rng, "train", "letter")
        return instruction.context, instruction.text, instruction.answer
    return text_sample(rng)


def _joint_sample(rng: np.random.Generator) -> tuple[str, str, str]:
    """The notes of all scenes that a question is about, and half of the time those of the others, too."""
    question = draw_joint(rng, "train")
    return _joint_context(question, rng), question.text, question.letter


def _joint_context(question: JointQuestion, rng: np.random.Generator) -> str:
    names = MODALITIES if rng.random() < 0.5 else question.names
    return SEPARATOR.join(note for name in MODALITIES if name in names for note in notes(question.scenes[name], rng))


def _scene_sample(rng: np.random.Generator) -> tuple[str, str, str]:
    scene = draw(pick(rng, MODALITIES), rng, "train", 2 if rng.random() < _SECOND_VISIT else 1)
    context = SEPARATOR.join(notes(scene, rng)) if rng.random() < _NOTES else sentence(scene)
    if rng.random() < _QUESTION:
        question = ask(scene, rng)
        reworded = otherwise(question)
        if reworded != question.answer and rng.random() < _OTHERWISE:
            return context, f"{question.text} {OTHER_WORDS}", reworded
        return context, question.text, question.answer
    if rng.random() < _STYLED:
        return context, CAPTION_PROMPT, caption(scene, rng)
    return context, SUMMARY_PROMPT, sentence(scene)


@lru_cache(maxsize=1)
def _all_words() -> tuple[str, ...]:
    """Every word that a template can produce, sorted: many scenes through every template, and all attribute words."""
    rng = named_rng(0, "miniworld", "vocabulary")
    texts = [CAPTION_PROMPT, SUMMARY_PROMPT, OTHER_WORDS, *_attribute_words()]
    visits: tuple[Visit, ...] = (1, 2)
    for modality in MODALITIES:
        for visit in visits:
            for _ in range(400):
                scene = draw(modality, rng, visit=visit)
                texts += [caption(scene, rng, template) for template in range(TEMPLATES)]
                texts += [f"{question.text} {question.answer}" for question in questions(scene, rng)]
                texts += [*notes(scene, rng), sentence(scene), SEPARATOR]
    for kind in KINDS:
        texts += [draw_joint(rng, "train", kind=kind).text for _ in range(40)]
    for form in FORMATS:
        drawn = [draw_instruction(rng, "train", form) for _ in range(150)]
        texts += [f"{instruction.text} {instruction.answer}" for instruction in drawn]
    return tuple(sorted({word for text in texts for word in text.split()}))


def _attribute_words() -> list[str]:
    lists = (
        *(words.COLORS, words.SHAPES, words.TEXTURES, words.SIZES, words.BRIGHTNESS, words.NUMBERS),
        *(words.MOTIONS, words.SPEEDS, words.INSTRUMENTS, words.PITCHES, words.ENVELOPES, words.RHYTHMS, words.NOISES),
        *(words.SOLIDS, words.PROPORTIONS, words.SURFACES, words.PLACES, words.MELODIES, words.TILTS, words.LETTERS),
        tuple(words.PLURALS.values()),
        *words.SYNONYMS.values(),
        *(tuple(convention.words.values()) for convention in CONVENTIONS),
    )
    return [word for group in lists for word in group]


def vocabulary() -> list[str]:
    """Every word of every text, both visits and all conventions, sorted; special tokens are not among them."""
    return list(_all_words())
