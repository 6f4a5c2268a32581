"""Super-CLEVR: questions about rendered vehicles, answered in one word.

Paper:   Li et al., Super-CLEVR, CVPR 2023, arXiv:2212.00259. Use: LLaVA-c, arXiv:2506.08666, Table 7.
Files:   ``superCLEVR_questions_30k.json``: ``{questions: [{split, image_index, image_filename, question, answer}]}``;
    ``images/<image_filename>``. The first 20,000 images are for training, 5,000 each for val and test.
Differs: a question whose ``split`` is train, val or test goes there, whatever its image's number. At most 20,000 questions are
    trained on and 2,000 tested, as in LLaVA-c, drawn by a hash of their ids.
"""

from pathlib import Path

from graftlm.data.tasks.choices import Wording
from graftlm.data.tasks.entries import Form, read_entries
from graftlm.data.tasks.reading import data_set, inside, one, task
from graftlm.data.types import Sample, Task

__all__ = ["ONE_WORD", "load", "said"]

ONE_WORD = Wording("Answer the question using a single word or phrase.")
"""Paper: LLaVA-c, Table 7."""

SPLITS = ("train", "val", "test")
FIRST = (0, 20_000, 25_000)
"""Number of the first image of each split."""


@data_set
def load(
    root: Path,
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    name: str = "super_clevr",
    wording: Wording = ONE_WORD,
    train_size: int | None = 20_000,
    test_size: int | None = 2000,
) -> Task:
    """Read the data set; the answer must be exact.

    Args:
        wording: what stands after a question.
        train_size, test_size: most questions.
    """
    form: dict[str, Form] = {"image_index": int, "image_filename": str, "question": str, "answer": (str, int, bool)}
    splits: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    for number, each in enumerate(read_entries(root / "superCLEVR_questions_30k.json", form, "questions")):
        split = each.get("split")
        if split not in splits:
            split = SPLITS[sum(each["image_index"] >= first for first in FIRST) - 1]
        media = one("image", inside(root / "images", each["image_filename"]))
        splits[split].append(Sample(str(number), name, media, wording.ask(each["question"]), (said(each["answer"]),)))
    return task(
        name,
        "qa",
        ("image",),
        "exact",
        list(splits.values()),
        root=root,
        skip_bad=skip_bad,
        limit=limit,
        max_new_tokens=10,
        train_size=train_size,
        test_size=test_size,
    )


def said(answer: str | int | bool) -> str:
    """An answer as text."""
    if isinstance(answer, bool):
        return "yes" if answer else "no"
    return str(answer)
