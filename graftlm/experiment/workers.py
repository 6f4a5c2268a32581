"""Worker processes: cells side by side, of one run or of many, and none left behind when the parent is gone."""

import contextlib
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from graftlm.core.errors import GraftError, RunError
from graftlm.core.files import locked
from graftlm.experiment.cells import Cell, Worker
from graftlm.experiment.kinds import open_worker
from graftlm.experiment.progress import Progress
from graftlm.experiment.spec import ExperimentSpec

__all__ = ["Failure", "Job", "wait_for_orphans", "work", "work_through"]

WORKERS_LOCK = ".workers.lock"
"""Held by every worker: a killed run's workers must be gone before the run goes on."""


@dataclass(frozen=True)
class Job:
    """A cell of a run folder.

    Attributes:
        after: jobs, by run and cell, that must be over before this one begins.
    """

    run: Path
    cell: Cell
    after: frozenset[tuple[Path, Cell]] = frozenset()

    @property
    def name(self) -> tuple[Path, Cell]:
        """What others call it in ``after``."""
        return self.run, self.cell


@dataclass(frozen=True)
class Failure:
    """Why a job did not finish.

    Attributes:
        message: for people.
        detail: a traceback, where the error was not foreseen.
        kind: what to raise.
        died: the process is gone; otherwise it said so itself.
    """

    message: str
    detail: str = ""
    kind: type[Exception] = RuntimeError
    died: bool = False


Over = Callable[[Job, Failure | None], None]
"""Called with every job that is over, and what went wrong, if anything."""


def wait_for_orphans(out: Path) -> None:
    """Return when no worker of an earlier, killed run is left; they end at their next word to the parent.

    Raises:
        RunError: one is still there after a minute.
    """
    with locked(out / WORKERS_LOCK, wait=60, busy=f"{out}: workers of a killed run are still alive. Stop them first."):
        pass


def work(spec: ExperimentSpec, out: Path, cells: Sequence[Cell], jobs: int, progress: Progress) -> None:
    """Give cells to ``jobs`` worker processes in order, until all are done or one fails.

    A cell waits until those of lower rank are finished.

    Raises:
        RunError: a worker died.
        GraftError: what a cell could not do.
    """
    waiting = sorted(cells, key=lambda cell: cell.rank)
    planned = [Job(out, cell, frozenset((out, low) for low in waiting if low.rank < cell.rank)) for cell in waiting]
    work_through({out: spec}, planned, jobs, progress, home=out)


def work_through(
    specs: Mapping[Path, ExperimentSpec],
    jobs: Sequence[Job],
    processes: int,
    progress: Progress,
    *,
    home: Path,
    over: Over | None = None,
) -> None:
    """Give jobs to worker processes: whenever one is idle, it gets the first job that has nothing to wait for.

    Args:
        specs: the experiment of every run folder.
        home: the folder whose lock says that workers are alive.
        over: told of every job. With it a failed job, or a worker that dies, stops nothing else; jobs that had to wait for it
            are tried. Without it the first failure ends the work.

    Raises:
        RunError: a worker died, and there is no ``over``.
        GraftError: what a job could not do, and there is no ``over``.
    """
    pool = _Pool(specs, jobs, home)
    try:
        for _ in range(min(processes, len(jobs))):
            pool.hire()
        pool.hand_out()
        while pool.doing:
            for pipe in connection.wait(list(pool.pipes)):
                assert isinstance(pipe, Connection)
                try:
                    message = pipe.recv()
                except (EOFError, ConnectionResetError):
                    failure = pool.bury(pipe)
                    _tell(pool.finish(pipe), failure, over)
                    pool.hire()
                    pool.hand_out()
                    continue
                if message[0] in ("finished", "failed"):
                    _tell(pool.finish(pipe), message[1] if message[0] == "failed" else None, over)
                    pool.hand_out()
                elif message[0] == "cell":
                    progress.cell(message[1], message[2])
                else:
                    progress.advance(message[1])
        pool.dismiss()
    finally:
        pool.kill()


