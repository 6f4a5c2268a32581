"""Cap3D: coloured point clouds with captions.

Paper:   Luo et al., Scalable 3D Captioning with Pretrained Models, NeurIPS 2023, arXiv:2306.07279. Filter: MERA,
    arXiv:2503.07663, App. B.
Files:   ``Cap3D_automated_Objaverse_full.csv`` (no header: ``uid, caption``), ``{train,val,test}.txt`` (one uid a line),
    ``points/<uid>.ply`` or ``.npz``.
Differs: nothing. Captions of more than 100 characters are dropped, as in MERA (``longest``).
"""

from pathlib import Path

from graftlm.data.tasks.reading import CAPTION_PROMPT, data_set, inside, one, read_csv, read_lines, task
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
) -> Task:
    """Read the data set.

    Args:
        longest: most characters of a caption that is kept.
    """
    captions: dict[str, list[str]] = {}
    for row in read_csv(root / "Cap3D_automated_Objaverse_full.csv", ("uid", "caption"), header=False):
        if len(row["caption"]) <= longest:
            captions.setdefault(row["uid"], []).append(row["caption"])

    def samples(split: str) -> list[Sample]:
        uids = [uid for uid in read_lines(root / f"{split}.txt") if uid in captions]
        kept = {uid: captions[uid][:1] if split == "train" else captions[uid] for uid in uids}
        return [Sample(uid, name, one("point", cloud(root, uid)), prompt, tuple(said)) for uid, said in kept.items()]

    splits = [samples(s) for s in ("train", "val", "test")]
    return task(name, "caption", ("point",), "cider", splits, root=root, skip_bad=skip_bad, limit=limit)


def cloud(root: Path, uid: str) -> Path:
    """The file of an object: PLY, or NPZ."""
    ply = inside(root, "points", f"{uid}.ply")
    return ply if ply.is_file() else ply.with_suffix(".npz")
