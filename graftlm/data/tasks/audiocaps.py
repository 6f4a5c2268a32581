"""AudioCaps: ten-second sounds with captions.

Paper:   Kim et al., AudioCaps, NAACL 2019.
Files:   ``dataset/{train,val,test}.csv`` (``audiocap_id, youtube_id, start_time, caption``),
    ``audio/<youtube_id>_<start_time>.wav`` (sounds are not distributed with it).
Differs: val and test are clips with all their captions as references, not caption rows.
"""

from pathlib import Path

from graftlm.data.tasks.reading import CAPTION_PROMPT, data_set, inside, one, read_csv, task
from graftlm.data.types import Sample, Task

__all__ = ["load"]


@data_set
def load(
    root: Path,
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    name: str = "audiocaps",
    prompt: str = CAPTION_PROMPT,
) -> Task:
    """Read the data set."""

    def samples(split: str) -> list[Sample]:
        rows = read_csv(root / "dataset" / f"{split}.csv", ("audiocap_id", "youtube_id", "start_time", "caption"))
        if split == "train":
            return [
                Sample(row["audiocap_id"], name, one("audio", _sound(root, row)), prompt, (row["caption"],))
                for row in rows
            ]
        clips: dict[Path, list[str]] = {}
        for row in rows:
            clips.setdefault(_sound(root, row), []).append(row["caption"])
        return [Sample(file.stem, name, one("audio", file), prompt, tuple(said)) for file, said in clips.items()]

    splits = [samples(s) for s in ("train", "val", "test")]
    return task(name, "caption", ("audio",), "cider", splits, root=root, skip_bad=skip_bad, limit=limit)


def _sound(root: Path, row: dict[str, str]) -> Path:
    return inside(root, "audio", f"{row['youtube_id']}_{row['start_time']}.wav")