def _tell(job: Job | None, failure: Failure | None, over: Over | None) -> None:
    if over is None and failure is not None:
        if job is None or failure.died:
            raise RunError(failure.message)
        raise failure.kind(f"{job.cell.kind} {job.cell.name}: {failure.detail or failure.message}")
    if over is not None and job is not None:
        over(job, failure)


class _Pool:
    """The processes, what each does, and what is still to do."""

    def __init__(self, specs: Mapping[Path, ExperimentSpec], jobs: Sequence[Job], home: Path) -> None:
        self.pipes: dict[Connection, BaseProcess] = {}
        self.doing: dict[Connection, Job] = {}
        self._texts = {run: spec.to_yaml() for run, spec in specs.items()}
        self._waiting = list(jobs)
        self._pending = {job.name for job in jobs}
        self._home = home
        self._context: SpawnContext = multiprocessing.get_context("spawn")  # fork would copy threads that already run

    def hire(self) -> None:
        """One process more, unless there is nothing to give it."""
        if not self._waiting:
            return
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(self._home, theirs), daemon=True)
        process.start()
        theirs.close()
        self.pipes[ours] = process

    def hand_out(self) -> None:
        """Give idle workers what has nothing to wait for."""
        for pipe in self.pipes:
            ready = next((job for job in self._waiting if not job.after & self._pending), None)
            if pipe in self.doing or ready is None:
                continue
            self._waiting.remove(ready)
            self.doing[pipe] = ready
            label = f"{ready.run.name}: " if len(self._texts) > 1 else ""
            with contextlib.suppress(BrokenPipeError):  # it died while idle; the next `recv` says so
                pipe.send((ready.run, ready.cell, self._texts[ready.run], label))

    def finish(self, pipe: Connection) -> Job | None:
        """This worker's job is over, one way or the other."""
        job = self.doing.pop(pipe, None)
        if job is not None:
            self._pending.discard(job.name)
        return job

    def bury(self, pipe: Connection) -> Failure:
        """Take a dead worker off the list and say how it died."""
        process = self.pipes.pop(pipe)
        process.join(5)
        pipe.close()
        return Failure(
            f"a worker process died (exit code {process.exitcode}); memory may have run out, or it was killed. What was "
            f"finished is kept: run the same command again to continue.",
            kind=RunError,
            died=True,
        )

    def dismiss(self) -> None:
        """Let everybody go home."""
        for pipe in self.pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.send(None)
        for process in self.pipes.values():
            process.join()

    def kill(self) -> None:
        """Nobody may stay."""
        for process in self.pipes.values():
            process.kill()
            process.join()


class Wire:
    """A `Progress` that speaks to the parent process; it ends this process when the parent is gone."""

    def __init__(self, pipe: Connection, label: str = "") -> None:
        self._pipe = pipe
        self._label = label

    def start(self, total_units: float) -> None:
        """Only the parent starts."""

    def cell(self, name: str, text: str) -> None:
        """What a cell is doing."""
        self._pipe.send(("cell", f"{self._label}{name}", text))

    def advance(self, units: float) -> None:
        """Work is done."""
        self._pipe.send(("advance", units))

    def done(self) -> None:
        """Only the parent ends."""


def _serve(home: Path, pipe: Connection) -> None:
    """A worker process: take jobs from the pipe until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    with locked(home / WORKERS_LOCK, shared=True), contextlib.suppress(EOFError, BrokenPipeError):
        worker: Worker | None = None
        where: Path | None = None
        while (job := pipe.recv()) is not None:
            run, cell, text, label = job
            try:
                with locked(run / WORKERS_LOCK, shared=True):
                    if worker is None or where != run:
                        worker = None  # one model at a time
                        worker, where = open_worker(ExperimentSpec.from_yaml(text), run), run
                    worker.do(cell, Wire(pipe, label))
                pipe.send(("finished",))
            except GraftError as error:
                worker = None  # its model may be half open
                pipe.send(("failed", Failure(str(error), kind=type(error))))
            except Exception as error:
                worker = None
                message = f"unexpected {type(error).__name__}: {error}"
                pipe.send(("failed", Failure(message, detail=traceback.format_exc())))
