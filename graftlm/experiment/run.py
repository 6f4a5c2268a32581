"""Walk a stream: experts, then every method, stage by stage; measure, write down, resume.

A run is a set of cells that need nothing of each other: the base, one expert per stage, one chain of stages per
method. Cells run side by side in worker processes; what two of them would learn alike is learned once (see
`experiment.stages`). Re-running the same command continues: finished stages are kept, a stage that was cut short is
learned again from its parent, and predictions continue after the last finished batch.
"""

import contextlib
import multiprocessing
import signal
import sqlite3
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from graftlm.core import seeds
from graftlm.core.errors import GraftError, RunError
from graftlm.core.files import locked, read_json, write_json
from graftlm.data import streams
from graftlm.data.miniworld.world import WorldSpec, build
from graftlm.data.types import Sample, Stage, Stream, Task
from graftlm.evaluation import gains, suite
from graftlm.evaluation.blind import blind
from graftlm.experiment.progress import Progress, Silent
from graftlm.experiment.spec import ExperimentSpec
from graftlm.experiment.stages import LearnedStage, StageStore, cache_folder, copy_linked
from graftlm.experiment.store import RunStore
from graftlm.learning.phase import Schedule
from graftlm.methods import build as build_methods
from graftlm.report import page

__all__ = ["open_stream", "run"]

WORKERS_LOCK = ".workers.lock"
"""Held by every worker: a killed run's workers must be gone before the run goes on."""

EVALUATION_UNIT = 0.35
"""Cost of answering one test item, in units of one training sample (both measured on the mini world)."""


@dataclass(frozen=True)
class Cell:
    """One independent piece of a run: ("base", ""), ("expert", stage) or ("method", name)."""

    kind: str
    name: str


