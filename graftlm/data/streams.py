"""Named streams: which stages, in which order."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

from graftlm.core.errors import DataError
from graftlm.core.registry import Registry
from graftlm.data.tasks import TASKS
from graftlm.data.tasks.reading import verify
from graftlm.data.types import Stage, Stream, Task

__all__ = ["STREAMS", "mera", "miniworld"]

Order = Literal["sequential", "reverse"]

STREAMS = Registry(
    "stream",
    {
        "miniworld-sequential": "graftlm.data.streams:miniworld_sequential",
        "miniworld-reverse": "graftlm.data.streams:miniworld_reverse",
        "miniworld-long": "graftlm.data.streams:miniworld_long",
        "miniworld-long-reverse": "graftlm.data.streams:miniworld_long_reverse",
        "mera-sequential": "graftlm.data.streams:mera_sequential",
        "mera-reverse": "graftlm.data.streams:mera_reverse",
    },
    "graftlm.streams",
)

MERA: Mapping[str, tuple[str, str]] = {
    "image": ("coco", "okvqa"),
    "video": ("msvd", "msvd_qa"),
    "audio": ("audiocaps", "clotho_aqa"),
    "point": ("cap3d", "cap3d_qa"),
}
"""Captions and questions of each modality, in sequential order. Paper: MERA, arXiv:2503.07663, Table 8."""

FOLDERS = {"msvd_qa": "msvd"}
"""Data sets that live in another's folder."""


def miniworld(root: Path, order: Order = "sequential", *, long: bool = False, skip_bad: bool = False) -> Stream:
    """The mini world: four stages, or eight in which every modality comes back with new attributes and tasks.

    The order of the second visits is that of the first.
    """
    names = list(MERA) if order == "sequential" else list(MERA)[::-1]
    stages = [_stage(root, name, name, "", skip_bad) for name in names]
    if long:
        stages += [_stage(root / "second", name, f"{name}2", "_2", skip_bad) for name in names]
    probes = (_load("mcub", root, skip_bad), _load("instructions", root, skip_bad))
    return Stream(f"miniworld-{'long-' if long else ''}{order}", tuple(stages), probes)


def mera(root: Path, order: Order = "sequential", *, skip_bad: bool = False) -> Stream:
    """The eight data sets of MERA, one folder each below ``root``; MCUB is measured when its folder is there."""
    names = list(MERA) if order == "sequential" else list(MERA)[::-1]
    stages = tuple(_stage(root, name, name, "", skip_bad) for name in names)
    probes = (_load("mcub", root, skip_bad),) if (root / "mcub").is_dir() else ()
    return Stream(f"mera-{order}", stages, probes)


miniworld_sequential = partial(miniworld, order="sequential")
miniworld_reverse = partial(miniworld, order="reverse")
miniworld_long = partial(miniworld, order="sequential", long=True)
miniworld_long_reverse = partial(miniworld, order="reverse", long=True)
mera_sequential = partial(mera, order="sequential")
mera_reverse = partial(mera, order="reverse")


def _stage(root: Path, modality: str, name: str, suffix: str, skip_bad: bool) -> Stage:
    tasks = tuple(_load(task, root, skip_bad, suffix) for task in MERA[modality])
    for task in tasks:
        if not task.train:
            raise DataError(
                f"{task.name}: no training sample in {root}. At least one is expected; check the annotation files."
            )
    return Stage(name, tasks)


def _load(name: str, root: Path, skip_bad: bool, suffix: str = "") -> Task:
    task: Task = TASKS.get(name)(root / FOLDERS.get(name, name), skip_bad=skip_bad, name=f"{name}{suffix}")
    return verify(task, skip_bad=True) if skip_bad else task  # whoever skips bad files wants corrupt ones found as well
