"""Named streams: which stages, in which order."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from graftlm.core.errors import ConfigError, DataError, did_you_mean
from graftlm.core.registry import Registry
from graftlm.data.miniworld.combinations import COMBINATIONS
from graftlm.data.tasks import TASKS, letters
from graftlm.data.tasks.reading import verify
from graftlm.data.types import Stage, Stream, Task

__all__ = ["STREAMS", "experts", "mera", "miniworld"]

Order = Literal["sequential", "reverse"]

STREAMS = Registry(
    "stream",
    {
        "miniworld-sequential": "graftlm.data.streams:miniworld_sequential",
        "miniworld-reverse": "graftlm.data.streams:miniworld_reverse",
        "miniworld-long": "graftlm.data.streams:miniworld_long",
        "miniworld-long-reverse": "graftlm.data.streams:miniworld_long_reverse",
        "miniworld-experts": "graftlm.data.streams:experts",
        "llavac-finetune": "graftlm.data.llavac:finetune",
        "llavac-pretrain": "graftlm.data.llavac:pretrain",
        "micl-order1": "graftlm.data.micl:order1",
        "micl-order2": "graftlm.data.micl:order2",
        "mera-sequential": "graftlm.data.streams:mera_sequential",
        "mera-reverse": "graftlm.data.streams:mera_reverse",
        "llava-c-finetune": "graftlm.data.llavac:public_finetune",
        "llava-c-pretrain": "graftlm.data.llavac:public_pretrain",
        "micl-public-order1": "graftlm.data.micl:public_order1",
        "micl-public-order2": "graftlm.data.micl:public_order2",
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
    names = _modalities(order)
    known: dict[Path, str] | None = {} if skip_bad else None
    stages = [_stage(root, name, name, "", known) for name in names]
    if long:
        stages += [_stage(root / "second", name, f"{name}2", "_2", known) for name in names]
    instructions = _load("instructions", root, known)
    name = f"miniworld-{'long-' if long else ''}{order}"
    probes = (_load("mcub", root, known), instructions)
    return Stream(name, tuple(stages), probes, inquiries=tuple(instructions.train))


def experts(root: Path, *, skip_bad: bool = False) -> Stream:
    """The mini world for experts that are composed afterwards: a stage per modality, each to be learned alone.

    Half of a stage's samples are lettered questions over its own modality (``choice_<modality>``): an expert that learns
    captions and free answers only forgets how to answer with a letter, and could not be asked about combinations. Probes
    are the nine combinations (``expansion_<combination>``), which nobody learns, and text-only instructions. What may come
    later are the tasks of the second visits, each alone.
    """
    known: dict[Path, str] | None = {} if skip_bad else None
    stages = tuple(
        Stage(name, (*_stage(root, name, name, "", known).tasks, _letters(root, f"choice/{name}", known, root)))
        for name in MERA
    )
    probes = tuple(_letters(root, f"expansion/{name}", known) for name in COMBINATIONS)
    later = tuple(
        Stage(task.name, (task,))
        for name in MERA
        for task in _stage(root / "second", name, f"{name}2", "_2", known).tasks
    )
    return Stream("miniworld-experts", stages, (*probes, _load("instructions", root, known)), later)


def mera(root: Path, order: Order = "sequential", *, skip_bad: bool = False) -> Stream:
    """The eight data sets of MERA, one folder each below ``root``; MCUB is measured when its folder is there."""
    names = _modalities(order)
    known: dict[Path, str] | None = {} if skip_bad else None
    stages = tuple(_stage(root, name, name, "", known) for name in names)
    probes = (_load("mcub", root, known),) if (root / "mcub").is_dir() else ()
    return Stream(f"mera-{order}", stages, probes)


miniworld_sequential = partial(miniworld, order="sequential")
miniworld_reverse = partial(miniworld, order="reverse")
miniworld_long = partial(miniworld, order="sequential", long=True)
miniworld_long_reverse = partial(miniworld, order="reverse", long=True)
mera_sequential = partial(mera, order="sequential")
mera_reverse = partial(mera, order="reverse")


def _modalities(order: Order) -> list[str]:
    if order not in get_args(Order):
        raise ConfigError(f"order '{order}'; {did_you_mean(order, get_args(Order))}")
    return list(MERA) if order == "sequential" else list(MERA)[::-1]


def _stage(root: Path, modality: str, name: str, suffix: str, known: dict[Path, str] | None) -> Stage:
    tasks = tuple(_load(task, root, known, suffix) for task in MERA[modality])
    for task in tasks:
        if not task.train:
            raise DataError(
                f"{task.name}: no training sample in {root}. At least one is expected; check the annotation files."
            )
    return Stage(name, tasks)


def _load(name: str, root: Path, known: dict[Path, str] | None, suffix: str = "") -> Task:
    """A task; with a dict of what is ``known`` about files, which grows, its bad media are left out.

    Whoever skips bad files wants corrupt ones found as well. Two data sets share each picture, clip or cloud: it is
    decoded once.
    """
    folder, skip_bad = root / FOLDERS.get(name, name), known is not None
    task: Task = TASKS.get(name)(folder, skip_bad=skip_bad, name=f"{name}{suffix}")
    return verify(task, skip_bad=True, known=known) if skip_bad else task


def _letters(root: Path, place: str, known: dict[Path, str] | None, media: Path | None = None) -> Task:
    """Lettered questions of the mini world, named after their folder."""
    skip_bad = known is not None
    task: Task = letters.load(root / place, skip_bad=skip_bad, name=place.replace("/", "_"), media=media)
    return verify(task, skip_bad=True, known=known) if skip_bad else task
