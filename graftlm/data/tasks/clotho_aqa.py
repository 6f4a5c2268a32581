"""Clotho-AQA: questions about sounds, three annotators each.

Paper:   Lipping et al., Clotho-AQA, EUSIPCO 2022, arXiv:2204.09634. Filter: MERA, arXiv:2503.07663, App. B.
Files:   ``clotho_aqa_{train,val,test}.csv`` (``file_name, QuestionText, answer, confidence``), ``audio_files/<file_name>``.
Differs: the rows of one question become one sample; MERA's count suggests one sample per row. Only confident rows are
    kept (``confident_only``), as in MERA.
"""

from collections import Counter
from pathlib import Path

from graftlm.data.tasks.reading import data_set, inside, one, read_csv, task
from graftlm.data.types import Sample, Task

__all__ = ["load"]


@data_set
def load(
    root: Path,
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    name: str = "clotho_aqa",
    confident_only: bool = True,
    test_size: int | None = 1000,
) -> Task:
    """Read the data set.

    Args:
        confident_only: keep answers whose annotator was confident.
        test_size: most test questions; 1,000 in MERA.
    """

    def samples(split: str) -> list[Sample]:
        questions: dict[tuple[str, str], list[str]] = {}
        for row in read_csv(root / f"clotho_aqa_{split}.csv", ("file_name", "QuestionText", "answer", "confidence")):
            if row["confidence"] == "yes" or not confident_only:
                questions.setdefault((row["file_name"], row["QuestionText"]), []).append(row["answer"])
        found = []
        for i, ((file, question), said) in enumerate(questions.items()):
            ranked = tuple(answer for answer, _ in Counter(said).most_common())
            found.append(Sample(str(i), name, one("audio", inside(root, "audio_files", file)), question, ranked))
        return found

    splits = [samples(s) for s in ("train", "val", "test")]
    return task(
        name,
        "qa",
        ("audio",),
        "exact",
        splits,
        root=root,
        skip_bad=skip_bad,
        limit=limit,
        max_new_tokens=10,
        test_size=test_size,
    )
