"""The cells of a run, and one process's way of finishing them.

A cell needs nothing of the others: the base on the probes, one stage learned alone (an expert, with its blind floor), or
one method through the whole stream. Whatever is finished in the run folder is kept, so a cell can be started at any point.
"""

import dataclasses
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError

from graftlm.core import seeds
from graftlm.core.cache import cache_folder
from graftlm.core.errors import ConfigError, GraftError, RunError, did_you_mean
from graftlm.core.files import is_complete, locked
from graftlm.core.registry import Registry
from graftlm.data import streams
from graftlm.data.miniworld.world import WorldSpec, build
from graftlm.data.types import Stage, Stream, Task
from graftlm.evaluation import suite
from graftlm.evaluation.blind import blind
from graftlm.experiment.progress import Progress
from graftlm.experiment.shift import Shift
from graftlm.experiment.spec import ExperimentSpec
from graftlm.experiment.stages import LearnedStage, StageStore, copy_linked
from graftlm.experiment.store import RunStore
from graftlm.learning import phase as phases
from graftlm.learning.method import Method
from graftlm.learning.phase import Schedule
from graftlm.methods import build as build_methods

__all__ = [
    "EVALUATION_UNIT",
    "JOINT",
    "Cell",
    "Told",
    "Worker",
    "answerable",
    "asked",
    "check_stream",
    "open_stream",
    "ordered",
    "plan_cells",
    "union",
    "units",
]

WORLDS = Registry(
    "mini world",
    {"llavac": "graftlm.data.miniworld.llavac:build", "micl": "graftlm.data.miniworld.micl:build"},
    "graftlm.worlds",
)
"""Worlds of their own, by the beginning of their streams' names."""

JOINT = "joint"
"""Name of the one stage of a method that learns all of them at once."""

EVALUATION_UNIT = 0.35
"""Cost of answering one test item, in units of one training sample (both measured on the mini world)."""


@dataclass(frozen=True)
class Cell:
    """One piece of a run: ("base", ""), ("expert", stage), ("method", name), or a kind of `composing`.

    Attributes:
        rank: cells of one rank are independent; those of a higher one need all of the lower ones.
    """

    kind: str
    name: str
    rank: int = 0


def open_stream(spec: ExperimentSpec) -> Stream:
    """The stream of an experiment; the mini world is written first, unless it is there."""
    root = Path(spec.data.root) if spec.data.root else _world(spec)
    stream: Stream = streams.STREAMS.get(spec.stream)(root, skip_bad=spec.data.skip_bad)
    return ordered(stream, spec.order)


def union(stream: Stream) -> Stage:
    """All stages as one."""
    return Stage(JOINT, tuple(task for stage in stream.stages for task in stage.tasks))


def start_schedule(spec: ExperimentSpec) -> Schedule:
    """How a start is learned: connectors first, then with the LLM, whatever the phases of a stage are."""
    return phases.schedule("llava-two-step" if spec.data.root else "miniworld")


def check_stream(spec: ExperimentSpec, stream: Stream) -> None:
    """What ingredients have against the stages, before any work.

    Raises:
        ConfigError, DataError: a setting does not fit the stream, or something that an ingredient needs is missing.
    """
    for name, entries in spec.mixes().items():
        for method in build_methods(entries, f"methods.{name}"):
            try:
                method.check(stream)
            except GraftError as error:
                raise type(error)(f"methods.{name}: {error}") from None


def is_generated(stream: str) -> bool:
    """Whether a stream's data are written, not found."""
    family, _, rest = stream.partition("-")
    return family == "miniworld" or (family in WORLDS.table() and not rest.startswith("public"))


def ordered(stream: Stream, order: str | Sequence[str]) -> Stream:
    """The stream with its stages in another order: "given", "reverse", or by name; a stage that is not named is left out.

    Raises:
        ConfigError: no stage of that name, or one twice.
    """
    if order == "given":
        return stream
    if order == "reverse":
        return dataclasses.replace(stream, stages=stream.stages[::-1])
    stages = {stage.name: stage for stage in stream.stages}
    for index, name in enumerate(order):
        if name not in stages:
            raise ConfigError(f"order[{index}]: no stage '{name}' in {stream.name}; {did_you_mean(name, stages)}")
    if len(set(order)) < len(order):
        raise ConfigError(f"order: {list(order)} names a stage twice; each once is expected.")
    return dataclasses.replace(stream, stages=tuple(stages[name] for name in order))


