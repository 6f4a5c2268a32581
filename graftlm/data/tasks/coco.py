"""COCO captions: pictures, each with several reference captions.

Paper:   Chen et al., Microsoft COCO Captions, arXiv:1504.00325. Filter: MERA, arXiv:2503.07663, App. B.
Files:   ``annotations/captions_{train,val,test}2014.json``, ``{train,val,test}2014/<file_name>``.
    The test captions are not public: without ``captions_test2014.json``, val and test are drawn from val2014.
Differs: nothing. Training uses the first caption of each image (``all_captions`` for every one) and a test has at most
    1,000 images (``test_size``), as in MERA.
"""

from pathlib import Path

from graftlm.data.tasks.entries import ID, read_entries
from graftlm.data.tasks.reading import CAPTION_PROMPT, data_set, hold_out, inside, one, task
from graftlm.data.types import Sample, Task

__all__ = ["load"]

TEST = "annotations/captions_test2014.json"


@data_set
def load(
    root: Path,
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    name: str = "coco",
    prompt: str = CAPTION_PROMPT,
    all_captions: bool = False,
    test_size: int | None = 1000,
) -> Task:
    """Read the data set.

    Args:
        all_captions: one training sample per caption instead of per image.
        test_size: most test images.
    """

    def samples(split: str) -> list[Sample]:
        path = root / "annotations" / f"captions_{split}2014.json"
        captions: dict[int | str, list[str]] = {}
        for each in read_entries(path, {"image_id": ID, "caption": str}, "annotations"):
            captions.setdefault(each["image_id"], []).append(each["caption"])
        found = []
        for image in read_entries(path, {"id": ID, "file_name": str}, "images"):
            said = captions.get(image["id"], [])
            media = one("image", inside(root, f"{split}2014", image["file_name"]))
            if split != "train" and said:
                found.append(Sample(str(image["id"]), name, media, prompt, tuple(said)))
            elif said:
                kept = said if all_captions else said[:1]
                found += [Sample(f"{image['id']}.{i}", name, media, prompt, (text,)) for i, text in enumerate(kept)]
        return found

    train = samples("train")
    val, test = (samples("val"), samples("test")) if (root / TEST).is_file() else hold_out(samples("val"), test_size)
    splits = [train, val, test]
    return task(
        name, "caption", ("image",), "cider", splits, root=root, skip_bad=skip_bad, limit=limit, test_size=test_size
    )
