"""MSVD-QA: questions about MSVD clips.

Paper:   Xu et al., Video Question Answering via Gradually Refined Attention, ACM MM 2017.
Files:   ``{train,val,test}_qa.json`` (``{answer, id, question, video_id}``) and ``youtube_mapping.txt`` (clip name,
    ``vidN``) in the MSVD folder.
Differs: nothing. The splits of captions and questions overlap in clips, so learning these questions shows clips of the
    caption test: this is logged, and ``without_test_clips`` prevents it. The mini world's splits do not overlap.
"""

import logging
from pathlib import Path

from graftlm.core.errors import DataError
from graftlm.data.tasks.entries import ID, read_entries
from graftlm.data.tasks.msvd import clip
from graftlm.data.tasks.reading import data_set, one, read_lines, task
from graftlm.data.types import Sample, Task

__all__ = ["load"]

log = logging.getLogger(__name__)


@data_set
def load(
    root: Path,
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    name: str = "msvd_qa",
    without_test_clips: bool = False,
    test_size: int | None = 1000,
) -> Task:
    """Read the data set; ``root`` is the MSVD folder.

    Args:
        without_test_clips: leave out training questions about clips on which captions are tested.
        test_size: most test questions; 1,000 in MERA.
    """
    clips = _clips(root / "youtube_mapping.txt")

    def samples(split: str) -> list[Sample]:
        found = []
        path = root / f"{split}_qa.json"
        for each in read_entries(path, {"id": ID, "video_id": ID, "question": str, "answer": ID}):
            number = f"vid{each['video_id']}"
            if number not in clips:
                raise DataError(
                    f"{path}: question {each['id']} is about {number}, which youtube_mapping.txt lacks. Restore it."
                )
            media = one("video", clip(root, clips[number]))
            found.append(Sample(str(each["id"]), name, media, each["question"], (str(each["answer"]),)))
        return found

    train = samples("train")
    tested = _caption_tests(root)
    clean = [sample for sample in train if sample.media[0].source not in tested]
    if len(clean) < len(train) and not without_test_clips:
        log.warning("%s: %d training questions are about clips of MSVD's caption test", name, len(train) - len(clean))
    splits = [clean if without_test_clips else train, samples("val"), samples("test")]
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


def _clips(path: Path) -> dict[str, str]:
    """Number of a clip to its name."""
    clips = {}
    for line in read_lines(path):
        words = line.split()
        if len(words) != 2:
            raise DataError(f"{path}: the line {line[:80]!r}; a clip name and vidN are expected. Restore the file.")
        clips[words[1]] = words[0]
    return clips


def _caption_tests(root: Path) -> set[Path]:
    path = root / "test_list.txt"
    return {clip(root, clip_name) for clip_name in read_lines(path)} if path.is_file() else set()
