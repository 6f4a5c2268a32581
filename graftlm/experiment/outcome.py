"""What a comparison found: the cells of all runs as one table of means, spreads, differences, ranks and costs.

Every score is taken as percent of the expert's, stage by stage, before anything is averaged: R[t][j] is the relative gain of
stage j's tasks after stage t. What the columns mean is in `METRICS`.
"""

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftlm.core.files import read_json
from graftlm.data.types import Stream
from graftlm.evaluation import gains
from graftlm.evaluation.bootstrap import Pair, paired_over_runs
from graftlm.experiment.cells import JOINT
from graftlm.experiment.grid import Grid, Order

__all__ = ["METRICS", "MethodInRun", "RunOutcome", "collect", "read_outcome"]

METRICS: Mapping[str, tuple[str, str, bool]] = {
    "acc": ("ACC", "mean of all stages after the last one", True),
    "backward": ("backward", "backward gain: what is left of the earlier stages, mean over stages", True),
    "forward": ("forward", "forward gain: what is made of the stage just learned, mean over stages", True),
    "incremental": ("incremental", "mean over stages of the mean of all stages so far", True),
    "bwt": ("BWT", "mean change of a stage between its own learning and the end; negative is forgetting", True),
    "fwt": ("FWT", "mean of a stage just before it is learned, above the start model", True),
    "fm": ("FM", "mean fall of a stage from its best before the end; small is good", False),
    "ability": ("ability", "general ability: probes after the last stage, percent of the start model's score", True),
}
"""Key -> title, meaning, and whether large is good. All in percent, or percent points, of the experts."""


@dataclass
class MethodInRun:
    """A method in one run; lists are per stage, as far as it came.

    Attributes:
        scores: stage of the tasks -> task -> score.
        matrix: R, nan where nothing was measured.
        ability: percent of the start model's probes.
        last: the folder of the last measured stage.
    """

    finished: bool
    joint: bool
    scores: list[dict[str, dict[str, float]]] = field(default_factory=list)
    matrix: list[list[float]] = field(default_factory=list)
    probes: list[dict[str, float]] = field(default_factory=list)
    ability: list[float] = field(default_factory=list)
    shift: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    forward: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    last: Path | None = None


@dataclass
class RunOutcome:
    """One run: an order and a seed."""

    order: Order
    seed: int
    stages: list[str]
    experts: dict[str, dict[str, float]]
    blind: dict[str, dict[str, float]]
    start: dict[str, float]
    methods: dict[str, MethodInRun]


def read_outcome(
    folder: Path,
    order: Order,
    seed: int,
    stream: Stream,
    names: Iterable[str],
    without: Collection[tuple[str, str]] = (),
) -> RunOutcome:
    """A run folder, finished or not.

    Args:
        without: (kind, name) of cells that failed: what they left, of an older version of the code for example, is not used.
    """
    tasks = {stage.name: [task.name for task in stage.tasks] for stage in stream.stages}
    experts = _of_stages(folder / "experts", {s: t for s, t in tasks.items() if ("expert", s) not in without})
    run = RunOutcome(
        order, seed, list(tasks), experts, _of_stages(folder / "blind", tasks), _values(folder / "base"), {}
    )
    probes = [probe.name for probe in stream.probes]
    for name in names:
        failed = ("method", name) in without
        run.methods[name] = (
            MethodInRun(finished=False, joint=False)
            if failed
            else _method(folder / "methods" / name, run, tasks, probes)
        )
    return run


def _method(folder: Path, run: RunOutcome, tasks: Mapping[str, Sequence[str]], probes: Sequence[str]) -> MethodInRun:
    union = folder / f"{len(run.stages)}-{JOINT}"
    joint = union.is_dir()
    folders = [union] if joint else [folder / f"{i}-{stage}" for i, stage in enumerate(run.stages, 1)]
    made = MethodInRun(finished=all((each / "scores.json").is_file() for each in folders), joint=joint)
    logs: list[Mapping[str, Any]] = []
    for each in folders:
        if not (each / "scores.json").is_file():
            break
        values = _values(each)
        made.scores.append(
            {
                stage: {task: values[task] for task in names if task in values}
                for stage, names in tasks.items()
                if any(task in values for task in names)
            }
        )
        made.probes.append({probe: values[probe] for probe in probes if probe in values})
        made.ability.append(_ability(made.probes[-1], run.start))
        if (each / "shift.json").is_file():
            made.shift.append(float(read_json(each / "shift.json")["l2"]))
        logs += read_json(each / "fit.json") if (each / "fit.json").is_file() else []
        made.last = each
    if run.experts.keys() == set(run.stages):
        made.matrix = gains.relative_matrix(made.scores, run.experts)
        if not joint and made.scores:
            seen = [{stage: after[stage] for stage in run.stages[: i + 1]} for i, after in enumerate(made.scores)]
            made.backward = gains.backward_gains(seen, run.experts)
            made.forward = gains.forward_gains(seen, run.experts)
    if made.finished and made.last is not None:
        made.metrics = _metrics(made, run)
        made.cost = _cost(logs, made.last)
    return made


