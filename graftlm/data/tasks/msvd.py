"""MSVD: short clips, many captions each.

Paper:   Chen and Dolan, Collecting Highly Parallel Data for Paraphrase Evaluation, ACL 2011.
Files:   ``AllVideoDescriptions.txt`` (clip name, space, sentence; ``#`` comments), ``{train,val,test}_list.txt``,
    ``clips/<name>.mp4`` or ``.avi``.
Differs: nothing. Every caption of a training clip is a sample; a test clip has all its captions as references.
"""

from pathlib import Path

from graftlm.data.tasks.reading import CAPTION_PROMPT, data_set, inside, one, read_lines, task
from graftlm.data.types import Sample, Task

__all__ = ["clip", "load"]


@data_set
def load(
    root: Path, *, skip_bad: bool = False, limit: int | None = None, name: str = "msvd", prompt: str = CAPTION_PROMPT
) -> Task:
    """Read the data set."""
    captions: dict[str, list[str]] = {}
    for line in read_lines(root / "AllVideoDescriptions.txt"):
        clip_name, _, text = line.partition(" ")
        captions.setdefault(clip_name, []).append(text)

    def samples(split: str) -> list[Sample]:
        found = []
        for clip_name in read_lines(root / f"{split}_list.txt"):
            media, said = one("video", clip(root, clip_name)), captions.get(clip_name, [])
            if split == "train":
                found += [Sample(f"{clip_name}.{i}", name, media, prompt, (text,)) for i, text in enumerate(said)]
            elif said:
                found.append(Sample(clip_name, name, media, prompt, tuple(said)))
        return found

    splits = [samples(s) for s in ("train", "val", "test")]
    return task(name, "caption", ("video",), "cider", splits, root=root, skip_bad=skip_bad, limit=limit)


def clip(root: Path, name: str) -> Path:
    """The file of a clip: MP4, or AVI as distributed."""
    avi = inside(root, "clips", f"{name}.avi")
    return avi if avi.is_file() else avi.with_suffix(".mp4")
