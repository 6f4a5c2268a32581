"""Methods x orders x seeds in one go: one pool of workers for the cells of all runs, then one comparison.

    compare.yaml      what is compared; grows with later commands      journal.jsonl     what happened, line by line
    runs/<order>-seed<k>/   an ordinary run folder with all methods    tuning/           trials, an ordinary run, and
    comparison.json, comparison.html, comparison.md                    tuning.json       what they chose

A cell that fails stops nothing else: it is written down, shown, and tried again by the next command.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from graftlm.core.cache import cache_folder
from graftlm.core.errors import ConfigError
from graftlm.core.files import append_jsonl, is_complete, locked, milestone, read_json, read_jsonl, write_json
from graftlm.data.types import Stage, Stream
from graftlm.experiment import outcome, workers
from graftlm.experiment.cells import JOINT, Cell, asked, check_stream, open_stream, plan_cells, union, units
from graftlm.experiment.grid import Grid, Order, held, remember
from graftlm.experiment.progress import Progress, Silent
from graftlm.experiment.run import summarise
from graftlm.experiment.spec import ExperimentSpec
from graftlm.experiment.stages import LearnedStage, StageStore, code_digest
from graftlm.experiment.store import RunStore
from graftlm.experiment.tuning import OBJECTIVE, Candidate, Tuning, candidates
from graftlm.experiment.workers import Failure, Job
from graftlm.methods import build
from graftlm.report import grid as grid_page
from graftlm.report import page

__all__ = ["CellPlan", "compare", "preview"]


@dataclass(frozen=True)
class CellPlan:
    """One cell of a comparison before it runs.

    Attributes:
        units: work in training samples.
        finished: nothing is left to do.
        stages, cached: stages to learn, and how many of them lie in the cache already.
    """

    run: str
    kind: str
    name: str
    units: float
    finished: bool
    stages: int
    cached: int


def compare(
    grid: Grid, out: Path, *, jobs: int, tuning: Tuning | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Run what is left of a comparison, and write its report.

    Args:
        out: the comparison's folder. More methods, orders or seeds may be added to what is there.
        jobs: worker processes.
        tuning: choose settings first.

    Returns:
        The content of ``comparison.json``: its "failed" lists the cells that could not be finished.

    Raises:
        ConfigError, DataError, MethodConflict: something is wrong with a method, a setting or an order, or settings would be
            chosen on a seed that is compared; nothing was done.
        RunError: another process works in this folder, or it compares something else.
    """
    progress = progress or Silent()
    if tuning is not None and tuning.seed in grid.seeds:
        raise ConfigError(
            f"--tune-seed: {tuning.seed} is one of the seeds that are compared, {list(grid.seeds)}; another one is expected, or "
            f"settings would be chosen on what they are measured on."
        )
    streams = _check(grid)
    busy = f"{out}: another process is working on this comparison. Wait for it, or choose another --out."
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".lock", busy=busy):
        workers.wait_for_orphans(out)
        failed: list[dict[str, Any]] = []
        if tuning is not None:
            remember(replace(grid, methods={}), out)  # refuse a folder of something else before the trials
            grid, unable = _tune(grid, out, tuning, jobs, progress)
            failed += unable
        whole = remember(grid, out)
        pool = _Pool(out, out / "runs", progress, jobs)
        failed += pool.work({grid.name(*run): grid.run(*run) for run in grid.runs()}, streams, grid)
        failed += _still_failed(out, whole, pool.asked)
        streams = {order.label: streams.get(order.label) or _stream(whole, order) for order in whole.orders}
        comparison = _collect(whole, out, streams, failed)
        write_json(out / "comparison.json", comparison)
        grid_page.write(out)
        _journal(out, "comparison", failed=len(failed))
    return comparison


def _check(grid: Grid) -> dict[str, Stream]:
    """All that can be known to be wrong before any work; the stream of every order, of the first seed."""
    streams = {}
    for order in grid.orders:
        spec = grid.run(order, grid.seeds[0])
        spec.check()
        streams[order.label] = open_stream(spec)
        check_stream(spec, streams[order.label])
    return streams


def _stream(grid: Grid, order: Order) -> Stream:
    return open_stream(grid.run(order, grid.seeds[0]))


