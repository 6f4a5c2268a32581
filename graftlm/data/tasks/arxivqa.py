"""ArxivQA: questions about figures of papers, with options, answered by a letter.

Paper:   Li et al., Multimodal ArXiv, ACL 2024, arXiv:2403.00231. Use: LLaVA-c, arXiv:2506.08666, Table 7.
Files:   ``arxivqa.jsonl``, a line each: ``{id, image, options: [text], question, label}``; pictures at ``image``, out of
    ``images.tgz``. There are no public splits: without ``arxivqa_{val,test}.jsonl`` val and test are drawn from it, and
    all questions about one picture go to one side.
Differs: options lose the letter that they begin with, and labels what stands around theirs. At most 40,000 questions are trained
    on and 2,000 tested, as in LLaVA-c, drawn by a hash of their ids.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from graftlm.core.errors import DataError
from graftlm.data.tasks.choices import Wording, letter_of
from graftlm.data.tasks.reading import data_set, divide, inside, one, read_lines, task
from graftlm.data.types import Sample, Task

__all__ = ["load"]

MARK = re.compile(r"\s*[(\[]?([A-Z])\s*[)\].:]\s*")
"""The letter in front of an option, or of a label, as in "A)", "(A)" and "A.", is the first group."""


@data_set
def load(
    root: Path,
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    name: str = "arxivqa",
    wording: Wording | None = None,
    train_size: int | None = 40_000,
    test_size: int | None = 2000,
) -> Task:
    """Read the data set; an answer is right when it begins with the letter.

    Args:
        skip_bad: leave out questions whose label is none of their options, too.
        wording: of the question, its options and what to answer.
        train_size, test_size: most questions.
    """
    samples = [
        _samples(path, name, wording or Wording(), skip_bad)
        for path in (root / "arxivqa.jsonl", root / "arxivqa_val.jsonl", root / "arxivqa_test.jsonl")
    ]
    if not samples[2]:
        pictures = sorted({str(sample.media[0].source) for sample in samples[0]})
        parts = [set(part) for part in divide(pictures, None, test_size)]
        samples = [[each for each in samples[0] if str(each.media[0].source) in part] for part in parts]
    return task(
        name,
        "choice",
        ("image",),
        "letter",
        samples,
        root=root,
        skip_bad=skip_bad,
        limit=limit,
        max_new_tokens=4,
        train_size=train_size,
        test_size=test_size,
    )


def _samples(path: Path, name: str, wording: Wording, skip_bad: bool) -> list[Sample]:
    if path.stem != "arxivqa" and not path.is_file():
        return []
    found = []
    for number, line in enumerate(read_lines(path), 1):
        each: dict[str, Any] = json.loads(line)
        where = f"{path}, line {number}"
        if not isinstance(each["options"], list) or not all(isinstance(text, str) for text in each["options"]):
            raise DataError(f"{where}: options are {each['options']!r}; a list of texts is expected. Restore the file.")
        options = _options(each["options"])
        letter = _letter(each["label"], options)
        if letter is None and skip_bad:
            continue
        if letter is None:
            raise DataError(
                f"{where}: label {each['label']!r} is none of the options {options}. A letter or an option is expected; go on "
                f"without such questions with skip_bad=true."
            )
        media = one("image", inside(path.parent, each["image"]))
        found.append(Sample(str(each["id"]), name, media, wording.ask(each["question"], options), (letter,)))
    return found


def _options(options: Sequence[str]) -> list[str]:
    """The options without their letters, where each begins with its own."""
    marks = [MARK.match(option) for option in options]
    if all(mark and mark[1] == letter for mark, letter in zip(marks, ascii_uppercase, strict=False)):
        return [option[mark.end() :] for option, mark in zip(options, marks, strict=True) if mark]
    return list(options)


def _letter(label: str, options: Sequence[str]) -> str | None:
    """The letter that a label means, in any of the forms in which it is distributed."""
    mark = MARK.match(f"{label.strip()}.")
    letter = mark[1] if mark else ""
    index = ascii_uppercase.index(letter) if letter else next((i for i, o in enumerate(options) if o == label), -1)
    return letter_of(index, options, "label") if 0 <= index < len(options) else None
