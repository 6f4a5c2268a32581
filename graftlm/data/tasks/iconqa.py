"""IconQA: questions about abstract diagrams, with options in words, answered by a letter.

Paper:   Lu et al., IconQA, NeurIPS 2021 Datasets and Benchmarks, arXiv:2110.13214. Use: LLaVA-c, arXiv:2506.08666, Table 7.
Files:   ``iconqa_data/iconqa/{train,val,test}/{choose_txt,fill_in_blank}/<pid>/{data.json,image.png}``; ``data.json``:
    ``{question, choices: [text], answer}``, the answer a place in ``choices``, or the text that fills the blank.
Differs: ``choose_img``, whose options are pictures, is left out. LLaVA-c counts 29,859 training samples, which is as many as
    ``choose_txt`` (18,946) and ``fill_in_blank`` (10,913) have together: ``types`` takes both.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graftlm.core.errors import DataError
from graftlm.data.tasks.choices import Wording, letter_of
from graftlm.data.tasks.reading import data_set, one, read_json, task
from graftlm.data.types import Sample, Task

__all__ = ["load"]

TYPES = ("choose_txt", "fill_in_blank")
BLANK = Wording("Answer the question using a single word or phrase.")


@data_set
def load(
    root: Path,
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    name: str = "iconqa",
    wording: Wording | None = None,
    blank: Wording = BLANK,
    types: Sequence[str] = ("choose_txt",),
    test_size: int | None = None,
) -> Task:
    """Read the data set.

    Args:
        wording: of questions with options.
        blank: of questions without.
        types: of `TYPES`; with blanks among them an answer must be exact, otherwise it must begin with the letter.
        test_size: most test questions.
    """
    if unknown := [each for each in types if each not in TYPES]:
        raise DataError(f"{root}: types {unknown} of IconQA cannot be asked in words; {', '.join(TYPES)} are expected.")

    def samples(split: str) -> list[Sample]:
        found = []
        for each in types:
            folder = root / "iconqa_data" / "iconqa" / split / each
            if not folder.is_dir():
                raise DataError(f"{folder}: this folder is missing. Check the data set's folder.")
            for place in sorted((p for p in folder.iterdir() if p.is_dir()), key=lambda p: (len(p.name), p.name)):
                prompt, answer = _asked(place / "data.json", each, wording or Wording(), blank)
                found.append(Sample(place.name, name, one("image", place / "image.png"), prompt, (answer,)))
        return found

    return task(
        name,
        "choice",
        ("image",),
        "letter" if tuple(types) == ("choose_txt",) else "exact",
        [samples(split) for split in ("train", "val", "test")],
        root=root,
        skip_bad=skip_bad,
        limit=limit,
        max_new_tokens=8,
        test_size=test_size,
    )


def _asked(path: Path, kind: str, wording: Wording, blank: Wording) -> tuple[str, str]:
    content: dict[str, Any] = read_json(path)
    question, answer = content["question"], content["answer"]
    if kind == "fill_in_blank":
        return blank.ask(question), str(answer)
    choices = content["choices"]
    if not isinstance(choices, list) or not all(isinstance(text, str) for text in choices):
        raise DataError(f"{path}: choices are {choices!r}; a list of texts is expected. Restore the annotation file.")
    return wording.ask(question, choices), letter_of(int(answer), choices, str(path))