def _journal(out: Path, event: str, **fields: Any) -> None:
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    append_jsonl(out / "journal.jsonl", {"time": time, "event": event, **fields})
    milestone(f"compare.{event}")


class _Pool:
    """Works through the cells of runs below a folder.

    Attributes:
        asked: run and cell of all that was tried here; what failed earlier and is not among these has still failed.
    """

    def __init__(self, out: Path, folder: Path, progress: Progress, jobs: int) -> None:
        self.asked: set[tuple[str, str, str]] = set()
        self._out = out
        self._folder = folder
        self._progress = progress
        self._processes = jobs

    def work(
        self, specs: Mapping[str, ExperimentSpec], streams: Mapping[str, Stream], grid: Grid
    ) -> list[dict[str, Any]]:
        """Finish every cell of these runs, and their reports; what failed is returned."""
        labels = {grid.name(order, seed): order.label for order, seed in grid.runs()}
        return self.work_runs({name: (spec, streams[labels[name]]) for name, spec in specs.items()})

    def work_runs(self, runs: Mapping[str, tuple[ExperimentSpec, Stream]]) -> list[dict[str, Any]]:
        """As `work`; streams may be of another seed: only their stages and sizes are looked at."""
        failed: list[dict[str, Any]] = []
        grown: dict[Path, ExperimentSpec] = {}
        jobs: list[Job] = []
        total, seen = 0.0, dict[tuple[int, str], tuple[Path, Cell]]()
        for name, (spec, stream) in runs.items():
            folder = self._folder / name
            store = RunStore.grow(folder, spec)
            cells = plan_cells(spec, stream)
            self.asked |= {(self._name(folder), cell.kind, cell.name) for cell in cells}
            if all(_finished(store, spec, stream, cell) for cell in cells) and store.report.is_file():
                continue
            grown[folder] = store.spec
            total += sum(units(spec, stream, cell) for cell in cells)
            jobs += _jobs(folder, spec, stream, cells, seen)
        if not jobs:
            return failed

        def over(job: Job, failure: Failure | None) -> None:
            cell = job.cell
            fields = {"run": self._name(job.run), "kind": cell.kind, "name": cell.name}
            if failure is None:
                _journal(self._out, "finished", **fields, code=code_digest()[:12])
                return
            _journal(self._out, "failed", **fields, message=failure.message, detail=failure.detail)
            failed.append({**fields, "message": failure.message})

        self._progress.start(total)
        try:
            workers.work_through(grown, jobs, self._processes, self._progress, home=self._out, over=over)
        finally:
            self._progress.done()
        for folder in grown:
            _sum_up(folder)
        return failed

    def _name(self, folder: Path) -> str:
        return folder.relative_to(self._out / "runs" if self._folder.name == "runs" else self._out).as_posix()


def _jobs(
    folder: Path,
    spec: ExperimentSpec,
    stream: Stream,
    cells: Sequence[Cell],
    seen: dict[tuple[int, str], tuple[Path, Cell]],
) -> list[Job]:
    """Cells of a run as jobs, so that none waits inside a worker for what another is learning.

    Experts of one seed are learned alike in every order, and so is the start; a method begins with the first expert.

    Args:
        seen: (seed, what) -> the job that learns it first; this run's are added.
    """
    jobs = []
    start = (spec.seed, f"start of {stream.name}")
    first = (folder, Cell("expert", stream.stages[0].name))
    for cell in cells:
        after = set()
        if stream.start is not None and start in seen:
            after.add(seen[start])
        if cell.kind == "expert":
            what = (spec.seed, f"expert {stream.name} {cell.name}")
            if what in seen:
                after.add(seen[what])
            seen.setdefault(what, (folder, cell))
        if cell.kind == "method":
            after.add(first)
        seen.setdefault(start, (folder, cell))
        jobs.append(Job(folder, cell, frozenset(after - {(folder, cell)})))
    return jobs


