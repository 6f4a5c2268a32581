"""Cap3D: coloured point clouds with captions.

Paper:   Luo et al., Scalable 3D Captioning with Pretrained Models, NeurIPS 2023, arXiv:2306.07279. Filter: MERA,
    arXiv:2503.07663, App. B.
Files:   ``Cap3D_automated_Objaverse_full.csv`` (no header: ``uid, caption``), ``{train,val,test}.txt`` (one uid a line),
    ``points/<uid>.ply`` or ``.npz``. Split files are ours: without ``test.txt``, val and test are drawn.
Differs: nothing. Captions of more than 100 characters are dropped (``longest``), at most 50,000 objects are learned and
    1,000 tested (``train_size``, ``test_size``), as in MERA.
"""

from collections.abc import Iterable
from pathlib import Path

from graftlm.data.tasks.reading import CAPTION_PROMPT, data_set, divide, inside, one, read_csv, read_lines, task
from graftlm.data.types import Sample, Task

__all__ = ["cloud", "load"]


@data_set
def load(
    root: Path,
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    name: str = "cap3d",
    prompt: str = CAPTION_PROMPT,
    longest: int = 100,
    train_size: int | None = 50_000,
    test_size: int | None = 1000,
) -> Task:
    """Read the data set.

    Args:
        longest: most characters of a caption that is kept.
        train_size: most objects to learn.
        test_size: most objects to test.
    """
    captions: dict[str, list[str]] = {}
    for row in read_csv(root / "Cap3D_automated_Objaverse_full.csv", ("uid", "caption"), header=False):
        if len(row["caption"]) <= longest:
            captions.setdefault(row["uid"], []).append(row["caption"])

    def samples(uids: Iterable[str], most: int | None = None) -> list[Sample]:
        kept = {uid: captions[uid][:most] for uid in uids if uid in captions}
        return [Sample(uid, name, one("point", cloud(root, uid)), prompt, tuple(said)) for uid, said in kept.items()]

    if (root / "test.txt").is_file():
        uids = [read_lines(root / f"{split}.txt") for split in ("train", "val", "test")]
    else:
        uids = divide([uid for uid in captions if not skip_bad or cloud(root, uid).is_file()], train_size, test_size)
    return task(
        name,
        "caption",
        ("point",),
        "cider",
        [samples(uids[0], 1), samples(uids[1]), samples(uids[2])],
        root=root,
        skip_bad=skip_bad,
        limit=limit,
        train_size=train_size,
        test_size=test_size,
    )


def cloud(root: Path, uid: str) -> Path:
    """The file of an object: PLY, or NPZ."""
    ply = inside(root, "points", f"{uid}.ply")
    return ply if ply.is_file() else ply.with_suffix(".npz")
