"""Worker processes: cells side by side, and none left behind when the parent is gone."""

import contextlib
import multiprocessing
import signal
import traceback
from collections.abc import Sequence
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from graftlm.core.errors import GraftError, RunError
from graftlm.core.files import locked
from graftlm.experiment.cells import Cell, Worker
from graftlm.experiment.kinds import open_worker
from graftlm.experiment.progress import Progress
from graftlm.experiment.spec import ExperimentSpec

__all__ = ["wait_for_orphans", "work"]

WORKERS_LOCK = ".workers.lock"
"""Held by every worker: a killed run's workers must be gone before the run goes on."""


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
    context = multiprocessing.get_context("spawn")  # fork would copy a process that already runs threads
    waiting = sorted(cells, key=lambda cell: cell.rank)
    doing: dict[Connection, Cell] = {}
    pipes: dict[Connection, BaseProcess] = {}
    process: BaseProcess
    try:
        for _ in range(jobs):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(spec.to_yaml(), out, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes[ours] = process
        _hand_out(waiting, doing, list(pipes))
        while doing:
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
                    del doing[pipe]
                    _hand_out(waiting, doing, list(pipes))
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


def _hand_out(waiting: list[Cell], doing: dict[Connection, Cell], pipes: Sequence[Connection]) -> None:
    """Give the next cells to idle workers, as long as nothing of a lower rank is being done."""
    for pipe in pipes:
        if pipe not in doing and waiting and all(cell.rank == waiting[0].rank for cell in doing.values()):
            doing[pipe] = waiting.pop(0)
            pipe.send(doing[pipe])


def _exit_code(process: BaseProcess) -> int | None:
    process.join(5)
    return process.exitcode


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
                worker = worker or open_worker(ExperimentSpec.from_yaml(spec_text), out)
                worker.do(cell, Wire(pipe))
                pipe.send(("finished", cell))
            except GraftError as error:
                pipe.send(("failed", cell, f"{cell.kind} {cell.name}: {error}", type(error)))
            except Exception:
                pipe.send(("failed", cell, f"{cell.kind} {cell.name}: {traceback.format_exc()}", RuntimeError))
