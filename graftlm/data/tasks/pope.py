"""POPE: is there such a thing in the picture? What a model imagines is counted as wrong. A test only.

Paper:   Li et al., Evaluating Object Hallucination in Large Vision-Language Models, EMNLP 2023, arXiv:2305.10355.
Files:   ``coco_pope_{random,popular,adversarial}.json``, a line each: ``{question_id, image, text, label}``, the label yes or no;
    pictures in the ``coco`` folder beside this one.
Differs: nothing. ``coco_pope_{train,val}.json``, which are not public, are read where they are there.
"""

import json
import re
from pathlib import Path
from typing import Any, Literal

from graftlm.core.errors import DataError
from graftlm.data.tasks.choices import Wording
from graftlm.data.tasks.reading import data_set, inside, one, read_lines, task
from graftlm.data.tasks.super_clevr import ONE_WORD
from graftlm.data.types import Sample, Task

__all__ = ["SUBSETS", "load"]

SUBSETS = ("random", "popular", "adversarial")
"""What is asked for and not there: anything, what is frequent, or what is often seen with the things that are there."""

FOLDER = re.compile(r"COCO_([a-z]+\d{4})_")


@data_set
def load(
    root: Path,
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    name: str = "pope",
    subset: Literal["random", "popular", "adversarial"] = "random",
    wording: Wording = ONE_WORD,
    images: Path | None = None,
) -> Task:
    """Read one of the three subsets; the answer must be exact.

    Args:
        wording: what stands after a question.
        images: folder with ``val2014``; by default ``coco`` beside ``root``.
    """
    pictures = images or root.parent / "coco"

    def samples(part: str) -> list[Sample]:
        path = root / f"coco_pope_{part}.json"
        if part not in SUBSETS and not path.is_file():
            return []
        found = []
        for number, line in enumerate(read_lines(path), 1):
            each: dict[str, Any] = json.loads(line)
            folder = FOLDER.match(each["image"])
            if not folder or each["label"] not in ("yes", "no"):
                raise DataError(
                    f"{path}, line {number}: image {each['image']!r}, label {each['label']!r}; COCO_<split>_<number> and yes "
                    f"or no are expected. Restore the file."
                )
            media = one("image", inside(pictures, folder[1], each["image"]))
            found.append(Sample(str(each["question_id"]), name, media, wording.ask(each["text"]), (each["label"],)))
        return found

    return task(
        name,
        "qa",
        ("image",),
        "exact",
        [samples(part) for part in ("train", "val", subset)],
        root=root,
        skip_bad=skip_bad,
        limit=limit,
        max_new_tokens=10,
    )
