"""LLaVA-c's two streams, of pictures alone: five tasks for a finished model, and six domains that finish one.

Paper:   Liu et al., LLaVA-c, arXiv:2506.08666, Tables 1 and 7.
Differs: the general benchmarks that the paper measures (MME, MMBench, SEED, LLaVA-Bench, MM-Vet, MMMU) are not read; POPE is. In
    the mini world captions, questions, lettered questions and text-only instructions stand for them. For the five tasks
    the public stream learns the finished LLaVA-1.5 itself: captions first, then the six domains at once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftlm.core.errors import DataError
from graftlm.data.miniworld.llavac_questions import ONE_WORD
from graftlm.data.miniworld.words import NUMBERS
from graftlm.data.tasks import TASKS
from graftlm.data.tasks.choices import Wording
from graftlm.data.tasks.llava_json import DOMAINS
from graftlm.data.tasks.pope import SUBSETS
from graftlm.data.tasks.reading import verify
from graftlm.data.types import Sample, Stage, Stream, Task

__all__ = ["FINETUNE", "finetune", "pretrain", "public_finetune", "public_pretrain"]

FINETUNE = ("iconqa", "super_clevr", "clevr_math", "figureqa", "arxivqa")
"""The five tasks in the paper's order."""

_WORD = Wording(ONE_WORD, separator=" ")
_LETTER = Wording(". answer with a letter .", "{letter} {text}", " ")
_LETTER_LAST = Wording(". answer with a sentence ending with the letter .", "{letter} {text}", " ")

WORDINGS: Mapping[str, Mapping[str, Any]] = {
    "iconqa": {"wording": _LETTER},
    "super_clevr": {"wording": _WORD},
    "clevr_math": {"wording": _WORD, "numbers": NUMBERS},
    "figureqa": {"wording": _LETTER_LAST, "answer": "the answer is {letter}"},
    "arxivqa": {"wording": _LETTER},
    "pope": {"wording": _WORD},
}
"""Table 7's instructions in the words of the mini world."""


class _Reader:
    """Tasks below a root. Whoever skips bad files wants corrupt ones found as well, each decoded once."""

    def __init__(self, root: Path, settings: Mapping[str, Mapping[str, Any]], skip_bad: bool) -> None:
        self.root, self.settings, self.skip_bad = root, settings, skip_bad
        self.known: dict[Path, str] = {}

    def load(self, kind: str, folder: str, name: str, **settings: Any) -> Task:
        """A task of one kind of data set, from its folder."""
        given = {**self.settings.get(kind, {}), **settings}
        task: Task = TASKS.get(kind)(self.root / folder, skip_bad=self.skip_bad, name=name, **given)
        return verify(task, skip_bad=True, known=self.known) if self.skip_bad else task

    def learned(self, kind: str, folder: str, name: str, **settings: Any) -> Task:
        """A task with something to learn.

        Raises:
            DataError: it has no training sample.
        """
        task = self.load(kind, folder, name, **settings)
        if not task.train:
            raise DataError(
                f"{name}: no training sample in {self.root / folder}. At least one is expected; check the annotation files."
            )
        return task

    def domains(self) -> list[Task]:
        """The six domains."""
        return [self.learned("llava_json", "llava", domain, domain=domain) for domain in DOMAINS]

    def pope(self) -> list[Task]:
        """The three subsets."""
        return [self.load("pope", "pope", f"pope_{subset}", subset=subset) for subset in SUBSETS]

    def general(self) -> list[Task]:
        """What a finished model of the mini world can do with pictures: describe them, and answer in three ways."""
        letters = self.learned("letters", "choice/image", "choice_image", media=self.root)
        return [
            self.learned("coco", "coco", "coco"),
            self.learned("okvqa", "okvqa", "okvqa"),
            letters,
            *self.pope(),
        ]


def finetune(root: Path, *, skip_bad: bool = False) -> Stream:
    """The five tasks in the mini world, after a start that learned captions, three kinds of questions, and TQA.

    Probes are the test samples of what the start learned about pictures, and text-only instructions in formats that nobody
    learns.
    """
    reader = _Reader(root, WORDINGS, skip_bad)
    stages = tuple(Stage(name, (reader.learned(name, name, name),)) for name in FINETUNE)
    tqa = reader.learned("llava_json", "llava", "tqa", domain="tqa")
    coco, okvqa, letters, pope, *others = reader.general()
    return Stream(
        "llavac-finetune",
        stages,
        (coco, okvqa, letters, pope, *others, reader.load("instructions", "instructions", "instructions")),
        start=Stage("general", (coco, okvqa, tqa, letters, pope)),
        inquiries=_inquiries(tqa),
    )


def pretrain(root: Path, *, skip_bad: bool = False) -> Stream:
    """The six domains in the mini world, after a start that aligned the connector on captions.

    Probes are questions about other pictures, and text-only instructions in formats that nobody learns.
    """
    reader = _Reader(root, WORDINGS, skip_bad)
    domains = reader.domains()
    coco, *others = reader.general()
    return Stream(
        "llavac-pretrain",
        tuple(Stage(task.name, (task,)) for task in domains),
        (*others, reader.load("instructions", "instructions", "instructions")),
        start=Stage("alignment", (coco,)),
        aligned=True,
        inquiries=_inquiries(domains[0]),
    )


def public_finetune(root: Path, *, skip_bad: bool = False) -> Stream:
    """The five public data sets, after LLaVA-1.5: one folder each below ``root``, LLaVA's two files and pictures in ``llava``.

    POPE is measured when its folder is there.
    """
    types = {"iconqa": {"types": ("choose_txt", "fill_in_blank"), "test_size": 2000}}
    reader = _Reader(root, types, skip_bad)
    stages = tuple(Stage(name, (reader.learned(name, name, name),)) for name in FINETUNE)
    alignment, domains = _alignment(reader), reader.domains()
    return Stream(
        "llava-c-finetune",
        stages,
        _public_probes(reader),
        start=Stage("general", (alignment, *domains)),
        inquiries=_inquiries(domains[0]),
    )


def public_pretrain(root: Path, *, skip_bad: bool = False) -> Stream:
    """LLaVA-665k in six domains, after the alignment of the connector: its two files and pictures in ``llava``.

    POPE is measured when its folder is there.
    """
    reader = _Reader(root, {}, skip_bad)
    domains = reader.domains()
    return Stream(
        "llava-c-pretrain",
        tuple(Stage(task.name, (task,)) for task in domains),
        _public_probes(reader),
        start=Stage("alignment", (_alignment(reader),)),
        aligned=True,
        inquiries=_inquiries(domains[0]),
    )


def _alignment(reader: _Reader) -> Task:
    return reader.learned("llava_json", "llava", "alignment", domain="alignment")


def _public_probes(reader: _Reader) -> tuple[Task, ...]:
    return tuple(reader.pope()) if (reader.root / "pope").is_dir() else ()


def _inquiries(tqa: Task) -> tuple[Sample, ...]:
    """The questions of TQA, with their answers, which only replay looks at."""
    return tuple(tqa.train)
