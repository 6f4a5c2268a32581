"""Flickr30k: pictures with five captions each.

Paper:   Young et al., From Image Descriptions to Visual Denotations, TACL 2014. Splits: Karpathy and Fei-Fei, Deep
    Visual-Semantic Alignments, CVPR 2015, arXiv:1412.2306.
Files:   ``dataset_flickr30k.json`` (``images: [{filename, split, sentences: [{raw}]}]``), or, without it,
    ``results_20130124.token`` (``file#k``, tab, caption), of which val and test are drawn; ``flickr30k-images/<file>``.
Differs: training uses the first caption of each image (``all_captions`` for every one).
"""

from pathlib import Path

from graftlm.core.errors import DataError
from graftlm.data.tasks.entries import Form, read_entries
from graftlm.data.tasks.pickled import refuse_pickled
from graftlm.data.tasks.reading import CAPTION_PROMPT, data_set, divide, inside, one, read_lines, task
from graftlm.data.types import Sample, Task

__all__ = ["load"]

KARPATHY, TOKENS = "dataset_flickr30k.json", "results_20130124.token"

DRAWN = 1000
"""Most files that are drawn for val, and for test."""


@data_set
def load(
    root: Path,
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    name: str = "flickr30k",
    prompt: str = CAPTION_PROMPT,
    all_captions: bool = False,
    test_size: int | None = None,
) -> Task:
    """Read the data set.

    Args:
        all_captions: one training sample per caption instead of per image.
        test_size: most test images.
    """
    captions, splits = _karpathy(root / KARPATHY) if (root / KARPATHY).is_file() else _tokens(root / TOKENS)

    def samples(split: int) -> list[Sample]:
        found = []
        for file in splits[split]:
            media, key, said = one("image", inside(root, "flickr30k-images", file)), Path(file).stem, captions[file]
            if split:
                found.append(Sample(key, name, media, prompt, tuple(said)))
            else:
                kept = said if all_captions else said[:1]
                found += [Sample(f"{key}.{i}", name, media, prompt, (text,)) for i, text in enumerate(kept)]
        return found

    return task(
        name,
        "caption",
        ("image",),
        "cider",
        [samples(0), samples(1), samples(2)],
        root=root,
        skip_bad=skip_bad,
        limit=limit,
        test_size=test_size,
    )


def _karpathy(path: Path) -> tuple[dict[str, list[str]], list[list[str]]]:
    """Captions of each file, and the files of train, val and test; those of another split are left out."""
    captions: dict[str, list[str]] = {}
    splits: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    form: dict[str, Form] = {"filename": str, "split": str, "sentences": [{"raw": str}]}
    for each in read_entries(path, form, "images"):
        captions[each["filename"]] = [sentence["raw"] for sentence in each["sentences"]]
        if each["split"] in splits:
            splits[each["split"]].append(each["filename"])
    return captions, list(splits.values())


def _tokens(path: Path) -> tuple[dict[str, list[str]], list[list[str]]]:
    """The same, where nothing says which file is in which split."""
    refuse_pickled(path)
    captions: dict[str, list[str]] = {}
    for line in read_lines(path):
        place, tab, text = line.partition("\t")
        file, hash_sign, number = place.rpartition("#")
        if not (tab and hash_sign and number.isdigit()):
            raise DataError(
                f"{path}: the line {line[:80]!r}; file#number, a tab and a caption are expected. Restore the file."
            )
        captions.setdefault(file, []).append(text)
    return captions, divide(list(captions), None, DRAWN)
