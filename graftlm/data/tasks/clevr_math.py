"""CLEVR-Math: adding and subtracting things of CLEVR's pictures, answered by a number.

Paper:   Dahlgren Lindström and Abraham, CLEVR-Math, NeSy 2022, arXiv:2208.05358. Use: LLaVA-c, arXiv:2506.08666, Table 7.
Files:   ``clevr-math-{train,val,test}.json``: ``{questions: [{image_filename, question, answer}]}``; pictures of CLEVR v1.0 in
    ``CLEVR_v1.0/images/{train,val,test}/``.
Differs: at most 40,000 questions are trained on and 2,000 tested, as in LLaVA-c, drawn by a hash of their ids.
"""

from collections.abc import Sequence
from pathlib import Path

from graftlm.core.errors import DataError
from graftlm.data.tasks.choices import Wording
from graftlm.data.tasks.entries import Form, read_entries
from graftlm.data.tasks.reading import data_set, inside, one, task
from graftlm.data.tasks.super_clevr import ONE_WORD
from graftlm.data.types import Sample, Task

__all__ = ["load"]


@data_set
def load(
    root: Path,
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    name: str = "clevr_math",
    wording: Wording = ONE_WORD,
    numbers: Sequence[str] = (),
    train_size: int | None = 40_000,
    test_size: int | None = 2000,
) -> Task:
    """Read the data set; the answer must be exact.

    Args:
        wording: what stands after a question.
        numbers: words for the numbers from zero; without any, answers are digits.
        train_size, test_size: most questions.
    """

    def samples(split: str) -> list[Sample]:
        path = root / f"clevr-math-{split}.json"
        form: dict[str, Form] = {"image_filename": str, "question": str, "answer": (int, str)}
        found = []
        for number, each in enumerate(read_entries(path, form, "questions")):
            media = one("image", inside(root / "CLEVR_v1.0" / "images" / split, each["image_filename"]))
            answer = _in_words(int(each["answer"]), numbers, path)
            found.append(Sample(f"{split}-{number}", name, media, wording.ask(each["question"]), (answer,)))
        return found

    return task(
        name,
        "qa",
        ("image",),
        "exact",
        [samples(split) for split in ("train", "val", "test")],
        root=root,
        skip_bad=skip_bad,
        limit=limit,
        max_new_tokens=10,
        train_size=train_size,
        test_size=test_size,
    )


def _in_words(answer: int, numbers: Sequence[str], path: Path) -> str:
    if not numbers:
        return str(answer)
    if not 0 <= answer < len(numbers):
        raise DataError(f"{path}: an answer is {answer}, and words are given for 0 to {len(numbers) - 1}. Give more.")
    return numbers[answer]
