"""What the tasks of the world of LLaVA-c show and ask, in words of the base's vocabulary.

Fine-tuning: counting, naming and placing icons with options (IconQA); attributes of a thing that is named by others
(Super-CLEVR); sums and differences (CLEVR-Math); comparing bars (FigureQA); reading bars and curves with options (ArxivQA).
Pretraining: text-only instructions (TQA), captions (COCO), letters and digits (OCR-VQA), captions of things with something
written beside them (TextVQA), attributes of what lies in a relation (GQA), and boxes (VG).
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graftlm.data.miniworld.captions import captions
from graftlm.data.miniworld.instructions import draw_instruction
from graftlm.data.miniworld.language import article, pick, relation_words, thing_name
from graftlm.data.miniworld.pages import (
    DIGITS,
    GLYPHS,
    HEIGHTS,
    Board,
    Chart,
    Page,
    Picture,
    Scatter,
    Sign,
    draw_picture,
)
from graftlm.data.miniworld.scenes import ImageScene, Scene, Split, Thing, draw
from graftlm.data.miniworld.words import BRIGHTNESS, COLORS, LETTERS, NUMBERS, PLURALS, SHAPES, SIZES, TEXTURES
from graftlm.data.miniworld.world import REFERENCES

__all__ = ["ASK", "BOX_PROMPT", "ONE_WORD", "SENTENCE_PROMPT", "TAUGHT", "Asked"]

TAUGHT = ("word", "letter", "sentence")
"""Formats of TQA's instructions; the others are only measured."""

ONE_WORD = "answer with one word ."
SENTENCE_PROMPT = "describe this in one sentence ."
BOX_PROMPT = "answer with a box ."

_LIGHT = len(BRIGHTNESS) - 1
_ICON_COLORS, _ICON_SHAPES = COLORS[:4], ("circle", "square", "triangle", "ring")
_TRENDS = ("rising", "falling", "level", "different")
_LEVELS = ("low", "medium", "high")
Generator = np.random.Generator


@dataclass(frozen=True, slots=True)
class Asked:
    """A picture and what is asked about it.

    Attributes:
        picture: None is text only.
        scene: what a text is about.
        answers: the right one; of captions several.
        options: of multiple choice, else none.
    """

    picture: Picture | ImageScene | None
    text: str
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()
    scene: Scene | None = None


def _below(rng: Generator, values: Sequence[str]) -> int:
    return int(rng.integers(len(values)))


def _some(rng: Generator, values: Sequence[str], count: int) -> list[int]:
    """So many different positions, in random order."""
    return [int(index) for index in rng.permutation(len(values))[:count]]


def _board(rng: Generator, looks: Sequence[Thing], background: int) -> Board:
    """These things in random quarters."""
    quarters = sorted(int(quarter) for quarter in rng.permutation(4)[: len(looks)])
    return Board(tuple(looks), tuple(quarters), background)


def _icons(rng: Generator) -> Board:
    """One to four equal icons on light ground, of four colours and four shapes."""
    icon = Thing(_below(rng, _ICON_COLORS), SHAPES.index(pick(rng, _ICON_SHAPES)), _below(rng, SIZES), 0)
    return _board(rng, [icon] * int(rng.integers(1, 5)), _LIGHT)


def _iconqa(rng: Generator, split: Split) -> Asked:
    """Options are always in one order: a model of this size learns to look, or to look words up, from 300 samples, not both."""
    board = draw_picture(_icons, rng, split)
    icon = board.things[0]
    asked = [
        (f"how many {PLURALS[SHAPES[icon.shape]]} are there ?", NUMBERS[len(board.things)], NUMBERS[1:]),
        ("what shape is the object ?", SHAPES[icon.shape], _ICON_SHAPES),
        ("what color is the object ?", COLORS[icon.color], _ICON_COLORS),
    ]
    text, right, options = pick(rng, asked)
    return Asked(board, text, (right,), options)


def _super_clevr(rng: Generator, split: Split) -> Asked:
    """One thing in a frame, and one of its attributes."""
    scene = draw("image", rng, split, 2, wanted=lambda scene: len(scene.things) == 1)
    assert isinstance(scene, ImageScene)  # narrows the type; `draw` made it
    thing = scene.things[0]
    asked = [
        ("what color is the frame ?", COLORS[scene.frame]),
        ("what color is the object ?", COLORS[thing.color]),
        ("what shape is the object ?", SHAPES[thing.shape]),
        ("is the object small or large ?", SIZES[thing.size]),
        ("what is the pattern of the object ?", TEXTURES[thing.texture]),
    ]
    text, right = pick(rng, asked)
    return Asked(scene, text, (right,))


