"""MSR-VTT: short clips, twenty captions each.

Paper:   Xu et al., MSR-VTT: A Large Video Description Dataset for Bridging Video and Language, CVPR 2016.
Files:   ``train_val_videodatainfo.json`` and ``test_videodatainfo.json`` (``videos: [{video_id, split}]``, where val is
    called "validate", ``sentences: [{caption, video_id}]``); clips ``videos/all/<video_id>.mp4``, or as distributed in
    ``TrainValVideo`` and ``TestVideo``.
Differs: training uses the first caption of each clip (``all_captions`` for every one).
"""

from pathlib import Path

from graftlm.data.tasks.entries import read_entries
from graftlm.data.tasks.pickled import refuse_pickled
from graftlm.data.tasks.reading import CAPTION_PROMPT, data_set, inside, one, task
from graftlm.data.types import Sample, Task

__all__ = ["clip", "load"]

SPLITS = {"train": "train", "validate": "val", "test": "test"}

FOLDERS = ("videos/all", "videos", "TrainValVideo", "TestVideo")
"""Where clips may lie; a missing one is reported in the first."""


@data_set
def load(
    root: Path,
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    name: str = "msrvtt",
    prompt: str = CAPTION_PROMPT,
    all_captions: bool = False,
    test_size: int | None = None,
) -> Task:
    """Read the data set.

    Args:
        all_captions: one training sample per caption instead of per clip.
        test_size: most test clips.
    """
    captions: dict[str, list[str]] = {}
    videos: dict[str, str] = {}
    for part in ("train_val", "test"):
        path = root / f"{part}_videodatainfo.json"
        refuse_pickled(path)
        for each in read_entries(path, {"caption": str, "video_id": str}, "sentences"):
            captions.setdefault(each["video_id"], []).append(each["caption"])
        for each in read_entries(path, {"video_id": str, "split": str}, "videos"):
            videos[each["video_id"]] = SPLITS[each["split"]]

    def samples(split: str) -> list[Sample]:
        found = []
        for video in (video for video, part in videos.items() if part == split and video in captions):
            media, said = one("video", clip(root, video)), captions[video]
            if split != "train":
                found.append(Sample(video, name, media, prompt, tuple(said)))
            else:
                kept = said if all_captions else said[:1]
                found += [Sample(f"{video}.{i}", name, media, prompt, (text,)) for i, text in enumerate(kept)]
        return found

    splits = [samples(s) for s in ("train", "val", "test")]
    return task(
        name, "caption", ("video",), "cider", splits, root=root, skip_bad=skip_bad, limit=limit, test_size=test_size
    )


def clip(root: Path, video: str) -> Path:
    """The file of a clip."""
    places = [inside(root, folder, f"{video}.mp4") for folder in FOLDERS]
    return next((place for place in places if place.is_file()), places[0])
