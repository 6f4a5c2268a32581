"""COCO captions: pictures, each with several reference captions.

Paper:   Chen et al., Microsoft COCO Captions, arXiv:1504.00325. Filter: MERA, arXiv:2503.07663, App. B.
Files:   ``annotations/captions_{train,val,test}2014.json``, ``{train,val,test}2014/<file_name>``.
Differs: nothing. Training uses the first caption of each image, as MERA does (``all_captions`` for every one).
"""

from pathlib import Path

from graftlm.data.tasks.reading import CAPTION_PROMPT, data_set, inside, one, read_json, task
from graftlm.data.types import Sample, Task

__all__ = ["load"]

SPLITS = ("train", "val", "test")


@data_set
def load(
    root: Path,
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    name: str = "coco",
    prompt: str = CAPTION_PROMPT,
    all_captions: bool = False,
) -> Task:
    """Read the data set.

    Args:
        all_captions: one training sample per caption instead of per image.
    """

    def samples(split: str) -> list[Sample]:
        content = read_json(root / "annotations" / f"captions_{split}2014.json")
        captions: dict[int, list[str]] = {}
        for each in content["annotations"]:
            captions.setdefault(each["image_id"], []).append(each["caption"])
        found = []
        for image in content["images"]:
            said = captions.get(image["id"], [])
            media = one("image", inside(root, f"{split}2014", image["file_name"]))
            if split != "train" and said:
                found.append(Sample(str(image["id"]), name, media, prompt, tuple(said)))
            elif said:
                kept = said if all_captions else said[:1]
                found += [Sample(f"{image['id']}.{i}", name, media, prompt, (text,)) for i, text in enumerate(kept)]
        return found

    return task(
        name, "caption", ("image",), "cider", [samples(s) for s in SPLITS], root=root, skip_bad=skip_bad, limit=limit
    )