def _sums(rng: Generator) -> Board:
    """One to four large things of two looks."""
    pairs = list(zip(_some(rng, COLORS, 2), _some(rng, SHAPES, 2), strict=True))
    looks = [Thing(*pick(rng, pairs), 1, 0) for _ in range(int(rng.integers(1, 5)))]
    return _board(rng, looks, _below(rng, BRIGHTNESS))


def _clevr_math(rng: Generator, split: Split) -> Asked:
    """How many there are, with one more, and with one less."""
    board = draw_picture(_sums, rng, split)
    count = len(board.things)
    asked = [("", count), ("one object goes .", count - 1)]
    asked += [("one object joins .", count + 1)] if count < len(NUMBERS) - 1 else []
    story, number = pick(rng, asked)
    return Asked(board, f"{story} how many objects are there then ?".strip(), (NUMBERS[number],))


def _trend(heights: Sequence[int]) -> str:
    steps = {int(step) for step in np.sign(np.diff(heights)) if step}
    return "level" if not steps else "different" if len(steps) == 2 else "rising" if steps == {1} else "falling"


def _by_trend() -> dict[str, list[tuple[int, ...]]]:
    """Four heights in a row, flat or clearly not."""
    found: dict[str, list[tuple[int, ...]]] = {trend: [] for trend in _TRENDS}
    for heights in itertools.product(range(1, HEIGHTS + 1), repeat=4):
        if max(heights) - min(heights) != 1:
            found[_trend(heights)].append(heights)
    return found


_ROWS = _by_trend()


def _figure(rng: Generator) -> Chart:
    """Bars or a curve; every trend equally often."""
    return Chart(_below(rng, COLORS), pick(rng, _ROWS[pick(rng, _TRENDS)]), bool(rng.random() < 0.5))


def _true(rng: Generator) -> Chart:
    """Of two bars the first is larger, or of four the heights rise."""
    if rng.random() < 0.5:
        low, high = sorted(_some(rng, [""] * HEIGHTS, 2))
        return Chart(_below(rng, COLORS), (high + 1, low + 1), bars=True)
    return Chart(_below(rng, COLORS), pick(rng, _ROWS["rising"]), bars=bool(rng.random() < 0.5))


def _false(rng: Generator) -> Chart:
    """The contrary."""
    if rng.random() < 0.5:
        low, high = sorted(_some(rng, [""] * HEIGHTS, 2))
        return Chart(_below(rng, COLORS), (low + 1, high + 1), bars=True)
    trend = pick(rng, [trend for trend in _TRENDS if trend != "rising"])
    return Chart(_below(rng, COLORS), pick(rng, _ROWS[trend]), bars=bool(rng.random() < 0.5))


def _figureqa(rng: Generator, split: Split) -> Asked:
    """Of two bars, is the first one larger? Of four values, do they rise? True and false equally often."""
    true = bool(rng.random() < 0.5)
    chart = draw_picture(_true if true else _false, rng, split)
    color = COLORS[chart.color]
    text = f"is the first {color} object larger ?" if len(chart.heights) == 2 else f"is {color} rising ?"
    return Asked(chart, text, ("yes" if true else "no",))


def _arxivqa(rng: Generator, split: Split) -> Asked:
    """Options are in one order, as in `_iconqa`."""
    chart = draw_picture(_figure, rng, split)
    end = pick(rng, ("first", "last"))
    level = _LEVELS[(0, 1, 1, 2)[chart.heights[0 if end == "first" else -1] - 1]]
    asked = [
        (f"how does {COLORS[chart.color]} change ?", _trend(chart.heights), _TRENDS),
        (f"what is the {end} level ?", level, _LEVELS),
    ]
    text, right, options = pick(rng, asked)
    return Asked(chart, text, (right,), options)


def _tqa(rng: Generator, split: Split) -> Asked:
    drawn = draw_instruction(rng, split, pick(rng, TAUGHT))
    return Asked(None, f"{drawn.context} {drawn.text}", (drawn.answer,), scene=drawn.scene)


def _image(rng: Generator, split: Split, pair: bool = False) -> ImageScene:
    scene = draw("image", rng, split, wanted=lambda scene: not pair or scene.relation >= 0)
    assert isinstance(scene, ImageScene)  # narrows the type; `draw` made it
    return scene


def _references(split: Split) -> int:
    return 1 if split == "train" else REFERENCES


def _coco(rng: Generator, split: Split) -> Asked:
    scene = _image(rng, split)
    return Asked(scene, "describe this .", tuple(captions(scene, rng, _references(split))))