def run(spec: ExperimentSpec, out: Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Run an experiment, or what is left of it, and write its report.

    Args:
        out: the run folder.
        progress: where to tell how far it is.

    Returns:
        The content of ``summary.json``.

    Raises:
        RunError: another process works on this folder, the folder holds another experiment, or a worker died.
        GraftError: whatever a cell could not do; finished work is kept.
    """
    progress = progress or Silent()
    spec.check()
    store = RunStore.open(out, spec)
    with store.lock():
        with locked(
            out / WORKERS_LOCK, wait=60, busy=f"{out}: workers of a killed run are still alive. Stop them first."
        ):
            pass
        stream = open_stream(spec)
        cells = plan_cells(spec, stream)
        progress.start(sum(_units(spec, stream, cell) for cell in cells))
        jobs = min(spec.job_count(), len(cells))
        try:
            if jobs == 1:
                worker = Worker(spec, out)
                for cell in cells:
                    worker.do(cell, progress)
            else:
                _work_side_by_side(spec, out, cells, jobs, progress)
        finally:
            progress.done()
        summary = summarise(spec, store, stream)
        write_json(out / "summary.json", summary)
        store.journal("summary")
        page.write(out)
        store.journal("report")
    return summary


def open_stream(spec: ExperimentSpec) -> Stream:
    """The stream of an experiment; the mini world is written first, unless it is there."""
    root = Path(spec.data.root) if spec.data.root else _world(spec)
    stream: Stream = streams.STREAMS.get(spec.stream)(root, skip_bad=spec.data.skip_bad)
    return stream


def _world(spec: ExperimentSpec) -> Path:
    seed = spec.seed if spec.data.seed is None else spec.data.seed
    stages: Literal[4, 8] = 8 if "long" in spec.stream else 4
    return build(WorldSpec(spec.data.size, seed, spec.data.conflict, stages), cache_folder() / "worlds").resolve()


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
            cache_folder(), spec.model_spec(), self.stream, self.schedule, spec.seed, spec.device_name()
        )

    def do(self, cell: Cell, progress: Progress) -> None:
        """Finish a cell, from wherever it is.

        Raises:
            RunError: a file could not be written: no space, no rights.
            GraftError: whatever else went wrong and can be named.
        """
        try:
            if cell.kind == "base":
                self._base(progress)
            elif cell.kind == "expert":
                self._expert(cell.name, progress)
            else:
                self._method(cell.name, progress)
        except (OSError, SafetensorError, sqlite3.Error) as error:
            raise RunError(
                f"a file could not be read or written ({error}). Make space or correct the rights, and run the same "
                f"command again: what was finished is kept."
            ) from error

    def _base(self, progress: Progress) -> None:
        folder = self.store.base()
        tasks = _answerable(self.spec, self.stream, [])
        if not (folder / "scores.json").exists() and tasks:
            self._evaluate(None, tasks, folder, progress, "base")

    def _expert(self, name: str, progress: Progress) -> None:
        stage = next(stage for stage in self.stream.stages if stage.name == name)
        folder = self.store.expert(name)
        learned = self._learn(stage, [], [], None, folder, progress, f"expert {name}")
        self._measure(learned, list(stage.tasks), folder, progress, f"expert {name}")
        floor = self.store.blind(name)
        tasks = [blind(task, seeds.derive(self.spec.seed, "blind", task.name)) for task in stage.tasks]
        self._measure(learned, tasks, floor, progress, f"expert {name} blind")

    def _method(self, name: str, progress: Progress) -> None:
        methods = build_methods(self.spec.mixes()[name], f"methods.{name}")
        parent: LearnedStage | None = None
        for index, stage in enumerate(self.stream.stages):
            folder = self.store.stage(name, index, stage.name)
            label = f"{name} {index + 1}/{len(self.stream.stages)} {stage.name}"
            past = self.stream.stages[:index]
            parent = self._learn(stage, past, methods, parent, folder, progress, label)
            seen = [*past, stage]
            tasks = [task for each in seen for task in each.tasks]
            probes = _answerable(self.spec, self.stream, [m for each in seen for m in each.modalities])
            self._measure(parent, [*tasks, *probes], folder, progress, label)

    def _learn(
        self,
        stage: Stage,
        past: Sequence[Stage],
        methods: Sequence[Any],
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
        learned = self.stages.obtain(stage, past, methods, parent, progress=tell)
        told.rest()
        copy_linked(learned.folder, folder)
        self.store.journal("learned", cell=label, key=learned.key)
        return LearnedStage(folder)

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


def _answerable(spec: ExperimentSpec, stream: Stream, modalities: Sequence[str]) -> list[Task]:
    """Probes whose modalities the model has, with samples in the measured split."""
    return [probe for probe in stream.probes if set(probe.modalities) <= set(modalities) and _measured(spec, probe)]


def _measured(spec: ExperimentSpec, task: Task) -> Sequence[Sample]:
    return task.test if spec.evaluate.split == "test" else task.val


def _learning_units(stage: Stage, schedule: Schedule) -> float:
    return float(sum(len(stage.samples(phase.kinds)) * phase.epochs for phase in schedule.phases))


def _evaluation_units(tasks: Sequence[Task], spec: ExperimentSpec) -> float:
    sizes = [len(_measured(spec, task)) for task in tasks]
    limit = spec.evaluate.limit
    return EVALUATION_UNIT * sum(size if limit is None else min(limit, size) for size in sizes)


def _units(spec: ExperimentSpec, stream: Stream, cell: Cell) -> float:
    """Work of a cell in training samples."""
    schedule = spec.schedule()
    if cell.kind == "base":
        return _evaluation_units(_answerable(spec, stream, []), spec)
    if cell.kind == "expert":
        stage = next(stage for stage in stream.stages if stage.name == cell.name)
        return _learning_units(stage, schedule) + 2 * _evaluation_units(stage.tasks, spec)
    units = 0.0
    for index, stage in enumerate(stream.stages):
        seen = stream.stages[: index + 1]
        tasks = [task for each in seen for task in each.tasks]
        tasks += _answerable(spec, stream, [m for each in seen for m in each.modalities])
        units += _learning_units(stage, schedule) + _evaluation_units(tasks, spec)
    return units


class Wire:
    """A `Progress` that speaks to the parent process; it ends this process when the parent is gone."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def start(self, total_units: float) -> None:
        """Only the parent starts."""

    def cell(self, name: str, text: str) -> None:
        """What a cell is doing."""
        self._pipe.send(("cell", name, text))

    def advance(self, units: float) -> None:
        """Work is done."""
        self._pipe.send(("advance", units))

    def done(self) -> None:
        """Only the parent ends."""


def _serve(spec_text: str, out: Path, pipe: Connection) -> None:
    """A worker process: take cells from the pipe until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    with locked(out / WORKERS_LOCK, shared=True), contextlib.suppress(EOFError, BrokenPipeError):
        worker: Worker | None = None
        while (cell := pipe.recv()) is not None:
            try:
                worker = worker or Worker(ExperimentSpec.from_yaml(spec_text), out)
                worker.do(cell, Wire(pipe))
                pipe.send(("finished", cell))
            except GraftError as error:
                pipe.send(("failed", cell, f"{cell.kind} {cell.name}: {error}", type(error)))
            except Exception:
                pipe.send(("failed", cell, f"{cell.kind} {cell.name}: {traceback.format_exc()}", RuntimeError))


def _work_side_by_side(spec: ExperimentSpec, out: Path, cells: list[Cell], jobs: int, progress: Progress) -> None:
    """Give cells to worker processes in order, until all are done or one fails."""
    context = multiprocessing.get_context("spawn")  # fork would copy a process that already runs threads
    waiting = list(cells)
    pipes: dict[Connection, BaseProcess] = {}
    process: BaseProcess
    try:
        for _ in range(jobs):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(spec.to_yaml(), out, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes[ours] = process
            ours.send(waiting.pop(0))
        busy = len(pipes)
        while busy:
            for pipe in connection.wait(list(pipes)):
                assert isinstance(pipe, Connection)
                try:
                    message = pipe.recv()
                except (EOFError, ConnectionResetError):
                    raise RunError(
                        f"a worker process died (exit code {_exit_code(pipes[pipe])}); memory may have run out, or it was "
                        f"killed. What was finished is kept: run the same command again to continue."
                    ) from None
                if message[0] == "failed":
                    raise message[3](message[2])
                if message[0] == "finished":
                    busy -= 1
                    if waiting:
                        pipe.send(waiting.pop(0))
                        busy += 1
                elif message[0] == "cell":
                    progress.cell(message[1], message[2])
                else:
                    progress.advance(message[1])
        for pipe in pipes:
            pipe.send(None)
        for process in pipes.values():
            process.join()
    finally:
        for process in pipes.values():
            process.kill()
            process.join()


def _exit_code(process: BaseProcess) -> int | None:
    process.join(5)
    return process.exitcode


def summarise(spec: ExperimentSpec, store: RunStore, stream: Stream) -> dict[str, Any]:
    """Everything a reader asks first, from the scores of a finished run.

    Returns:
        experts, blind and base scores, and per method the backward and forward relative gains (percent per stage),
        raw scores per stage, probes and costs.
    """
    experts = {stage.name: _values(store.expert(stage.name), stage.tasks) for stage in stream.stages}
    methods: dict[str, Any] = {}
    for name, entries in spec.mixes().items():
        scores, probes, cost = [], [], []
        for index, stage in enumerate(stream.stages):
            folder = store.stage(name, index, stage.name)
            seen = stream.stages[: index + 1]
            scores.append({each.name: _values(folder, each.tasks) for each in seen})
            asked = _answerable(spec, stream, [m for each in seen for m in each.modalities])
            probes.append(_values(folder, asked))
            cost += [{"stage": stage.name} | log for log in LearnedStage(folder).fit]
        backward, forward = gains.backward_gains(scores, experts), gains.forward_gains(scores, experts)
        mean, std = gains.summary(backward)
        methods[name] = {
            "ingredients": entries,
            "backward": backward,
            "forward": forward,
            "backward_mean": mean,
            "backward_std": std,
            "scores": scores,
            "probes": probes,
            "cost": [log | {"tokens_per_second": log["tokens"] / max(log["seconds"], 1e-9)} for log in cost],
        }
    return {
        "name": spec.name,
        "order": [stage.name for stage in stream.stages],
        "seed": spec.seed,
        "split": spec.evaluate.split,
        "experts": experts,
        "blind": {stage.name: _values(store.blind(stage.name), stage.tasks) for stage in stream.stages},
        "base": _values(store.base(), _answerable(spec, stream, [])),
        "methods": methods,
    }


def _values(folder: Path, tasks: Sequence[Task]) -> dict[str, float]:
    scores = read_json(folder / "scores.json")
    return {task.name: scores[task.name]["value"] for task in tasks}