def _world(spec: ExperimentSpec) -> Path:
    seed = spec.seed if spec.data.seed is None else spec.data.seed
    worlds = cache_folder() / "worlds"
    with locked(worlds / ".lock", wait=3600):
        family = spec.stream.partition("-")[0]
        if family != "miniworld":
            folder: Path = WORLDS.get(family)(size=spec.data.size, seed=seed, root=worlds, conflict=spec.data.conflict)
            return folder.resolve()
        experts = spec.stream == "miniworld-experts"
        stages: Literal[4, 8] = 8 if experts or "long" in spec.stream else 4
        return build(WorldSpec(spec.data.size, seed, spec.data.conflict, stages, expansion=experts), worlds).resolve()


def plan_cells(spec: ExperimentSpec, stream: Stream) -> list[Cell]:
    """Experts first: the methods' first stage is one of them."""
    return [
        *(Cell("expert", stage.name) for stage in stream.stages),
        *(Cell("method", name) for name in spec.mixes()),
        Cell("base", ""),
    ]


class Worker:
    """One process's tools, kept from cell to cell."""

    def __init__(self, spec: ExperimentSpec, out: Path) -> None:
        torch.set_num_threads(1)  # two threads of one process are slower than one when the other core is busy
        self.spec = spec
        self.store = RunStore.open(out, spec)
        self.stream = open_stream(spec)
        self.schedule: Schedule = spec.schedule()
        self.stages = StageStore(
            cache_folder(), spec.model_spec(), self.schedule, spec.seed, spec.device_name(), self.stream.inquiries
        )
        self._shift: Shift | None = None  # every method is compared with the same start, which is looked at once

    def do(self, cell: Cell, progress: Progress) -> None:
        """Finish a cell, from wherever it is.

        Raises:
            RunError: a file could not be written: no space, no rights.
            GraftError: whatever else went wrong and can be named.
        """
        try:
            self.finish(cell, progress)
        except (OSError, SafetensorError, sqlite3.Error) as error:
            raise RunError(
                f"a file could not be read or written ({error}). Make space or correct the rights, and run the same "
                f"command again: what was finished is kept."
            ) from error

    def finish(self, cell: Cell, progress: Progress) -> None:
        """What `do` does, without its care for the file system."""
        if cell.kind == "base":
            self._base(progress)
        elif cell.kind == "expert":
            self._expert(cell.name, progress)
        else:
            self._method(cell.name, progress)

    def start(self, progress: Progress) -> LearnedStage | None:
        """What the stream has learned before its first stage: None is the bare base."""
        if self.stream.start is None:
            return None
        progress.cell("start", self.stream.start.name)
        only_connectors: list[Method] = build_methods(["eproj"]) if self.stream.aligned else []
        return self.stages.obtain(self.stream.start, [], only_connectors, None, schedule=start_schedule(self.spec))

    def _base(self, progress: Progress) -> None:
        folder = self.store.base()
        tasks = asked(self.spec, self.stream, 0)
        if not (folder / "scores.json").exists() and tasks:
            self._evaluate(self.start(progress), tasks, folder, progress, "base")

    def _expert(self, name: str, progress: Progress) -> None:
        stage = next(stage for stage in self.stream.stages if stage.name == name)
        folder = self.store.expert(name)
        learned = self._learn(stage, [], [], self.start(progress), folder, progress, f"expert {name}")
        self._measure(learned, list(stage.tasks), folder, progress, f"expert {name}")
        floor = self.store.blind(name)
        tasks = [blind(task, seeds.derive(self.spec.seed, "blind", task.name)) for task in stage.tasks]
        self._measure(learned, tasks, floor, progress, f"expert {name} blind")

    def _method(self, name: str, progress: Progress) -> None:
        methods = build_methods(self.spec.mixes()[name], f"methods.{name}")
        parent = self.start(progress)
        shift = self._shift = self._shift or Shift(self.stages, parent, self.stream.inquiries)
        stages = self.stream.stages
        if any(method.joint for method in methods):
            index = len(stages) - 1
            folder = self.store.stage(name, index, JOINT)
            learned = self._learn(
                union(self.stream), [], methods, parent, folder, progress, f"{name} all stages at once"
            )
            self._measure(learned, asked(self.spec, self.stream, len(stages)), folder, progress, f"{name} {JOINT}")
            shift.write(learned, folder)
            return
        for index, stage in enumerate(stages):
            folder = self.store.stage(name, index, stage.name)
            label = f"{name} {index + 1}/{len(stages)} {stage.name}"
            parent = self._learn(stage, stages[:index], methods, parent, folder, progress, label)
            self._measure(parent, asked(self.spec, self.stream, index + 1), folder, progress, label)
            shift.write(parent, folder)

    def _learn(
        self,
        stage: Stage,
        past: Sequence[Stage],
        methods: Sequence[Method],
        parent: LearnedStage | None,
        folder: Path,
        progress: Progress,
        label: str,
    ) -> LearnedStage:
        units = _learning_units(stage, self.schedule)
        told = Told(progress, units)

        def tell(phase: str, done: int, total: int) -> None:
            progress.cell(label, f"{phase} {done}/{total}")
            told.phase(phase, done)

        progress.cell(label, "looking for this stage")
        if is_complete(folder):
            return self._again(stage, past, methods, parent, folder, told)
        learned = self.stages.obtain(stage, past, methods, parent, progress=tell)
        told.rest()
        copy_linked(learned.folder, folder)
        self.store.journal("learned", cell=label, key=learned.key)
        return LearnedStage(folder)

    def _again(
        self,
        stage: Stage,
        past: Sequence[Stage],
        methods: Sequence[Method],
        parent: LearnedStage | None,
        folder: Path,
        told: "Told",
    ) -> LearnedStage:
        """A stage that the run folder already holds, if it is what would be learned now."""
        there = LearnedStage(folder)
        if there.key != self.stages.key(stage, past, methods, parent):
            raise RunError(
                f"{folder}: learned from other data, or by another version of the code, than there is now; one run must not "
                f"mix them. Choose another --out, or delete this run."
            )
        self.stages.remember(there, methods)
        told.rest()
        return there

    def _measure(
        self, learned: LearnedStage, tasks: Sequence[Task], folder: Path, progress: Progress, label: str
    ) -> None:
        if (folder / "scores.json").exists():
            progress.advance(_evaluation_units(tasks, self.spec))
            return
        self._evaluate(learned, tasks, folder, progress, label)

    def _evaluate(
        self, learned: LearnedStage | None, tasks: Sequence[Task], folder: Path, progress: Progress, label: str
    ) -> None:
        told = Told(progress, _evaluation_units(tasks, self.spec))

        def tell(task: str, done: int, total: int) -> None:
            progress.cell(label, f"answering {task} {done}/{total}")
            told.phase(task, done, EVALUATION_UNIT)

        suite.evaluate(
            self.stages.load(learned),
            tasks,
            folder,
            split=self.spec.evaluate.split,
            limit=self.spec.evaluate.limit,
            batch_size=self.spec.evaluate.batch_size,
            progress=tell,
        )
        told.rest()
        self.store.journal("measured", cell=label)