def _page(rng: Generator) -> Page:
    """A letter and a digit."""
    return Page(_below(rng, LETTERS), _below(rng, DIGITS), _below(rng, COLORS), pick(rng, (0, _LIGHT)))


def _ocr_vqa(rng: Generator, split: Split) -> Asked:
    page = draw_picture(_page, rng, split)
    asked = [
        ("which letter is in the picture ?", LETTERS[page.letter]),
        ("which number is in the picture ?", DIGITS[page.digit]),
        ("what color is the letter ?", COLORS[page.color]),
    ]
    text, right = pick(rng, asked)
    return Asked(page, f"{text} {ONE_WORD}", (right,))


def _sign(rng: Generator) -> Sign:
    thing = Thing(_below(rng, COLORS), _below(rng, SHAPES), _below(rng, SIZES), 0)
    return Sign(thing, _below(rng, GLYPHS), pick(rng, (0, _LIGHT)), bool(rng.random() < 0.5))


def _textvqa(rng: Generator, split: Split) -> Asked:
    sign = draw_picture(_sign, rng, split)
    glyph = GLYPHS[sign.glyph]
    text = f"the {'letter' if glyph in LETTERS else 'number'} {glyph}"
    thing, level = article(f"{SIZES[sign.thing.size]} {thing_name(sign.thing)}"), BRIGHTNESS[sign.background]
    forth, back = ("above", "below") if sign.below else ("below", "above")
    said = (
        f"{thing} {forth} {text} on a {level} background",
        f"{text} {back} {thing} on a {level} background",
        f"the picture shows {thing} and {text} {back} it on a {level} background",
        f"we can see {text} {back} {thing} against a {level} backdrop",
        f"this photo has {thing} {forth} {text} against a {level} backdrop",
    )
    chosen = tuple(said[index] for index in rng.permutation(len(said))[: _references(split)])
    return Asked(sign, SENTENCE_PROMPT, chosen)


def _gqa(rng: Generator, split: Split) -> Asked:
    scene = _image(rng, split, pair=True)
    index = int(rng.integers(2))
    thing, by = scene.things[index], scene.things[1 - index]
    where = relation_words(scene)[index]
    anchor = pick(rng, (f"the {SHAPES[by.shape]}", f"the {COLORS[by.color]} object"))
    asked = [
        (f"what color is the object {where} {anchor} ?", COLORS[thing.color]),
        (f"what shape is the object {where} {anchor} ?", SHAPES[thing.shape]),
        (f"is the object {where} {anchor} small or large ?", SIZES[thing.size]),
    ]
    text, right = pick(rng, asked)
    return Asked(scene, f"{text} {ONE_WORD}", (right,))


def _scatter(rng: Generator) -> Scatter:
    """One large thing, or two whose boxes do not overlap."""
    pairs = list(zip(_some(rng, COLORS, 2), _some(rng, SHAPES, 2), strict=True))[: int(rng.integers(1, 3))]
    while True:
        things = tuple(Thing(color, shape, 1, 0) for color, shape in pairs)
        corners = tuple((int(rng.integers(3)), int(rng.integers(3))) for _ in things)
        scatter = Scatter(things, corners, _below(rng, BRIGHTNESS))
        boxes = [scatter.box(index) for index in range(len(things))]
        if len(boxes) == 1 or _apart(*boxes):
            return scatter


def _apart(one: tuple[int, ...], two: tuple[int, ...]) -> bool:
    return any(one[i + 2] <= two[i] or two[i + 2] <= one[i] for i in (0, 1))


def _vg(rng: Generator, split: Split) -> Asked:
    scatter = draw_picture(_scatter, rng, split)
    index = int(rng.integers(len(scatter.things)))
    thing = scatter.things[index]
    name = pick(rng, (thing_name(thing), SHAPES[thing.shape], f"{COLORS[thing.color]} object"))
    box = " ".join(NUMBERS[edge] for edge in scatter.box(index))
    return Asked(scatter, f"where is the {name} ? {BOX_PROMPT}", (box,))


ASK: Mapping[str, Callable[[Generator, Split], Asked]] = {
    "iconqa": _iconqa,
    "super_clevr": _super_clevr,
    "clevr_math": _clevr_math,
    "figureqa": _figureqa,
    "arxivqa": _arxivqa,
    "tqa": _tqa,
    "coco": _coco,
    "ocr_vqa": _ocr_vqa,
    "textvqa": _textvqa,
    "gqa": _gqa,
    "vg": _vg,
}
"""Per task a random item of a split."""