def _finished(store: RunStore, spec: ExperimentSpec, stream: Stream, cell: Cell) -> bool:
    """Whether nothing is left of a cell."""
    if cell.kind == "base":
        return not asked(spec, stream, 0) or (store.base() / "scores.json").is_file()
    if cell.kind == "expert":
        return all((each / "scores.json").is_file() for each in (store.expert(cell.name), store.blind(cell.name)))
    folders = [store.stage(cell.name, index, stage.name) for index, stage in enumerate(stream.stages)]
    if _is_joint(spec, cell.name):
        folders = [store.stage(cell.name, len(stream.stages) - 1, JOINT)]
    files = ("scores.json", "shift.json") if stream.inquiries else ("scores.json",)
    return all((folder / file).is_file() for folder in folders for file in files)


def _is_joint(spec: ExperimentSpec, name: str) -> bool:
    return any(method.joint for method in build(spec.mixes()[name], f"methods.{name}"))


def _sum_up(folder: Path) -> None:
    """The report of a run, and its summary when all of its methods are finished."""
    store = RunStore(folder)
    stream = open_stream(store.spec)
    if all(_finished(store, store.spec, stream, cell) for cell in plan_cells(store.spec, stream)):
        write_json(store.summary_path, summarise(store.spec, store, stream))
        store.journal("summary")
    if any((folder / each).is_dir() for each in ("experts", "methods")):
        page.write(folder)
        store.journal("report")


