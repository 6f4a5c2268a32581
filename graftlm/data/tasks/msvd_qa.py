"""MSVD-QA: questions about MSVD clips.

Paper:   Xu et al., Video Question Answering via Gradually Refined Attention, ACM MM 2017.
Files:   ``{train,val,test}_qa.json`` (``{answer, id, question, video_id}``) and ``youtube_mapping.txt`` (clip name,
    ``vidN``) in the MSVD folder.
Differs: nothing. The splits of captions and questions may overlap in clips; the mini world's do not.
"""

from pathlib import Path

from graftlm.core.errors import DataError
from graftlm.data.tasks.msvd import clip
from graftlm.data.tasks.reading import data_set, one, read_json, read_lines, task
from graftlm.data.types import Sample, Task

__all__ = ["load"]


@data_set
def load(root: Path, *, skip_bad: bool = False, limit: int | None = None, name: str = "msvd_qa") -> Task:
    """Read the data set; ``root`` is the MSVD folder."""
    clips = {
        number: clip_name for clip_name, number in (line.split() for line in read_lines(root / "youtube_mapping.txt"))
    }

    def samples(split: str) -> list[Sample]:
        found = []
        for each in read_json(root / f"{split}_qa.json"):
            number = f"vid{each['video_id']}"
            if number not in clips:
                raise DataError(
                    f"{name}: question {each['id']} is about {number}, which youtube_mapping.txt lacks. Restore it."
                )
            media = one("video", clip(root, clips[number]))
            found.append(Sample(str(each["id"]), name, media, each["question"], (str(each["answer"]),)))
        return found

    splits = [samples(s) for s in ("train", "val", "test")]
    return task(name, "qa", ("video",), "exact", splits, root=root, skip_bad=skip_bad, limit=limit, max_new_tokens=10)
