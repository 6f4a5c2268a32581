"""Annotation files in the public formats, and where each media file lies beside them.

COCO captions and OK-VQA for images, MSVD and MSVD-QA for videos, AudioCaps and Clotho-AQA for sounds, Cap3D and
Cap3D-QA for point clouds. An item with both captions and a question is one file, except for sounds: AudioCaps and
Clotho-AQA keep theirs apart, so it is written into both folders.
"""

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from graftlm.data.miniworld.scenes import SPLITS, Scene, Split
from graftlm.data.miniworld.words import COLORS, SYNONYMS

__all__ = ["ANNOTATIONS", "Item", "dump", "files_of"]

ANSWERS = 10
"""Answers per question in OK-VQA."""
ANNOTATORS = 3
"""Rows per question in Clotho-AQA."""


@dataclass(frozen=True, slots=True)
class Item:
    """One media item with what is said about it.

    Attributes:
        number: from 1, unique within the modality and visit.
        captions: none, one (train) or five references.
        question: empty when nothing is asked.
        kind: kind of the answer, see `questions.Question`.
    """

    number: int
    split: Split
    scene: Scene
    captions: tuple[str, ...] = ()
    question: str = ""
    answer: str = ""
    kind: str = ""


def dump(path: Path, value: object) -> None:
    """Write JSON, compact and always the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, separators=(",", ":")) + "\n", encoding="utf-8")


def _lines(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _rows(path: Path, rows: Iterable[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def _captioned(items: Sequence[Item], split: Split | None = None) -> list[Item]:
    return [item for item in items if item.captions and split in (None, item.split)]


def _asked(items: Sequence[Item], split: Split) -> list[Item]:
    return [item for item in items if item.question and item.split == split]


def _image_name(item: Item) -> str:
    return f"COCO_{item.split}2014_{item.number:012d}.png"


def _clip_name(item: Item) -> str:
    return f"mw{item.number:09d}_0_1"


def _youtube_id(item: Item) -> str:
    return f"mw{item.number:09d}"


def _uid(item: Item) -> str:
    return f"{item.number:032x}"


def files_of(modality: str, item: Item) -> list[Path]:
    """Where the item's media file lies in the world's folder (or that of the second visit), once or twice."""
    match modality:
        case "image":
            return [Path("coco", f"{item.split}2014", _image_name(item))]
        case "video":
            return [Path("msvd", "clips", f"{_clip_name(item)}.mp4")]
        case "audio":
            captioned = [Path("audiocaps", "audio", f"{_youtube_id(item)}_0.wav")] if item.captions else []
            asked = [Path("clotho_aqa", "audio_files", f"{_youtube_id(item)}.wav")] if item.question else []
            return captioned + asked
        case _:
            return [Path("cap3d", "points", f"{_uid(item)}.ply")]


def annotate_images(folder: Path, items: Sequence[Item]) -> None:
    """COCO captions and OK-VQA."""
    for split in SPLITS:
        captioned = _captioned(items, split)
        images = [{"id": item.number, "file_name": _image_name(item), "height": 48, "width": 48} for item in captioned]
        pairs = [(item.number, caption) for item in captioned for caption in item.captions]
        captions = [{"id": number, "image_id": image, "caption": text} for number, (image, text) in enumerate(pairs, 1)]
        dump(
            folder / f"coco/annotations/captions_{split}2014.json",
            {"info": {"description": "graftlm mini world"}, "images": images, "annotations": captions},
        )
        asked = _asked(items, split)
        head = {"data_type": "mscoco", "data_subtype": f"{split}2014", "info": {"description": "graftlm mini world"}}
        dump(
            folder / f"okvqa/OpenEnded_mscoco_{split}2014_questions.json",
            head
            | {
                "task_type": "Open-Ended",
                "questions": [
                    {"image_id": item.number, "question": item.question, "question_id": item.number} for item in asked
                ],
            },
        )
        answers = [_okvqa_answer(item) for item in asked]
        dump(folder / f"okvqa/mscoco_{split}2014_annotations.json", head | {"annotations": answers})


def _okvqa_answer(item: Item) -> dict[str, object]:
    """Ten answers; in val and test two of them say it in another word where there is one."""
    synonym = SYNONYMS.get(item.answer, (item.answer, item.answer))[1] if item.split != "train" else item.answer
    said = [item.answer] * (ANSWERS - 2) + [synonym] * 2
    return {
        "image_id": item.number,
        "question_id": item.number,
        "question_type": "one",
        "answer_type": {"yes_no": "yes/no", "number": "number"}.get(item.kind, "other"),
        "answers": [
            {"answer_id": number, "answer": answer, "raw_answer": answer, "answer_confidence": "yes"}
            for number, answer in enumerate(said, 1)
        ],
        "confidence": 3,
    }


def annotate_videos(folder: Path, items: Sequence[Item]) -> None:
    """MSVD descriptions and MSVD-QA."""
    captioned = _captioned(items)
    descriptions = [f"{_clip_name(item)} {caption}" for item in captioned for caption in item.captions]
    _lines(folder / "msvd/AllVideoDescriptions.txt", ["# graftlm mini world", "", *descriptions])
    _lines(folder / "msvd/youtube_mapping.txt", [f"{_clip_name(item)} vid{item.number}" for item in items])
    for split in SPLITS:
        _lines(folder / f"msvd/{split}_list.txt", [_clip_name(item) for item in _captioned(items, split)])
        asked = [
            {"answer": item.answer, "id": item.number, "question": item.question, "video_id": item.number}
            for item in _asked(items, split)
        ]
        dump(folder / f"msvd/{split}_qa.json", asked)


def annotate_audio(folder: Path, items: Sequence[Item]) -> None:
    """AudioCaps and Clotho-AQA."""
    for split in SPLITS:
        pairs = [(item, caption) for item in _captioned(items, split) for caption in item.captions]
        captions = [(number, _youtube_id(item), 0, caption) for number, (item, caption) in enumerate(pairs, 1)]
        _rows(
            folder / f"audiocaps/dataset/{split}.csv",
            [("audiocap_id", "youtube_id", "start_time", "caption"), *captions],
        )
        answers = [
            (f"{_youtube_id(item)}.wav", item.question, item.answer, "yes")
            for item in _asked(items, split)
            for _ in range(ANNOTATORS)
        ]
        _rows(
            folder / f"clotho_aqa/clotho_aqa_{split}.csv",
            [("file_name", "QuestionText", "answer", "confidence"), *answers],
        )


def annotate_points(folder: Path, items: Sequence[Item]) -> None:
    """Cap3D and Cap3D-QA. The caption beside a question is the item's first, or empty."""
    captioned = _captioned(items)
    captions = [(_uid(item), caption) for item in captioned for caption in item.captions]
    _rows(folder / "cap3d/Cap3D_automated_Objaverse_full.csv", captions)
    header = ("sample_id", "caption", "caption_no_color", "question", "answer", "extractive", "correct")
    for split in SPLITS:
        _lines(folder / f"cap3d/{split}.txt", [_uid(item) for item in _captioned(items, split)])
        asked = [_cap3d_answer(item) for item in _asked(items, split)]
        _rows(folder / f"cap3d_qa/cap3d_qa_{split}.csv", [header, *asked])


def _cap3d_answer(item: Item) -> tuple[object, ...]:
    caption = item.captions[0] if item.captions else ""
    colorless = " ".join(word for word in caption.split() if word not in COLORS)
    return _uid(item), caption, colorless, item.question, item.answer, f" {item.answer} " in f" {caption} ", True


ANNOTATIONS: dict[str, Callable[[Path, Sequence[Item]], None]] = {
    "image": annotate_images,
    "video": annotate_videos,
    "audio": annotate_audio,
    "point": annotate_points,
}
"""Per modality what writes the annotation files of both its data sets into a folder."""