def _still_failed(out: Path, grid: Grid, tried: set[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """What failed in earlier commands that asked for more than this one."""
    path = out / "comparison.json"
    before = read_json(path)["failed"] if path.is_file() else []
    runs = {grid.name(*run) for run in grid.runs()}
    return [
        each
        for each in before
        if (each["run"], each["kind"], each["name"]) not in tried
        and each["run"] in runs
        and (each["kind"] != "method" or each["name"] in grid.methods)
    ]


def _collect(
    grid: Grid, out: Path, streams: Mapping[str, Stream], failed: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:

    def without(run: str) -> set[tuple[str, str]]:
        return {(each["kind"], each["name"]) for each in failed if each["run"] == run}

    runs = [
        outcome.read_outcome(folder, order, seed, streams[order.label], grid.methods, without(grid.name(order, seed)))
        for order, seed in grid.runs()
        if (folder := out / "runs" / grid.name(order, seed)).is_dir()
    ]
    path = out / "tuning" / "tuning.json"
    measured = [task for stream in streams.values() for each in stream.stages for task in each.tasks] + [
        probe for stream in streams.values() for probe in stream.probes
    ]
    chosen = read_json(path) if path.is_file() else None
    made = outcome.collect(grid, runs, failed, chosen, {task.name: task.metric for task in measured})
    return made | {"code": _code(out, {grid.name(*run) for run in grid.runs()})}


def _code(out: Path, names: set[str]) -> list[str]:
    """The versions of the code by which the cells were learned or last verified; more than one is worth a warning."""
    last = {
        (line["run"], line["kind"], line["name"]): line["code"]
        for line in read_jsonl(out / "journal.jsonl")
        if line["event"] == "finished" and line["run"] in names
    }
    return sorted(set(last.values()))


def _tune(grid: Grid, out: Path, tuning: Tuning, jobs: int, progress: Progress) -> tuple[Grid, list[dict[str, Any]]]:
    """The grid with the settings that were best on validation data; trials of a method that all failed are failures.

    Trials are the methods of one ordinary run, so that they share experts and first stages.
    """
    order, rate = grid.orders[0], grid.spec.schedule().realign.lr.get("connectors")
    path = out / "tuning" / "tuning.json"
    told: dict[str, Any] = read_json(path)["methods"] if path.is_file() else {}
    # what runs were made with stays, whatever a trial that failed then would say now
    settled = {name: entries for name, entries in held(out).items() if name in told and name in grid.methods}
    waiting = {name: entries for name, entries in grid.methods.items() if name not in settled}
    if not waiting:
        return replace(grid, methods=settled), []
    trials = {name: candidates(name, entries, tuning, rate) for name, entries in waiting.items()}
    mixes = {each.name: each.entries for options in trials.values() for each in options}
    evaluate = grid.spec.evaluate.model_copy(update={"split": "val"})
    spec = replace(grid, methods=mixes, spec=grid.spec.model_copy(update={"evaluate": evaluate})).run(
        order, tuning.seed
    )
    spec.check()
    stream = open_stream(spec)
    check_stream(spec, stream)
    name = grid.name(order, tuning.seed)
    failed = _Pool(out, out / "tuning", progress, jobs).work_runs({name: (spec, stream)})
    run = outcome.read_outcome(out / "tuning" / name, order, tuning.seed, stream, mixes)
    messages = {each["name"]: each["message"] for each in failed if each["kind"] == "method"}
    chosen = {}
    for method, options in trials.items():
        scored = [_trial(option, run.methods[option.name], messages.get(option.name)) for option in options]
        best = max(range(len(scored)), key=lambda i: -math.inf if scored[i]["score"] is None else scored[i]["score"])
        told[method] = {
            "given": list(waiting[method]),
            "chosen": best,
            "trials": scored,
            "budget": tuning.budget,
            "seed": tuning.seed,
            "order": order.label,
        }
        chosen[method] = options[best].entries
    write_json(
        path,
        {
            "objective": OBJECTIVE,
            "budget": tuning.budget,
            "seed": tuning.seed,
            "order": order.label,
            "split": "val",
            "methods": told,
        },
    )
    _journal(out, "tuned", methods=list(chosen))
    hopeless = {each.name for options in trials.values() for each in options} - {
        each.name for options in trials.values() for each in options if any(o.name not in messages for o in options)
    }
    unable = [each for each in failed if each["kind"] != "method" or each["name"] in hopeless]
    return replace(grid, methods={name: {**settled, **chosen}[name] for name in grid.methods}), unable


def _trial(option: Candidate, made: outcome.MethodInRun, message: str | None) -> dict[str, Any]:
    backward = forward = score = None
    if made.finished and made.matrix:
        row = made.matrix[-1]  # of a method that learns all at once too
        backward, forward = statistics.fmean(row[:-1] or row), row[-1]
        score = (backward + forward) / 2
        if math.isnan(score):
            backward = forward = score = None
    return {
        "name": option.name,
        "settings": dict(option.settings),
        "entries": list(option.entries),
        "score": score,
        "backward": backward,
        "forward": forward,
        "failed": message,
    }


def preview(grid: Grid, out: Path, tell: Callable[[str], None] = lambda text: None) -> list[CellPlan]:
    """What `compare` would do, without doing it. Data are written or found on disk, since samples are counted.

    Args:
        tell: hears which run is looked at.

    Raises:
        ConfigError, DataError, MethodConflict: as `compare`.
    """
    _check(grid)
    plans = []
    for order, seed in grid.runs():
        name, spec = grid.name(order, seed), grid.run(order, seed)
        tell(name)
        stream = open_stream(spec)
        folder = out / "runs" / name
        store = RunStore(folder) if (folder / "experiment.yaml").is_file() else None
        stages = StageStore(
            cache_folder(), spec.model_spec(), spec.schedule(), seed, spec.device_name(), stream.inquiries
        )
        for cell in plan_cells(spec, stream):
            done = store is not None and _finished(store, spec, stream, cell)
            known, cached = _cached(stages, spec, stream, cell)
            plans.append(CellPlan(name, cell.kind, cell.name, units(spec, stream, cell), done, known, cached))
    return plans


def _cached(stages: StageStore, spec: ExperimentSpec, stream: Stream, cell: Cell) -> tuple[int, int]:
    """How many stages a cell learns, and how many of them, from the first on, were learned before.

    With a start, whose schedule is its own, stages are not looked up.
    """
    if cell.kind == "base":
        return 0, 0
    walk: Sequence[Stage] = stream.stages
    methods = [] if cell.kind == "expert" else build(spec.mixes()[cell.name], f"methods.{cell.name}")
    if cell.kind == "expert":
        walk = [stage for stage in stream.stages if stage.name == cell.name]
    elif any(method.joint for method in methods):
        walk = [union(stream)]
    if stream.start is not None:
        return len(walk), 0
    parent: LearnedStage | None = None
    for index, stage in enumerate(walk):
        folder = stages.root / stages.key(stage, walk[:index], methods, parent)
        if not is_complete(folder):
            return len(walk), index
        parent = LearnedStage(folder)
    return len(walk), len(walk)
