"""MSRVTT-QA: questions about the clips of MSR-VTT.

Paper:   Xu et al., Video Question Answering via Gradually Refined Attention, ACM MM 2017.
Files:   ``{train,val,test}_qa.json`` (``{answer, id, question, video_id}``); clips in the ``msrvtt`` folder beside this one.
Differs: nothing. Splits are those of MSR-VTT, so no test clip is learned.
"""

from pathlib import Path

from graftlm.data.tasks.entries import ID, read_entries
from graftlm.data.tasks.msrvtt import clip
from graftlm.data.tasks.pickled import refuse_pickled
from graftlm.data.tasks.reading import data_set, one, task
from graftlm.data.types import Sample, Task

__all__ = ["load"]


@data_set
def load(
    root: Path,
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    name: str = "msrvtt_qa",
    videos: Path | None = None,
    test_size: int | None = None,
) -> Task:
    """Read the data set.

    Args:
        videos: folder of MSR-VTT; by default ``msrvtt`` beside ``root``.
        test_size: most test questions.
    """
    clips = videos or root.parent / "msrvtt"

    def samples(split: str) -> list[Sample]:
        path = root / f"{split}_qa.json"
        refuse_pickled(path)
        found = []
        for each in read_entries(path, {"id": ID, "video_id": ID, "question": str, "answer": ID}):
            video = f"video{str(each['video_id']).removeprefix('video')}"
            media = one("video", clip(clips, video))
            found.append(Sample(str(each["id"]), name, media, each["question"], (str(each["answer"]),)))
        return found

    splits = [samples(s) for s in ("train", "val", "test")]
    return task(
        name,
        "qa",
        ("video",),
        "exact",
        splits,
        root=root,
        skip_bad=skip_bad,
        limit=limit,
        max_new_tokens=10,
        test_size=test_size,
    )
