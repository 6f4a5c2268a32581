"""Cap3D-QA: questions about Cap3D objects.

Paper:   Panagopoulou et al., X-InstructBLIP, ECCV 2024, arXiv:2311.18799.
Files:   ``cap3d_qa_{train,val,test}.csv`` (``sample_id, caption, caption_no_color, question, answer, extractive, correct``);
    or, as distributed, ``CAP3DQA_final.csv`` and ``CAP3DQA_final_val.csv``, of which val and test are drawn; point clouds
    in the ``cap3d`` folder beside this one.
Differs: nothing. At most 30,000 questions are learned and 1,000 tested (``train_size``, ``test_size``), as in MERA.
"""

from pathlib import Path

from graftlm.data.tasks.cap3d import cloud
from graftlm.data.tasks.reading import data_set, hold_out, one, read_csv, task
from graftlm.data.types import Sample, Task

__all__ = ["load"]


@data_set
def load(
    root: Path,
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    name: str = "cap3d_qa",
    points: Path | None = None,
    train_size: int | None = 30_000,
    test_size: int | None = 1000,
) -> Task:
    """Read the data set.

    Args:
        points: folder with ``points/``; by default ``cap3d`` beside ``root``.
        train_size: most training questions.
        test_size: most test questions.
    """
    clouds = points or root.parent / "cap3d"

    def samples(file: str) -> list[Sample]:
        rows = read_csv(root / file, ("sample_id", "question", "answer"))
        return [
            Sample(
                f"{row['sample_id']}.{i}",
                name,
                one("point", cloud(clouds, row["sample_id"])),
                row["question"],
                (row["answer"],),
            )
            for i, row in enumerate(rows)
        ]

    if (root / "CAP3DQA_final.csv").is_file():
        splits = [samples("CAP3DQA_final.csv"), *hold_out(samples("CAP3DQA_final_val.csv"), test_size)]
    else:
        splits = [samples(f"cap3d_qa_{split}.csv") for split in ("train", "val", "test")]
    return task(
        name,
        "qa",
        ("point",),
        "exact",
        splits,
        root=root,
        skip_bad=skip_bad,
        limit=limit,
        max_new_tokens=10,
        train_size=train_size,
        test_size=test_size,
    )
