"""LLaVA-665k: one file of conversations, cut into six domains by where their pictures come from; and LLaVA's captions.

Paper:   Liu et al., Improved Baselines with Visual Instruction Tuning, CVPR 2024, arXiv:2310.03744. The six domains: LLaVA-c,
    arXiv:2506.08666, App. A.2.
Files:   ``llava_v1_5_mix665k.json``: ``{id, image, conversations: [{from: human|gpt, value}]}``; pictures at ``image`` below the
    same folder, whose beginning is the domain (`DOMAINS`); without ``image`` it is TQA, text only. The captions of alignment
    are entries of the same form in ``blip_laion_cc_sbu_558k.json``.
Differs: of a conversation of several turns only the first question and its answer (``all_turns``: every one, with the picture
    and without what was said before). The file has no val and test: without ``llava_v1_5_mix665k_{val,test}.json`` they are
    drawn from it by a hash of the ids, at most ``test_size`` each; LLaVA-c has none, and measures on other benchmarks.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftlm.core.errors import DataError, did_you_mean
from graftlm.data.tasks.entries import ID, TURN, Form, read_entries
from graftlm.data.tasks.reading import data_set, divide, inside, one, task
from graftlm.data.types import Kind, Sample, Task

__all__ = ["DOMAINS", "domain_of", "load"]

FILE = "llava_v1_5_mix665k"


@dataclass(frozen=True, slots=True)
class Domain:
    """A sixth of the file: how its pictures' paths begin, and how answers are judged."""

    prefixes: tuple[str, ...]
    kind: Kind
    metric: str
    max_new_tokens: int


DOMAINS: Mapping[str, Domain] = {
    "tqa": Domain((), "instruction", "exact", 64),
    "coco": Domain(("coco/",), "instruction", "cider", 64),
    "ocr_vqa": Domain(("ocr_vqa/images/",), "qa", "exact", 16),
    "textvqa": Domain(("textvqa/train_images/",), "instruction", "cider", 64),
    "gqa": Domain(("gqa/",), "qa", "exact", 16),
    "vg": Domain(("vg/VG_100K/", "vg/VG_100K_2/"), "qa", "exact", 16),
}
"""The domains in the paper's order of learning. Their kind is never "caption": that is what connectors are aligned on."""

ALIGNMENT = "alignment"
ALIGNMENT_FILE = "blip_laion_cc_sbu_558k.json"

FORM: dict[str, Form] = {"id": ID, "conversations": [TURN, TURN]}


def domain_of(entry: Mapping[str, Any], where: str = FILE) -> str:
    """The domain of an entry.

    Raises:
        DataError: its picture lies elsewhere.
    """
    if "image" not in entry:
        return "tqa"
    image = entry["image"]
    for name, domain in DOMAINS.items():
        if isinstance(image, str) and image.startswith(domain.prefixes):
            return name
    raise DataError(
        f"{where}: entry {entry['id']} has the picture {image!r}; a path that begins with one of "
        f"{[prefix for domain in DOMAINS.values() for prefix in domain.prefixes]} is expected. Restore the file."
    )


@data_set
def load(
    root: Path,
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    name: str = "",
    domain: str = "tqa",
    all_turns: bool = False,
    train_size: int | None = None,
    test_size: int | None = 500,
) -> Task:
    """Read one domain.

    Args:
        name: the task's; by default the domain's.
        domain: one of `DOMAINS`, or "alignment".
        all_turns: a sample per question and answer.
        train_size: most training samples.
        test_size: most samples of val and of test, where they are drawn.
    """
    known = {**DOMAINS, ALIGNMENT: Domain(("",), "caption", "cider", 64)}
    if domain not in known:
        raise DataError(f"{root}: no domain '{domain}' in LLaVA-665k; {did_you_mean(domain, known)}")
    of, name = known[domain], name or domain
    train = _samples(root / (ALIGNMENT_FILE if domain == ALIGNMENT else f"{FILE}.json"), name, domain, all_turns)
    if domain != ALIGNMENT and (root / f"{FILE}_test.json").is_file():
        held = [_gathered(_samples(root / f"{FILE}_{split}.json", name, domain, False)) for split in ("val", "test")]
        splits = [train, *held]
    else:
        parts = [set(part) for part in divide(sorted({_entry(s) for s in train}), None, test_size)]
        splits = [[sample for sample in train if _entry(sample) in part] for part in parts]
    return task(
        name,
        of.kind,
        ("image",) if of.prefixes else (),
        of.metric,
        splits,
        root=root,
        skip_bad=skip_bad,
        limit=limit,
        max_new_tokens=of.max_new_tokens,
        train_size=train_size,
    )


def _samples(path: Path, name: str, domain: str, all_turns: bool) -> list[Sample]:
    """The samples of a domain; ids are made unique by the entry's place, because the file repeats them."""
    found = []
    for place, each in enumerate(read_entries(path, FORM)):
        if domain != ALIGNMENT and domain_of(each, str(path)) != domain:
            continue
        media = one("image", inside(path.parent, each["image"])) if domain != "tqa" else ()
        turns = each["conversations"]
        for number in range(0, len(turns) - 1, 2) if all_turns else (0,):
            key = f"{place}-{each['id']}" + (f".{number // 2}" if all_turns else "")
            found.append(Sample(key, name, media, turns[number]["value"], (turns[number + 1]["value"],)))
    return found


def _entry(sample: Sample) -> str:
    """What must not be divided: the picture's path, or the entry."""
    return str(sample.media[0].source) if sample.media else sample.id.partition(".")[0]


def _gathered(samples: Iterable[Sample]) -> list[Sample]:
    """Entries that ask the same about the same picture as one sample with several references."""
    together: dict[tuple[object, str], list[Sample]] = {}
    for sample in samples:
        together.setdefault((sample.media or sample.id, sample.prompt), []).append(sample)
    return [
        Sample(same[0].id, same[0].task, same[0].media, same[0].prompt, tuple(s.answers[0] for s in same))
        for same in together.values()
    ]
