"""The MICL benchmark: six tasks, each of one modality and one type, in two orders.

Paper:   Pian et al., Modality-Inconsistent Continual Learning of Multimodal Large Language Models (MoInCL), TMLR 2026,
    arXiv:2412.13050; tasks, orders and prompts after its released code.
Differs: a prompt is the one of evaluation throughout: "describe the image.", or the question; the code varies it by
    templates while it trains. The target is the first caption and the most frequent answer, not a random one each time.
    Validation questions of OK-VQA are half of its public validation split; there they come from the training split.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from graftlm.core.errors import DataError
from graftlm.data.tasks import TASKS, natural_instructions, pseudo_qa
from graftlm.data.tasks.reading import verify
from graftlm.data.types import Sample, Stage, Stream, Task

__all__ = ["ORDERS", "clean", "micl", "order1", "order2", "public_order1", "public_order2"]

Order = Literal[1, 2]

ORDERS: Mapping[Order, tuple[str, ...]] = {
    1: ("audio-caption", "image-caption", "video-qa", "audio-qa", "image-qa", "video-caption"),
    2: ("image-caption", "video-caption", "video-qa", "image-qa", "audio-caption", "audio-qa"),
}
"""Stages in order of learning."""

DATA: Mapping[str, tuple[str, str]] = {
    "image-caption": ("flickr30k", "flickr30k"),
    "image-qa": ("okvqa", "okvqa"),
    "video-caption": ("msrvtt", "msrvtt"),
    "video-qa": ("msvd_qa", "msvd"),
    "audio-caption": ("audiocaps", "audiocaps"),
    "audio-qa": ("clotho_aqa", "clotho_aqa"),
}
"""Data set of each stage, and its folder."""

PSEUDO: Mapping[str, str] = {
    "flickr30k": "Flickr30k",
    "msrvtt": "MSRVTT",
    "audiocaps": "AudioCaps",
}
"""Beginning of the names of the files in ``pseudo_targets``."""

LIMITED = ("okvqa", "msvd_qa", "clotho_aqa")
"""Data sets whose loaders keep 1,000 test questions unless told otherwise."""

LONGEST = 50
"""Words of a target, and of an inquiry."""


def micl(root: Path, order: Order, *, name: str = "", public: bool = False, skip_bad: bool = False) -> Stream:
    """The six stages, with pseudo targets for captions and inquiries where their files are there.

    Args:
        root: one folder per data set, ``pseudo_targets`` and ``Natural_Instructions``.
        public: prompts and cleaning of the paper, and whole test sets; the mini world's texts are what they should be.

    Raises:
        DataError: files are missing or damaged, or a stage has nothing to learn.
    """
    known: dict[Path, str] = {}
    stages = []
    for stage in ORDERS[order]:
        task = _load(root, stage, public, skip_bad)
        if skip_bad:  # whoever skips bad files wants corrupt ones found as well
            task = verify(task, skip_bad=True, known=known)
        if not task.train:
            raise DataError(
                f"{task.name}: no training sample in {root}. At least one is expected; check the annotation files."
            )
        stages.append(Stage(stage, (_with_pseudo(task, root / "pseudo_targets"),)))
    texts = root / "Natural_Instructions"
    inquiries = (
        natural_instructions.read(texts, longest=LONGEST, clean=clean if public else None) if texts.is_dir() else ()
    )
    return Stream(name or f"micl-order{order}", tuple(stages), inquiries=inquiries)


order1 = partial(micl, order=1)
order2 = partial(micl, order=2)
public_order1 = partial(micl, order=1, name="micl-public-order1", public=True)
public_order2 = partial(micl, order=2, name="micl-public-order2", public=True)


def clean(text: str) -> str:
    """Lower case, without the punctuation that the paper drops, at most 50 words."""
    return " ".join(re.sub(r'[.!"()*#:;~]', " ", text.lower()).split()[:LONGEST])


def _load(root: Path, stage: str, public: bool, skip_bad: bool) -> Task:
    name, folder = DATA[stage]
    modality, kind = stage.split("-")
    settings: dict[str, object] = {}
    if public and kind == "caption":
        settings["prompt"] = f"describe the {modality}."
    if public and name in LIMITED:
        settings["test_size"] = None
    task: Task = TASKS.get(name)(root / folder, skip_bad=skip_bad, **settings)
    return _cleaned(task) if public else task


def _cleaned(task: Task) -> Task:
    def clean_all(samples: Sequence[Sample]) -> tuple[Sample, ...]:
        return tuple(
            dataclasses.replace(
                sample,
                prompt=sample.prompt if task.kind == "caption" else clean(sample.prompt) or sample.prompt,
                answers=tuple(clean(answer) or answer for answer in sample.answers),
            )
            for sample in samples
        )

    return dataclasses.replace(task, train=clean_all(task.train), val=clean_all(task.val), test=clean_all(task.test))


def _with_pseudo(task: Task, folder: Path) -> Task:
    """The task with its pseudo targets, if there is a file of them; their names come in several cases."""
    if task.name not in PSEUDO or not folder.is_dir():
        return task
    wanted = f"{PSEUDO[task.name]}_pseudo_qa_dict"
    files = sorted(path for path in folder.iterdir() if path.stem.lower() == wanted.lower())
    return pseudo_qa.attach(task, files[0].with_suffix(".json")) if files else task
