"""OK-VQA: questions about COCO pictures, ten answers each.

Paper:   Marino et al., OK-VQA, CVPR 2019, arXiv:1906.00067. Use: MERA, arXiv:2503.07663, App. B.
Files:   ``OpenEnded_mscoco_{train,val,test}2014_questions.json``, ``mscoco_{train,val,test}2014_annotations.json``;
    pictures in the ``coco`` folder beside this one. There is no public test split: without its files, val and test are
    drawn from val2014.
Differs: training uses the most frequent answer; ``distinct_answers`` makes one sample per distinct answer, the likely
    reading of MERA's 26K samples from 9,009 questions. A test has at most 1,000 questions (``test_size``), as in MERA.
"""

from collections import Counter
from pathlib import Path

from graftlm.data.tasks.entries import ID, read_entries
from graftlm.data.tasks.reading import data_set, hold_out, inside, one, task
from graftlm.data.types import Sample, Task

__all__ = ["load"]


@data_set
def load(
    root: Path,
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    name: str = "okvqa",
    images: Path | None = None,
    distinct_answers: bool = False,
    test_size: int | None = 1000,
) -> Task:
    """Read the data set.

    Args:
        images: folder with ``{train,val,test}2014``; by default ``coco`` beside ``root``.
        distinct_answers: one training sample per distinct answer of a question.
        test_size: most test questions.
    """
    pictures = images or root.parent / "coco"

    def samples(split: str) -> list[Sample]:
        path = root / f"mscoco_{split}2014_annotations.json"
        answers = {
            each["question_id"]: [answer["answer"] for answer in each["answers"]]
            for each in read_entries(path, {"question_id": ID, "answers": [{"answer": str}]}, "annotations")
        }
        path = root / f"OpenEnded_mscoco_{split}2014_questions.json"
        found = []
        for each in read_entries(path, {"question_id": ID, "image_id": int, "question": str}, "questions"):
            media = one("image", _picture(pictures, split, each["image_id"]))
            said = answers.get(each["question_id"], [])
            ranked = [answer for answer, _ in Counter(said).most_common()]
            targets = ranked if split == "train" and distinct_answers else ranked[:1]
            for i, target in enumerate(targets):
                key = str(each["question_id"]) if len(targets) == 1 else f"{each['question_id']}.{i}"
                rest = list(said)
                rest.remove(target)
                found.append(Sample(key, name, media, each["question"], (target, *rest)))
        return found

    train = samples("train")
    has_test = (root / "mscoco_test2014_annotations.json").is_file()
    val, test = (samples("val"), samples("test")) if has_test else hold_out(samples("val"), test_size)
    return task(
        name,
        "qa",
        ("image",),
        "vqa",
        [train, val, test],
        root=root,
        skip_bad=skip_bad,
        limit=limit,
        max_new_tokens=10,
        test_size=test_size,
    )


def _picture(pictures: Path, split: str, number: int) -> Path:
    stem = inside(pictures, f"{split}2014", f"COCO_{split}2014_{number:012d}")
    png = stem.with_suffix(".png")
    return png if png.is_file() else stem.with_suffix(".jpg")
