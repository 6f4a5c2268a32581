"""The world of LLaVA-c: pictures alone, five tasks to fine-tune on, and six domains to pretrain on.

Layout::

    iconqa/ super_clevr/ clevr_math/ figureqa/ arxivqa/      the five tasks, each in its public format
    llava/llava_v1_5_mix665k{,_val,_test}.json + pictures    the six domains in one file, told apart by their pictures' paths
    coco/ okvqa/                                             captions and questions: what the model knows before all that
    choice/image/{train,val,test}.json  pope/coco_pope_*.json      lettered questions, and "is there ...", about those pictures
    instructions/{train,val,test}.json                       text-only, in formats that no domain has
    world.json                                               spec, counts, and what every file shows

Every task has an instruction of its own at the end of its questions which `graftlm.data.llavac`
hands to the loaders; the files hold questions alone, as the public ones do. In the six domains it is part of the text.

Paper:   Liu et al., LLaVA-c, arXiv:2506.08666, App. A.2, Table 7.
Differs: templates about shapes, bars, curves, letters and digits. "TextVQA" are captions that read what is written, as in
    Table 7; boxes are on a grid of four by four.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from graftlm.core.errors import ConfigError
from graftlm.core.files import atomic_folder, hash_json, is_complete
from graftlm.core.seeds import rng
from graftlm.data.miniworld.captions import captions
from graftlm.data.miniworld.combinations import draw_choice
from graftlm.data.miniworld.formats import Item, annotate_images, dump, files_of
from graftlm.data.miniworld.instructions import draw_instruction
from graftlm.data.miniworld.language import article, pick, thing_name
from graftlm.data.miniworld.llavac_questions import ASK, Asked
from graftlm.data.miniworld.pages import Picture, describe_picture, render_picture
from graftlm.data.miniworld.questions import ask
from graftlm.data.miniworld.render_image import render_image
from graftlm.data.miniworld.scenes import SPLITS, ImageScene, Split, describe, draw
from graftlm.data.miniworld.words import COLORS, LETTERS, NUMBERS, SHAPES
from graftlm.data.miniworld.world import REFERENCES, Progress
from graftlm.data.miniworld.write import write_media

__all__ = ["DOMAINS", "PROBED", "SIZES", "TASKS", "VERSION", "build"]

VERSION = 1
"""Of the generator: raised whenever the same spec would give other files."""

PROBED = ("list", "yes_no")
"""Formats of the text-only instructions that are measured and never learned; TQA has the others."""

FREQUENT = 6
"""How many things count as popular."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many per task and split.

    Attributes:
        general: training pictures with captions and, again, with questions.
        extra: lettered questions to train on, and half as many of whether something is there.
        texts: instructions of TQA.
    """

    train: int
    val: int
    test: int
    general: int
    extra: int
    texts: int

    def of(self, split: Split) -> int:
        """Items of a task in a split."""
        return {"train": self.train, "val": self.val, "test": self.test}[split]


SIZES = {
    "tiny": Sizes(16, 6, 6, general=16, extra=8, texts=12),
    "smoke": Sizes(80, 20, 30, general=120, extra=40, texts=60),
    "default": Sizes(300, 60, 150, general=500, extra=400, texts=300),
}


def build(
    *, size: str = "default", seed: int = 0, root: Path, conflict: float = 0.0, progress: Progress | None = None
) -> Path:
    """Write the world, or find it complete, and return its folder.

    Args:
        size: "tiny", "smoke" or "default", see `SIZES`.
        root: where worlds are kept, each in a folder of its own.
        conflict: must be 0: one modality has nothing to contradict.
        progress: told what is written ("iconqa"), how many items of it are done, and of how many.

    Raises:
        ConfigError: no such size, or a conflict.
    """
    if size not in SIZES:
        raise ConfigError(f"world size '{size}' - expected one of {', '.join(SIZES)}.")
    if conflict != 0:
        raise ConfigError(
            f"conflict is {conflict}, but the world of LLaVA-c has one modality, which contradicts no other. Leave it at 0."
        )
    values = {"size": size, "seed": seed}
    folder = root / f"llavac-{size}-{hash_json([VERSION, values])[:16]}"
    if is_complete(folder):
        return folder
    with atomic_folder(folder) as temporary:
        _Writer(temporary, seed, SIZES[size], progress).write(values)
    return folder


class _Writer:
    """One world while it is written."""

    def __init__(self, folder: Path, seed: int, sizes: Sizes, progress: Progress | None) -> None:
        self.folder, self.seed, self.sizes, self.progress = folder, seed, sizes, progress
        self.media: dict[str, dict[str, Any]] = {}
        self.texts: dict[str, dict[str, Any]] = {}
        self.counts: dict[str, dict[str, int]] = {}

    def write(self, values: dict[str, Any]) -> None:
        """Everything, and world.json at the end."""
        for name, annotate in TASKS.items():
            items = {split: list(self._asked(name, split)) for split in SPLITS}
            self.counts[name] = {split: len(asked) for split, asked in items.items()}
            annotate(self, name, items)
        self._domains()
        self._general()
        self._instructions()
        content = {
            "version": VERSION,
            "spec": values,
            "counts": self.counts,
            "media": self.media,
            "texts": self.texts,
        }
        dump(self.folder / "world.json", content)

    def stream(self, *names: str | int) -> np.random.Generator:
        """Random numbers of this world under a name."""
        return rng(self.seed, "llavac", *names)

    def picture(self, path: Path, picture: Picture | ImageScene, split: Split, key: Sequence[str | int]) -> None:
        """Render a picture into its file, and note what it shows."""
        stream = self.stream("render", *key)
        raw = render_image(picture, stream)[0] if isinstance(picture, ImageScene) else render_picture(picture, stream)
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_media(self.folder / path, "image", raw)
        shown = describe(picture) if isinstance(picture, ImageScene) else describe_picture(picture)
        self.media[path.as_posix()] = {"split": split, "scene": shown}

    def tell(self, what: str, done: int, total: int) -> None:
        """Report progress."""
        if self.progress:
            self.progress(what, done, total)

    def _asked(self, name: str, split: Split, total: int | None = None) -> Iterator[Asked]:
        for number in range(self.sizes.of(split) if total is None else total):
            yield ASK[name](self.stream(name, split, number), split)

    def _domains(self) -> None:
        """One file of conversations per split, the domains mixed; references of one picture are entries of their own."""
        for split in SPLITS:
            entries = []
            for name, place in DOMAINS.items():
                total = self.sizes.texts if name == "tqa" and split == "train" else self.sizes.of(split)
                for number, asked in enumerate(self._asked(name, split, total)):
                    key = f"{name}-{split}-{number:06d}"
                    image = {"image": f"{place}{key}.png"} if asked.picture else {}
                    if asked.picture:
                        self.picture(Path("llava", image["image"]), asked.picture, split, (name, split, number))
                    text = f"<image>\n{asked.text}" if image else asked.text
                    if asked.scene:
                        self.texts[key] = {"split": split, "scene": describe(asked.scene)}
                    for answer in asked.answers:
                        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
                        entries.append({"id": key, **image, "conversations": turns})
                    self.tell(name, number + 1, total)
                self.counts.setdefault(name, {})[split] = total
            order = self.stream("order", split).permutation(len(entries))
            ending = "" if split == "train" else f"_{split}"
            dump(self.folder / f"llava/llava_v1_5_mix665k{ending}.json", [entries[place] for place in order])

    def _general(self) -> None:
        """COCO captions, OK-VQA, lettered questions and POPE, the last two over pictures of the first two."""
        items = list(self._items())
        annotate_images(self.folder, items)
        for done, item in enumerate(items, 1):
            self.picture(files_of("image", item)[0], _scene(item), item.split, ("general", item.number))
            self.tell("coco", done, len(items))
        frequent = Counter(
            thing_name(thing) for item in items if item.split == "train" for thing in _scene(item).things
        )
        common = [name for name, _ in frequent.most_common()]
        for split in SPLITS:
            seen = [item for item in items if item.split == split and (split != "train" or item.question)]
            self._letters(split, seen[: self.sizes.extra] if split == "train" else seen)
            if split == "train":
                self._pope("train", seen[: self.sizes.extra // 4], "random", common)
            elif split == "val":
                self._pope("val", seen[: len(seen) // 2], "random", common)
            else:
                for subset in ("random", "popular", "adversarial"):
                    self._pope(subset, seen[: len(seen) // 2], subset, common)
        self.counts["general"] = dict(Counter(item.split for item in items))

    def _items(self) -> Iterator[Item]:
        number = 0
        for split in SPLITS:
            both = split != "train"
            for index in range(self.sizes.of(split) if both else 2 * self.sizes.general):
                number += 1
                stream = self.stream("general", number)
                scene = draw("image", stream, split)
                said = captions(scene, stream, REFERENCES if both else 1) if both or index % 2 == 0 else []
                question = ask(scene, stream)
                if both or index % 2:
                    yield Item(number, split, scene, tuple(said), question.text, question.answer, question.kind)
                else:
                    yield Item(number, split, scene, tuple(said))

    def _letters(self, split: Split, items: Sequence[Item]) -> None:
        order = self.stream("letters", split).permutation(len(items))
        records = []
        for item, place in zip(items, order, strict=True):
            drawn = draw_choice(item.scene, self.stream("letters", item.number), LETTERS[int(place) % len(LETTERS)])
            turns = [{"from": "human", "value": f"<image> {drawn.text}"}, {"from": "gpt", "value": drawn.letter}]
            inputs = {"vision": [files_of("image", item)[0].as_posix()]}
            records.append({"id": f"image-{item.number:06d}", "modal_inputs": inputs, "conversations": turns})
        dump(self.folder / f"choice/image/{split}.json", records)
        self.counts.setdefault("letters", {})[split] = len(records)

    def _pope(self, name: str, items: Sequence[Item], subset: str, common: Sequence[str]) -> None:
        """Of every picture one thing that is there and one that is not."""
        records: list[dict[str, Any]] = []
        for item in items:
            scene, stream = _scene(item), self.stream("pope", name, item.number)
            there = thing_name(pick(stream, scene.things))
            for what, label in ((there, "yes"), (_absent(scene, stream, subset, common), "no")):
                text = f"is there {article(what)} in the picture ?"
                image = files_of("image", item)[0].name
                records.append({"question_id": len(records) + 1, "image": image, "text": text, "label": label})
        _lines(self.folder / f"pope/coco_pope_{name}.json", records)
        self.counts.setdefault("pope", {})[name] = len(records)

    def _instructions(self) -> None:
        """Text-only probes; nobody learns them."""
        for split in SPLITS:
            records: list[dict[str, Any]] = []
            for number in range(0 if split == "train" else self.sizes.of(split)):
                drawn = draw_instruction(self.stream("probe", split, number), split, PROBED[number % len(PROBED)])
                key, text = f"{split}-{number}", f"{drawn.context} {drawn.text}"
                turns = [{"from": "human", "value": text}, {"from": "gpt", "value": drawn.answer}]
                records.append({"id": key, "format": drawn.form, "conversations": turns})
                self.texts[f"instructions-{key}"] = {"split": split, "scene": describe(drawn.scene)}
            dump(self.folder / f"instructions/{split}.json", records)
            self.counts.setdefault("instructions", {})[split] = len(records)


def _scene(item: Item) -> ImageScene:
    """What the item's picture shows."""
    assert isinstance(item.scene, ImageScene)  # narrows the type; `_items` drew it
    return item.scene


