"""Cap3D-QA: questions about Cap3D objects.

Paper:   Panagopoulou et al., X-InstructBLIP, ECCV 2024, arXiv:2311.18799.
Files:   ``cap3d_qa_{train,val,test}.csv`` (``sample_id, caption, caption_no_color, question, answer, extractive, correct``);
    point clouds in the ``cap3d`` folder beside this one.
Differs: three files instead of ``CAP3DQA_final.csv`` and ``..._val.csv``, which have no test split.
"""

from pathlib import Path

from graftlm.data.tasks.cap3d import cloud
from graftlm.data.tasks.reading import data_set, one, read_csv, task
from graftlm.data.types import Sample, Task

__all__ = ["load"]


@data_set
def load(
    root: Path, *, skip_bad: bool = False, limit: int | None = None, name: str = "cap3d_qa", points: Path | None = None
) -> Task:
    """Read the data set.

    Args:
        points: folder with ``points/``; by default ``cap3d`` beside ``root``.
    """
    clouds = points or root.parent / "cap3d"

    def samples(split: str) -> list[Sample]:
        rows = read_csv(root / f"cap3d_qa_{split}.csv", ("sample_id", "question", "answer"))
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

    splits = [samples(s) for s in ("train", "val", "test")]
    return task(name, "qa", ("point",), "exact", splits, root=root, skip_bad=skip_bad, limit=limit, max_new_tokens=10)
