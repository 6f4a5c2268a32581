"""The world of the MICL benchmark: three modalities, captions and questions apart, six data sets on disk.

Layout::

    flickr30k/ msrvtt/ audiocaps/          captions of images, videos and sounds, in the public formats
    okvqa/ (pictures in coco/) msvd/ clotho_aqa/     questions over others of them
    pseudo_targets/<data set>_pseudo_qa_dict.json    a question and its answer for every training item with a caption
    Natural_Instructions/data.json         text without answers
    world.json                             spec, counts, and the scene behind every file

No file has both captions and questions: what is learned later is not seen earlier in another task. Questions of pseudo
targets come from the scene of the caption, and their answers keep the plain form, as those of a text model that reads
captions would; a conflict rewords the answers of the questions alone.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from graftlm.core.files import atomic_folder, hash_json, is_complete
from graftlm.core.seeds import rng
from graftlm.data.miniworld.captions import captions
from graftlm.data.miniworld.conventions import in_force, reword
from graftlm.data.miniworld.formats import ANNOTATIONS, Item, dump, files_of
from graftlm.data.miniworld.instructions import FORMATS, draw_instruction
from graftlm.data.miniworld.questions import ask
from graftlm.data.miniworld.render import render
from graftlm.data.miniworld.scenes import SPLITS, Split, describe, draw
from graftlm.data.miniworld.world import REFERENCES, Progress, WorldSpec
from graftlm.data.miniworld.write import SUFFIXES, write_media

__all__ = ["SIZES", "VERSION", "build"]

VERSION = 1
"""Of the generator: raised whenever the same spec would give other files."""

SIZES: dict[str, dict[Split, int]] = {
    "tiny": {"train": 16, "val": 6, "test": 6},
    "smoke": {"train": 80, "val": 20, "test": 30},
    "default": {"train": 300, "val": 60, "test": 150},
}
"""Items per task."""

INSTRUCTIONS = {"tiny": 10, "smoke": 40, "default": 400}
"""Texts without answers."""

MODALITIES = ("image", "video", "audio")

PSEUDO = {"image": "Flickr30k", "video": "MSRVTT", "audio": "AudioCaps"}
"""Beginning of the name of each file of pseudo targets."""

EMPTY = (
    *(f"coco/annotations/captions_{split}2014.json" for split in SPLITS),
    "msvd/AllVideoDescriptions.txt",
    *(f"msvd/{split}_list.txt" for split in SPLITS),
)
"""Caption files of data sets that only give questions here: the writers of both write these, with nothing in them."""

Size = Literal["tiny", "smoke", "default"]


def build(
    *, size: str = "default", seed: int = 0, root: Path, conflict: float = 0.0, progress: Progress | None = None
) -> Path:
    """Write the world, or find it complete, and return its folder.

    Args:
        size: "tiny", "smoke" or "default", see `SIZES`.
        root: where worlds are kept, each in a folder of its own.
        conflict: in [0, 1], how far modalities contradict one another in their answers, see `conventions`.
        progress: told what is written ("image-caption"), how many items of it are done, and of how many.

    Raises:
        ConfigError: a value is out of range.
    """
    spec = WorldSpec(cast(Size, size), seed, conflict)
    values = {"size": size, "seed": seed, "conflict": float(conflict)}
    folder = root / f"micl-{size}-{hash_json([VERSION, values])[:16]}"
    if is_complete(folder):
        return folder
    with atomic_folder(folder) as temporary:
        _write(spec, values, temporary, progress)
    return folder


def _write(spec: WorldSpec, values: dict[str, Any], folder: Path, progress: Progress | None) -> None:
    media: dict[str, dict[str, Any]] = {}
    for modality in MODALITIES:
        captioned, asked = (list(_items(spec, modality, kind)) for kind in ("caption", "qa"))
        _annotate(folder, modality, captioned, asked)
        for kind, items in (("caption", captioned), ("qa", asked)):
            for done, item in enumerate(items, 1):
                path = _file_of(modality, kind, item)
                raw, _ = render(modality, item.scene, rng(spec.seed, "micl", "render", modality, kind, item.number))
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                write_media(folder / path, modality, raw)
                media[path.as_posix()] = {"split": item.split, "scene": describe(item.scene)}
                if progress:
                    progress(f"{modality}-{kind}", done, len(items))
        _write_pseudo(spec, folder, modality, captioned)
    for name in EMPTY:
        (folder / name).unlink()
    (folder / "coco/annotations").rmdir()
    instructions = _write_instructions(spec, folder)
    counts = {f"{modality}-{kind}": SIZES[spec.size] for modality in MODALITIES for kind in ("caption", "qa")}
    content = {"version": VERSION, "spec": values, "counts": counts, "media": media, "instructions": instructions}
    dump(folder / "world.json", content)


def _items(spec: WorldSpec, modality: str, kind: str) -> Iterator[Item]:
    """The items of a task. Media do not depend on the conflict: only answers do."""
    conventions = in_force(spec.conflict)
    for number, split in enumerate([split for split, total in SIZES[spec.size].items() for _ in range(total)], 1):
        stream = rng(spec.seed, "micl", modality, kind, number)
        scene = draw(modality, stream, split)
        if kind == "caption":
            said = captions(scene, stream, 1 if split == "train" else REFERENCES)
            yield Item(number, split, scene, tuple(said))
        else:
            question = ask(scene, stream)
            answer = reword(question, modality, conventions)
            yield Item(number, split, scene, (), question.text, answer, question.kind)


def _file_of(modality: str, kind: str, item: Item) -> Path:
    match modality, kind:
        case "image", "caption":
            return Path("flickr30k", "flickr30k-images", _image_name(item))
        case "video", "caption":
            return Path("msrvtt", "videos", "all", f"{_video_name(item)}.mp4")
        case _:
            return files_of(modality, item)[0]


def _image_name(item: Item) -> str:
    return f"{item.number:010d}{SUFFIXES['image']}"


def _video_name(item: Item) -> str:
    return f"video{item.number}"


def _annotate(folder: Path, modality: str, captioned: Sequence[Item], asked: Sequence[Item]) -> None:
    match modality:
        case "image":
            _annotate_flickr30k(folder / "flickr30k", captioned)
            ANNOTATIONS["image"](folder, asked)
        case "video":
            _annotate_msrvtt(folder / "msrvtt", captioned)
            ANNOTATIONS["video"](folder, asked)
        case _:
            ANNOTATIONS["audio"](folder, [*captioned, *asked])


def _annotate_flickr30k(folder: Path, items: Sequence[Item]) -> None:
    """The captions as the data set has them, and with the splits of Karpathy."""
    lines = [f"{_image_name(item)}#{i}\t{text}\n" for item in items for i, text in enumerate(item.captions)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results_20130124.token").write_text("".join(lines), encoding="utf-8")
    images, first = [], 0
    for index, item in enumerate(items):
        sentences = [
            {"tokens": text.split(), "raw": text, "imgid": index, "sentid": number}
            for number, text in enumerate(item.captions, first)
        ]
        first += len(sentences)
        images.append(
            {
                "sentids": [sentence["sentid"] for sentence in sentences],
                "imgid": index,
                "sentences": sentences,
                "split": item.split,
                "filename": _image_name(item),
            }
        )
    dump(folder / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})


def _annotate_msrvtt(folder: Path, items: Sequence[Item]) -> None:
    """Two files: test, and everything else, where val is called "validate"."""
    info = {"description": "graftlm mini world"}
    for name, splits in (("train_val", ("train", "val")), ("test", ("test",))):
        chosen = [item for item in items if item.split in splits]
        videos = [
            {
                "category": 0,
                "url": "",
                "video_id": _video_name(item),
                "start time": 0.0,
                "end time": 1.0,
                "split": "validate" if item.split == "val" else item.split,
                "id": item.number,
            }
            for item in chosen
        ]
        said = [(item, text) for item in chosen for text in item.captions]
        sentences = [
            {"caption": text, "video_id": _video_name(item), "sen_id": number}
            for number, (item, text) in enumerate(said)
        ]
        dump(folder / f"{name}_videodatainfo.json", {"info": info, "videos": videos, "sentences": sentences})


def _write_pseudo(spec: WorldSpec, folder: Path, modality: str, items: Sequence[Item]) -> None:
    """By the name of the media file, without its suffix."""
    pairs = {}
    for item in items:
        if item.split == "train":
            question = ask(item.scene, rng(spec.seed, "micl", "pseudo", modality, item.number))
            pairs[_file_of(modality, "caption", item).stem] = {"Q": question.text, "A": question.answer}
    dump(folder / f"pseudo_targets/{PSEUDO[modality]}_pseudo_qa_dict.json", pairs)


def _write_instructions(spec: WorldSpec, folder: Path) -> list[dict[str, Any]]:
    """Instructions, each once, and what they are about. Returns the scenes in order, for world.json."""
    stream = rng(spec.seed, "micl", "instructions")
    prompts: dict[str, int] = {}
    inputs, scenes = [], []
    for number in range(INSTRUCTIONS[spec.size]):
        drawn = draw_instruction(stream, "train", FORMATS[number % len(FORMATS)])
        inputs.append({"prompt_id": prompts.setdefault(drawn.text, len(prompts)), "input": drawn.context})
        scenes.append({"split": "train", "scene": describe(drawn.scene)})
    dump(folder / "Natural_Instructions/data.json", {"prompts": list(prompts), "inputs": inputs})
    return scenes