def _lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """A JSON record per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(each, separators=(',', ':'))}\n" for each in records), encoding="utf-8")


def _absent(scene: ImageScene, rng: np.random.Generator, subset: str, common: Sequence[str]) -> str:
    """A thing that the scene lacks: any, the most frequent, or one that shares colour or shape with one that is there."""
    there = {thing_name(thing) for thing in scene.things}
    if subset == "popular":
        return pick(rng, [name for name in common if name not in there][:FREQUENT])
    thing = pick(rng, scene.things)
    while True:
        color, shape = pick(rng, COLORS), pick(rng, SHAPES)
        if subset == "adversarial":
            color, shape = (COLORS[thing.color], shape) if rng.random() < 0.5 else (color, SHAPES[thing.shape])
        if f"{color} {shape}" not in there:
            return f"{color} {shape}"


def _iconqa(writer: _Writer, name: str, items: Mapping[Split, Sequence[Asked]]) -> None:
    """A folder per question."""
    numbered = [(split, asked) for split in SPLITS for asked in items[split]]
    for number, (split, asked) in enumerate(numbered, 1):
        place = Path("iconqa/iconqa_data/iconqa", split, "choose_txt", str(number))
        content = {
            "question": asked.text,
            "choices": list(asked.options),
            "answer": asked.options.index(asked.answers[0]),
            "ques_type": "choose_txt",
        }
        dump(writer.folder / place / "data.json", content)
        _show(writer, place / "image.png", asked, split, (name, number), len(numbered))


def _super_clevr(writer: _Writer, name: str, items: Mapping[Split, Sequence[Asked]]) -> None:
    """All questions in one file."""
    numbered = [(split, asked) for split in SPLITS for asked in items[split]]
    questions = []
    for number, (split, asked) in enumerate(numbered):
        file = f"superCLEVR_new_{number:06d}.png"
        questions.append(
            {
                "split": split,
                "image_filename": file,
                "image_index": number,
                "image": file.removesuffix(".png"),
                "question": asked.text,
                "answer": asked.answers[0],
                "question_index": number,
            }
        )
        _show(writer, Path("super_clevr/images", file), asked, split, (name, number + 1), len(numbered))
    content = {"info": {"description": "graftlm mini world"}, "questions": questions}
    dump(writer.folder / "super_clevr/superCLEVR_questions_30k.json", content)


def _clevr_math(writer: _Writer, name: str, items: Mapping[Split, Sequence[Asked]]) -> None:
    """Answers are numbers."""
    done, total = 0, sum(map(len, items.values()))
    for split, asked_of in items.items():
        questions = []
        for number, asked in enumerate(asked_of):
            done += 1
            file = f"CLEVR_{split}_{number:06d}.png"
            answer = NUMBERS.index(asked.answers[0])
            questions.append({"image_filename": file, "split": split, "question": asked.text, "answer": answer})
            place = Path("clevr_math/CLEVR_v1.0/images", split, file)
            _show(writer, place, asked, split, (name, done), total)
        dump(writer.folder / f"clevr_math/clevr-math-{split}.json", {"questions": questions})


def _figureqa(writer: _Writer, name: str, items: Mapping[Split, Sequence[Asked]]) -> None:
    """Answers are 0 or 1."""
    done, total = 0, sum(map(len, items.values()))
    for split, asked_of in items.items():
        folder = Path("figureqa", {"train": "train1", "val": "validation1", "test": "test1"}[split])
        pairs = []
        for number, asked in enumerate(asked_of):
            done += 1
            answer = int(asked.answers[0] == "yes")
            pairs.append({"question_string": asked.text, "question_id": 0, "image_index": number, "answer": answer})
            _show(writer, folder / "png" / f"{number}.png", asked, split, (name, done), total)
        dump(writer.folder / folder / "qa_pairs.json", {"qa_pairs": pairs})


def _arxivqa(writer: _Writer, name: str, items: Mapping[Split, Sequence[Asked]]) -> None:
    """A line per question; options begin with their letters."""
    done, total = 0, sum(map(len, items.values()))
    for split, asked_of in items.items():
        records = []
        for number, asked in enumerate(asked_of):
            done += 1
            key = f"{split}-{number}"
            records.append(
                {
                    "id": key,
                    "image": f"images/{key}.png",
                    "options": [f"{letter}) {text}" for letter, text in zip(LETTERS, asked.options, strict=False)],
                    "question": asked.text,
                    "label": ascii_uppercase[asked.options.index(asked.answers[0])],
                    "rationale": "",
                }
            )
            _show(writer, Path("arxivqa/images", f"{key}.png"), asked, split, (name, done), total)
        _lines(writer.folder / f"arxivqa/arxivqa{'' if split == 'train' else f'_{split}'}.jsonl", records)


def _show(writer: _Writer, path: Path, asked: Asked, split: Split, key: tuple[str, int], total: int) -> None:
    """Write the picture of the ``key[1]``-th item of a task."""
    assert asked.picture is not None  # narrows the type; the five tasks show pictures
    writer.picture(path, asked.picture, split, key)
    writer.tell(*key, total)


TASKS: Mapping[str, Callable[[_Writer, str, Mapping[Split, Sequence[Asked]]], None]] = {
    "iconqa": _iconqa,
    "super_clevr": _super_clevr,
    "clevr_math": _clevr_math,
    "figureqa": _figureqa,
    "arxivqa": _arxivqa,
}
"""The tasks of fine-tuning in order, and who writes each."""

DOMAINS: Mapping[str, str] = {
    "tqa": "",
    "coco": "coco/train2017/",
    "ocr_vqa": "ocr_vqa/images/",
    "textvqa": "textvqa/train_images/",
    "gqa": "gqa/images/",
    "vg": "vg/VG_100K/",
}
"""The domains of pretraining in order, and where their pictures lie."""