def _metrics(made: MethodInRun, run: RunOutcome) -> dict[str, float]:
    found = {"ability": made.ability[-1]}
    if not made.matrix:
        return found
    found["acc"] = statistics.fmean(made.matrix[-1])
    if made.joint:
        return found
    found["backward"] = statistics.fmean(made.backward)
    found["forward"] = statistics.fmean(made.forward)
    found["incremental"] = gains.incremental_accuracy(made.matrix)
    if len(run.stages) > 1:
        found["bwt"] = gains.backward_transfer(made.matrix)
        found["fm"] = gains.forgetting(made.matrix, after_learning=not _whole(made.matrix))
        initial = gains.relative_matrix([_split(run.start, run.experts)], run.experts)[0]
        if _whole([initial[1:]]) and _whole([row[i + 1 : i + 2] for i, row in enumerate(made.matrix[:-1])]):
            found["fwt"] = gains.forward_transfer(made.matrix, initial)
    return found


def _whole(matrix: Sequence[Sequence[float]]) -> bool:
    return not any(math.isnan(value) for row in matrix for value in row)


def _split(values: Mapping[str, float], experts: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Scores by stage, of the tasks that were measured."""
    return {stage: {task: values[task] for task in tasks if task in values} for stage, tasks in experts.items()}


def _ability(probes: Mapping[str, float], start: Mapping[str, float]) -> float:
    ratios = [100 * value / start[probe] for probe, value in probes.items() if start.get(probe)]
    return statistics.fmean(ratios) if ratios else math.nan


def _cost(logs: Sequence[Mapping[str, Any]], last: Path) -> dict[str, float]:
    files = [path for path in (last / "checkpoint").rglob("*") if path.is_file()]
    return {
        "seconds": sum(float(log["seconds"]) for log in logs),
        "cpu_seconds": sum(float(log["cpu_seconds"]) for log in logs),
        "tokens": sum(float(log["tokens"]) for log in logs),
        "peak_memory_bytes": max((float(log["peak_memory_bytes"]) for log in logs), default=math.nan),
        "parameters": max((float(log["parameters"]) for log in logs), default=math.nan),
        "checkpoint_bytes": float(sum(path.stat().st_size for path in files)) if files else math.nan,
    }


def _of_stages(folder: Path, tasks: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
    found = {}
    for stage, names in tasks.items():
        values = _values(folder / stage)
        if all(name in values for name in names):
            found[stage] = {name: values[name] for name in names}
    return found


def _values(folder: Path) -> dict[str, float]:
    path = folder / "scores.json"
    return {task: score["value"] for task, score in read_json(path).items()} if path.is_file() else {}


def collect(
    grid: Grid,
    runs: Sequence[RunOutcome],
    failed: Sequence[Mapping[str, Any]],
    tuning: Mapping[str, Any] | None = None,
    units: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The content of ``comparison.json``.

    Args:
        failed: what did not finish, and why.
        units: task -> metric, to be shown beside raw scores.
    """
    groups = {order.label: [run for run in runs if run.order.label == order.label] for order in grid.orders}
    every = {**groups, **({"all": list(runs)} if len(grid.orders) > 1 else {})}
    whole = any(
        _whole(m.matrix) for run in runs for m in run.methods.values() if m.finished and m.matrix and not m.joint
    )
    plain: dict[str, Any] = _plain(
        {
            "name": grid.spec.name,
            "split": grid.spec.evaluate.split,
            "limit": grid.spec.evaluate.limit,
            "settings": _settings(grid),
            "against": grid.against,
            "methods": {name: list(entries) for name, entries in grid.methods.items()},
            "orders": {
                label: {"stream": group[0].order.stream, "stages": group[0].stages}
                for label, group in groups.items()
                if group
            },
            "seeds": list(grid.seeds),
            "metrics": {
                key: {"title": title, "about": about, "large": large} for key, (title, about, large) in METRICS.items()
            },
            "fm": "best before the last stage, also before its own learning"
            if whole
            else "best since its own learning",
            "table": {label: _table(grid, group) for label, group in every.items()},
            "differences": {label: _differences(grid, group) for label, group in every.items()},
            "ranks": _ranks(grid, runs),
            "cost": _costs(grid, runs),
            "curves": {label: _curves(grid, group) for label, group in groups.items()},
            "raw": {label: _raw(grid, group, units or {}) for label, group in groups.items()},
            "runs": [
                {
                    "name": grid.name(run.order, run.seed),
                    "order": run.order.label,
                    "seed": run.seed,
                    "experts": run.experts,
                    "start": run.start,
                    "methods": {
                        name: {"finished": m.finished, "metrics": m.metrics, "matrix": m.matrix, "cost": m.cost}
                        for name, m in run.methods.items()
                    },
                }
                for run in runs
            ],
            "failed": list(failed),
            "tuning": tuning,
        }
    )
    return plain


def _finished(name: str, runs: Sequence[RunOutcome]) -> list[tuple[RunOutcome, MethodInRun]]:
    return [(run, run.methods[name]) for run in runs if run.methods[name].finished]


def _table(grid: Grid, runs: Sequence[RunOutcome]) -> dict[str, Any]:
    return {
        name: {key: _spread([m.metrics[key] for _, m in _finished(name, runs) if key in m.metrics]) for key in METRICS}
        | {"runs": len(_finished(name, runs)), "of": len(runs)}
        for name in grid.methods
    }


def _spread(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean and sample standard deviation of what is a number."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return None
    return {
        "mean": statistics.fmean(known),
        "std": statistics.stdev(known) if len(known) > 1 else None,
        "n": len(known),
        "low": min(known),
        "high": max(known),
    }


def _differences(grid: Grid, runs: Sequence[RunOutcome]) -> dict[str, Any]:
    """Of ACC, to the reference method, in runs that both finished."""
    found = {}
    for name in grid.methods:
        pairs: dict[int, list[Pair]] = {}
        for run in runs:
            this, other = run.methods[name], run.methods[grid.against]
            weights = _weights(run)
            if name != grid.against and weights and this.finished and other.finished and this.last and other.last:
                items = [read_json(each / "items.json") for each in (this.last, other.last)]
                pairs.setdefault(run.seed, []).append(Pair(items[0], items[1], weights))
        if pairs:
            made = paired_over_runs(list(pairs.values()))
            found[name] = {
                "value": made.value,
                "low": made.low,
                "high": made.high,
                "told_apart": made.told_apart,
                "runs": sum(map(len, pairs.values())),
                "seeds": len(pairs),
            }
    return found


def _weights(run: RunOutcome) -> dict[str, float]:
    """Task -> what a unit of its score adds to ACC; tasks on which the expert scores 0 are left out, as in a relative gain.

    Empty where ACC is no number: an expert is missing, or scores 0 on everything.
    """
    counted = [{task: score for task, score in run.experts.get(stage, {}).items() if score} for stage in run.stages]
    if not all(counted):
        return {}
    return {task: 100 / (len(counted) * len(tasks) * score) for tasks in counted for task, score in tasks.items()}


def _ranks(grid: Grid, runs: Sequence[RunOutcome]) -> dict[str, Any]:
    """Mean rank by ACC over the runs that all compared methods finished; a method that never finished is not compared."""
    names = [name for name in grid.methods if _finished(name, runs)]
    places: dict[str, list[float]] = {name: [] for name in names}
    for run in runs:
        values = [run.methods[name].metrics.get("acc", math.nan) for name in names]
        if names and not any(math.isnan(value) for value in values):
            for name, rank in zip(names, gains.ranks(values), strict=True):
                places[name].append(rank)
    return {name: {"mean": statistics.fmean(each), "blocks": len(each)} for name, each in places.items() if each}


def _costs(grid: Grid, runs: Sequence[RunOutcome]) -> dict[str, Any]:
    plain = next(
        (name for name, entries in grid.methods.items() if entries in (["finetune"], [{"finetune": None}])), None
    )
    found = {}
    for name in grid.methods:
        each = [m.cost for _, m in _finished(name, runs)]
        if each:
            found[name] = {key: statistics.fmean([cost[key] for cost in each]) for key in each[0]}
            both = [run for run, _ in _finished(name, runs) if plain and run.methods[plain].finished]
            ratios = [_ratio(run.methods[name].cost, run.methods[plain].cost) for run in both if plain]
            found[name]["relative"] = statistics.fmean(ratios) if ratios else math.nan
    return found


def _ratio(cost: Mapping[str, float], plain: Mapping[str, float]) -> float:
    """Processor time: it varies less with what else the machine does than the time on the clock."""
    return cost["cpu_seconds"] / plain["cpu_seconds"] if plain["cpu_seconds"] else math.nan


def _curves(grid: Grid, runs: Sequence[RunOutcome]) -> dict[str, Any]:
    """Kind -> method -> per stage the mean, lowest and highest run."""
    kinds: dict[str, Callable[[MethodInRun], Sequence[float]]] = {
        "backward": lambda m: m.backward,
        "forward": lambda m: m.forward,
        "ability": lambda m: [] if m.joint else m.ability,
        "shift": lambda m: [] if m.joint else m.shift,
    }
    found: dict[str, Any] = {}
    for kind, pick in kinds.items():
        lines = {}
        for name in grid.methods:
            rows = [values for _, m in _finished(name, runs) if (values := pick(m))]
            at = [_spread([row[i] for row in rows]) for i in range(len(rows[0]))] if rows else []
            if any(each is not None for each in at):
                lines[name] = at
        if lines:
            found[kind] = lines
    return found


def _raw(grid: Grid, runs: Sequence[RunOutcome], units: Mapping[str, str]) -> dict[str, Any]:
    """Scores as they are, per task, after the last stage: floors and ceilings first, then methods."""
    if not runs:
        return {}
    tasks = {stage: list(run.experts[stage]) for run in runs for stage in run.stages if stage in run.experts}
    names = [task for each in tasks.values() for task in each]
    probes = list(
        dict.fromkeys(probe for run in runs for m in run.methods.values() for each in m.probes for probe in each)
    )

    def row(pick: Callable[[RunOutcome], Mapping[str, float] | None]) -> dict[str, Any]:
        values = [found for run in runs if (found := pick(run)) is not None]
        return {
            task: spread
            for task in (*names, *probes)
            if (spread := _spread([each[task] for each in values if task in each])) is not None
        }

    def after(name: str) -> Callable[[RunOutcome], Mapping[str, float] | None]:
        def pick(run: RunOutcome) -> Mapping[str, float] | None:
            m = run.methods[name]
            return {**_flat(m.scores[-1]), **m.probes[-1]} if m.finished and m.scores else None

        return pick

    bounds = {
        "start": row(lambda run: run.start),
        "blind": row(lambda run: _flat(run.blind)),
        "expert": row(lambda run: _flat(run.experts)),
    }
    rows = {name: row(after(name)) for name in grid.methods}
    return {
        "tasks": tasks,
        "probes": probes,
        "units": {task: units[task] for task in (*names, *probes) if task in units},
        "bounds": {name: each for name, each in bounds.items() if each},
        "methods": {name: each for name, each in rows.items() if each},
        "matrix": {name: matrix for name in grid.methods if (matrix := _mean_matrix(name, runs))},
    }


def _mean_matrix(name: str, runs: Sequence[RunOutcome]) -> list[list[float | None]]:
    made = [m.matrix for _, m in _finished(name, runs) if m.matrix]
    if not made:
        return []
    spreads = [
        [_spread([matrix[t][j] for matrix in made]) for j in range(len(made[0][0]))] for t in range(len(made[0]))
    ]
    return [[None if each is None else each["mean"] for each in row] for row in spreads]


def _flat(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {task: value for tasks in scores.values() for task, value in tasks.items()}


def _plain(value: Any) -> Any:
    """As JSON, which has no nan."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _settings(grid: Grid) -> dict[str, str]:
    """What the runs share and a reader has to know."""
    spec = grid.spec
    model, lora = spec.model, spec.model.lora
    size = spec.data.root or f"{spec.data.size} mini world, conflict {spec.data.conflict:g}"
    phases = (
        spec.phases
        if isinstance(spec.phases, str)
        else ", ".join(f"{phase.name} x {phase.epochs}" for phase in spec.schedule().phases)
    )
    return {
        "data": size,
        "model": f"{model.llm}, {f'LoRA rank {lora.rank}' if lora else 'every weight tuned'}, {model.dtype}",
        "phases": phases,
    }
