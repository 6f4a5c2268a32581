"""Walk a stream: experts, then every method, stage by stage; measure, write down, resume.

A run is a set of `cells`, finished side by side by `workers`; what two of them would learn alike is learned once, see
`stages`. Re-running the same command continues: finished stages are kept, a stage that was cut short is learned again from
its parent, and predictions continue after the last finished batch.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftlm.core.files import read_json, write_json
from graftlm.data.types import Stream, Task
from graftlm.evaluation import gains
from graftlm.experiment import composing, workers
from graftlm.experiment.cells import JOINT, answerable, asked, check_stream, open_stream
from graftlm.experiment.kinds import open_worker, plan_cells, units
from graftlm.experiment.progress import Progress, Silent
from graftlm.experiment.spec import ExperimentSpec
from graftlm.experiment.stages import LearnedStage
from graftlm.experiment.store import RunStore
from graftlm.report import page

__all__ = ["run", "summarise"]


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
        workers.wait_for_orphans(out)
        stream = open_stream(spec)
        check_stream(spec, stream)
        cells = plan_cells(spec, stream)
        progress.start(sum(units(spec, stream, cell) for cell in cells))
        jobs = min(spec.job_count(), len(cells))
        try:
            if jobs == 1:
                worker = open_worker(spec, out)
                for cell in cells:
                    worker.do(cell, progress)
            else:
                workers.work(spec, out, cells, jobs, progress)
        finally:
            progress.done()
        summary = summarise(spec, store, stream)
        write_json(out / "summary.json", summary)
        store.journal("summary")
        page.write(out)
        store.journal("report")
    return summary


def summarise(spec: ExperimentSpec, store: RunStore, stream: Stream) -> dict[str, Any]:
    """Everything a reader asks first, from the scores of a finished run.

    Returns:
        experts, blind and base scores, and per method the backward and forward relative gains (percent per stage),
        raw scores per stage, probes and costs.
    """
    experts = {stage.name: _values(store.expert(stage.name), stage.tasks) for stage in stream.stages}
    composed = {} if spec.composers is None else composing.summarise(spec, store, stream, experts)
    methods: dict[str, Any] = {}
    for name, entries in spec.mixes().items():
        last = store.stage(name, len(stream.stages) - 1, JOINT)
        if last.is_dir():
            methods[name] = _joint(spec, stream, experts, entries, last)
            continue
        scores, probes, cost = [], [], []
        for index, stage in enumerate(stream.stages):
            folder = store.stage(name, index, stage.name)
            seen = stream.stages[: index + 1]
            scores.append({each.name: _values(folder, each.tasks) for each in seen})
            known = answerable(spec, stream, [m for each in seen for m in each.modalities])
            probes.append(_values(folder, known))
            cost += [{"stage": stage.name} | log for log in LearnedStage(folder).fit]
        backward, forward = gains.backward_gains(scores, experts), gains.forward_gains(scores, experts)
        mean, std = gains.summary(backward)
        methods[name] = {
            "ingredients": entries,
            "backward": [_known(gain) for gain in backward],
            "forward": [_known(gain) for gain in forward],
            "backward_mean": _known(mean),
            "backward_std": _known(std),
            "scores": scores,
            "probes": probes,
            "cost": [_with_speed(log) for log in cost],
        }
    return {
        "name": spec.name,
        "order": [stage.name for stage in stream.stages],
        "seed": spec.seed,
        "split": spec.evaluate.split,
        "experts": experts,
        "blind": {stage.name: _values(store.blind(stage.name), stage.tasks) for stage in stream.stages},
        "base": _values(store.base(), asked(spec, stream, 0)),
        "methods": methods,
        **composed,
    }


def _joint(
    spec: ExperimentSpec, stream: Stream, experts: Mapping[str, Any], entries: Sequence[Any], folder: Path
) -> dict[str, Any]:
    """A method that learned all stages at once: it has no stages to tell apart, only what it makes of each in the end."""
    scores = {stage.name: _values(folder, stage.tasks) for stage in stream.stages}
    probes = answerable(spec, stream, [m for stage in stream.stages for m in stage.modalities])
    return {
        "ingredients": entries,
        "backward": [],
        "forward": [],
        "backward_mean": None,
        "backward_std": None,
        "scores": [],
        "probes": [],
        "cost": [_with_speed({"stage": JOINT} | log) for log in LearnedStage(folder).fit],
        "joint": {
            "scores": scores,
            "relative": {name: _known(gains.relative_gain(scores[name], experts[name])) for name in scores},
            "probes": _values(folder, probes),
        },
    }


def _with_speed(log: Mapping[str, Any]) -> dict[str, Any]:
    return {**log, "tokens_per_second": log["tokens"] / max(log["seconds"], 1e-9)}


def _known(gain: float) -> float | None:
    """A gain over an expert that scores 0 on everything is no number, and JSON has no nan."""
    return None if math.isnan(gain) else gain


def _values(folder: Path, tasks: Sequence[Task]) -> dict[str, float]:
    if not tasks:  # nothing was asked, so nothing was written
        return {}
    scores = read_json(folder / "scores.json")
    return {task.name: scores[task.name]["value"] for task in tasks}