class Told:
    """Turns "so many of a phase are done" into the advances of a bar, and never more than was planned."""

    def __init__(self, progress: Progress, planned: float) -> None:
        self._progress = progress
        self._left = planned
        self._done: dict[str, int] = {}

    def phase(self, name: str, done: int, unit: float = 1.0) -> None:
        """``done`` items of a phase are finished."""
        step = min(self._left, (done - self._done.get(name, 0)) * unit)
        self._done[name] = done
        self._left -= step
        self._progress.advance(step)

    def rest(self) -> None:
        """The whole is finished: what was planned and not told is told now."""
        self._progress.advance(self._left)
        self._left = 0.0


def answerable(spec: ExperimentSpec, stream: Stream, modalities: Sequence[str]) -> list[Task]:
    """Probes whose modalities the model has, with samples in the measured split."""
    return [
        probe
        for probe in stream.probes
        if set(probe.modalities) <= set(modalities) and probe.measured(spec.evaluate.split)
    ]


def asked(spec: ExperimentSpec, stream: Stream, count: int) -> list[Task]:
    """What a model is measured on after so many stages, probes last.

    The tasks of these stages; of all stages when the stream has a start, as that knows their modalities and can be asked.
    """
    seen = stream.stages[:count]
    known = [m for each in ([stream.start] if stream.start else []) + list(seen) for m in each.modalities]
    of = [stage for stage in stream.stages if set(stage.modalities) <= set(known)] if stream.start else seen
    return [task for stage in of for task in stage.tasks] + answerable(spec, stream, known)


def _learning_units(stage: Stage, schedule: Schedule) -> float:
    return float(sum(len(stage.samples(phase.kinds)) * phase.epochs for phase in schedule.phases))


def _evaluation_units(tasks: Sequence[Task], spec: ExperimentSpec) -> float:
    sizes = [len(task.measured(spec.evaluate.split)) for task in tasks]
    limit = spec.evaluate.limit
    return EVALUATION_UNIT * sum(size if limit is None else min(limit, size) for size in sizes)


def units(spec: ExperimentSpec, stream: Stream, cell: Cell) -> float:
    """Work of a cell in training samples."""
    schedule = spec.schedule()
    if cell.kind == "base":
        return _evaluation_units(asked(spec, stream, 0), spec)
    if cell.kind == "expert":
        stage = next(stage for stage in stream.stages if stage.name == cell.name)
        return _learning_units(stage, schedule) + 2 * _evaluation_units(stage.tasks, spec)
    units = 0.0
    for index, stage in enumerate(stream.stages):
        units += _learning_units(stage, schedule) + _evaluation_units(asked(spec, stream, index + 1), spec)
    return units
