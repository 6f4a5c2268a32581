"""The two kinds of experiment: methods that walk a stream, and composers of experts."""

from pathlib import Path

from graftlm.data.types import Stream
from graftlm.experiment import cells, composing
from graftlm.experiment.cells import Cell, Worker
from graftlm.experiment.composing import ComposingWorker
from graftlm.experiment.spec import ExperimentSpec

__all__ = ["open_worker", "plan_cells", "units"]


def open_worker(spec: ExperimentSpec, out: Path) -> Worker:
    """One process's tools for the cells of an experiment."""
    return (Worker if spec.composers is None else ComposingWorker)(spec, out)


def plan_cells(spec: ExperimentSpec, stream: Stream) -> list[Cell]:
    """The cells of an experiment, those of lower rank first."""
    return cells.plan_cells(spec, stream) if spec.composers is None else composing.plan_cells(spec, stream)


def units(spec: ExperimentSpec, stream: Stream, cell: Cell) -> float:
    """Work of a cell in training samples."""
    return cells.units(spec, stream, cell) if spec.composers is None else composing.units(spec, stream, cell)
