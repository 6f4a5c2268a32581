"""FigureQA: is this statement about a plot true? Asked with two options, answered in a sentence that ends with the letter.

Paper:   Kahou et al., FigureQA, arXiv:1710.07300. Use: LLaVA-c, arXiv:2506.08666, Table 7.
Files:   ``{train1,validation1,test1}/qa_pairs.json``: ``{qa_pairs: [{question_string, image_index, answer}]}``, the answer 0 or
    1; ``{train1,...}/png/<image_index>.png``. The public test has no answers: without them val and test are drawn from
    validation1.
Differs: LLaVA-c does not print its answers; the sentence is "The answer is A". At most 13,597 questions are trained on and 2,000
    tested, as there, drawn by a hash of their ids.
"""

from pathlib import Path
from string import ascii_uppercase

from graftlm.core.errors import DataError
from graftlm.data.tasks.choices import Wording
from graftlm.data.tasks.entries import read_entries
from graftlm.data.tasks.reading import data_set, hold_out, one, task
from graftlm.data.types import Sample, Task

__all__ = ["LETTER_LAST", "load"]

LETTER_LAST = Wording("Please answer the question and provide the correct option letter at the end.")
"""Paper: LLaVA-c, Table 7."""

OPTIONS = ("yes", "no")


@data_set
def load(
    root: Path,
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    name: str = "figureqa",
    wording: Wording = LETTER_LAST,
    answer: str = "The answer is {letter}",
    train_size: int | None = 13_597,
    test_size: int | None = 2000,
) -> Task:
    """Read the data set; the whole answer must be exact, so that its form is measured too.

    Args:
        wording: of the question, its options and what to answer.
        answer: the sentence, with ``{letter}``.
        train_size, test_size: most questions.
    """

    def samples(split: str) -> list[Sample]:
        path = root / split / "qa_pairs.json"
        found = []
        for number, each in enumerate(
            read_entries(path, {"question_string": str, "image_index": int, "answer": int}, "qa_pairs")
        ):
            if each["answer"] not in (0, 1):
                raise DataError(f"{path}: answer {number} is {each['answer']}; 0 or 1 is expected. Restore the file.")
            text = answer.format(letter=ascii_uppercase[OPTIONS.index("yes" if each["answer"] else "no")])
            media = one("image", root / split / "png" / f"{each['image_index']}.png")
            prompt = wording.ask(each["question_string"], OPTIONS)
            found.append(Sample(f"{split}-{number}", name, media, prompt, (text,)))
        return found

    train, held = samples("train1"), samples("validation1")
    public = (root / "test1" / "qa_pairs.json").is_file() and _is_answered(root / "test1" / "qa_pairs.json")
    val, test = (held, samples("test1")) if public else hold_out(held, None)
    return task(
        name,
        "choice",
        ("image",),
        "exact",
        [train, val, test],
        root=root,
        skip_bad=skip_bad,
        limit=limit,
        max_new_tokens=12,
        train_size=train_size,
        test_size=test_size,
    )


def _is_answered(path: Path) -> bool:
    return all(each.get("answer") in (0, 1) for each in read_entries(path, {"question_string": str}, "qa_pairs"))
