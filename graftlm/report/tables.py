"""Runs as rows of text: pure data in, cells out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

from graftlm.report.reading import MethodResult, Run, Scores, gains

__all__ = [
    "DASH",
    "Cell",
    "CostRow",
    "Matrix",
    "ResultRow",
    "blind_gains",
    "cost_rows",
    "duration",
    "matrix",
    "mean_std",
    "memory",
    "number",
    "ranked",
    "result_rows",
    "spread",
]

DASH = "–"


@dataclass(frozen=True)
class Cell:
    """One cell: ``title`` shows on hover, ``best`` marks the best of its column.

    ``shade`` is how far a heat-map cell is from its expert: -1 (nothing left) to 0 (equal) to 1 (half as much
    again); None leaves the cell plain.
    """

    text: str
    below: str = ""
    title: str = ""
    best: bool = False
    shade: float | None = None


@dataclass(frozen=True)
class ResultRow:
    """One row of the result table. kind: "method", "frozen" (the LLM never moves), "floor" (not a method)."""

    name: str
    kind: str
    note: str
    backward: tuple[Cell, ...]
    mean: Cell
    std: Cell
    forward: tuple[Cell, ...]
    probes: tuple[Cell, ...]


@dataclass(frozen=True)
class Matrix:
    """Stage x task of one method: ``rows`` are (label, kind, cells), with the experts' scores first."""

    method: str
    rows: tuple[tuple[str, str, tuple[Cell, ...]], ...]


@dataclass(frozen=True)
class CostRow:
    """What one phase of one method cost over all stages; ``phase`` "total" sums a method up.

    share: of the dearest method's time, 0 to 1.
    """

    method: str
    phase: str
    seconds: Cell
    tokens: Cell
    speed: Cell
    memory: Cell
    share: float


def number(value: Any, digits: int = 2) -> str:
    """A number with a fixed count of decimals; a dash for what is not there."""
    return f"{value:.{digits}f}" if isinstance(value, int | float) and isfinite(value) else DASH


def spread(value: Any, digits: int = 2) -> str:
    """A standard deviation as it follows a mean; empty where there is none."""
    text = number(value, digits)
    return "" if text == DASH else f"± {text}"


def duration(seconds: Any) -> str:
    """Seconds as people say them."""
    if not isinstance(seconds, int | float) or not isfinite(seconds):
        return DASH
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def memory(amount: Any) -> str:
    """Bytes as MB or GB (powers of ten)."""
    if not isinstance(amount, int | float) or not amount:
        return DASH
    return f"{amount / 1e9:.2f} GB" if amount >= 1e9 else f"{amount / 1e6:.0f} MB"


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; none of a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def blind_gains(run: Run) -> tuple[float, ...]:
    """Backward gain per stage of a model that is asked without its media; empty if it was not measured."""
    stages = [stage for stage in run.order if run.blind.get(stage)]
    if stages != list(run.order):
        return ()
    scores = [{stage: run.blind[stage] for stage in stages[: i + 1]} for i in range(len(stages))]
    return gains(scores, run.experts)[0]


def ranked(run: Run) -> list[MethodResult]:
    """The methods with a mean backward gain, best first."""
    return sorted((m for m in run.methods if m.mean is not None and isfinite(m.mean)), key=lambda m: -(m.mean or 0.0))


def result_rows(run: Run) -> list[ResultRow]:
    """Per method: backward gain per stage, mean and sample standard deviation, forward gain per stage, probes."""
    methods = run.methods
    best_mean = max((m.mean for m in methods if m.mean is not None and not m.missing), default=None)
    final = {m.name: m.probes[-1] if m.probes else {} for m in methods}
    finished = [final[m.name] for m in methods if not m.missing]
    best = {p: max((scores[p] for scores in finished if p in scores), default=None) for p in run.probes}
    rows = []
    for m in methods:
        frozen = [ingredient.split()[0] for ingredient in m.ingredients if ingredient] == ["eproj"]
        note = f"unfinished: {', '.join(m.missing)} to come" if m.missing else "frozen LLM" if frozen else ""
        note = "all stages at once; the mean is over stages, in the end" if m.joint else note
        mean = sum(m.joint.values()) / len(m.joint) if m.joint else m.mean
        rows.append(
            ResultRow(
                name=m.name,
                kind="frozen" if frozen else "method",
                note=note or (" + ".join(m.ingredients) if m.ingredients != (m.name,) else ""),
                backward=_per_stage(m.backward, len(run.order)),
                mean=Cell(number(mean), best=m.mean is not None and m.mean == best_mean),
                std=Cell(spread(m.std)),
                forward=_per_stage(m.forward, len(run.order)),
                probes=tuple(_probe(final[m.name].get(p), best[p]) for p in run.probes),
            )
        )
    if blind := blind_gains(run):
        mean, std = mean_std(blind)
        rows.append(
            ResultRow(
                name="blind",
                kind="floor",
                note="experts shown the media of other samples",
                backward=_per_stage(blind, len(run.order)),
                mean=Cell(number(mean)),
                std=Cell(spread(std)),
                forward=_per_stage((), len(run.order)),
                probes=tuple(_probe(None, None) for _ in run.probes),
            )
        )
    if run.base:
        nothing = _per_stage((), len(run.order))
        probes = tuple(_probe(run.base.get(p), None) for p in run.probes)
        rows.append(
            ResultRow("base", "floor", "the LLM before any stage", nothing, Cell(DASH), Cell(""), nothing, probes)
        )
    return rows


def _probe(value: float | None, best: float | None) -> Cell:
    return Cell(number(value, 3), best=value is not None and value == best)


def _per_stage(values: Sequence[float], count: int) -> tuple[Cell, ...]:
    return tuple(Cell(number(values[i], 1) if i < len(values) else DASH) for i in range(count))


def matrix(run: Run, method: MethodResult) -> Matrix:
    """Stage x task: relative gain, percent of the expert, with the raw score below; dashes before a task is learned.

    Probes have no expert: their columns hold raw scores only. The last row is the floor: blind experts, and the base
    LLM on the probes.
    """
    columns = [(stage, task) for stage, tasks in run.tasks.items() for task in tasks]
    top = [Cell(_raw(run.experts.get(stage, {}).get(task))) for stage, task in columns]
    rows = [("expert", "plain", (*top, *(Cell("") for _ in run.probes)))]
    for i, stage in enumerate(run.order):
        scores = method.scores[i] if i < len(method.scores) else {}
        details = method.details[i] if i < len(method.details) else {}
        probes = method.probes[i] if i < len(method.probes) else {}
        cells = [
            _gain_cell(run, scores, s, task, f"{task} after {stage}", details.get(task, {})) for s, task in columns
        ]
        rows.append((f"{i + 1} {stage}", "stage", (*cells, *(Cell(_raw(probes.get(p))) for p in run.probes))))
    if run.blind or run.base:
        cells = [_gain_cell(run, run.blind, s, task, f"{task}, blind", {}) for s, task in columns]
        floor = (*cells, *(Cell(_raw(run.base.get(p)), title="the LLM before any stage") for p in run.probes))
        rows.append(("floor", "plain", floor))
    return Matrix(method.name, tuple(rows))


def _raw(value: float | None) -> str:
    return number(value, 2 if value is not None and abs(value) >= 2 else 3)


def _gain_cell(run: Run, scores: Scores, stage: str, task: str, what: str, detail: Mapping[str, Any]) -> Cell:
    value, expert = scores.get(stage, {}).get(task), run.experts.get(stage, {}).get(task)
    if value is None:
        return Cell(DASH, title=f"{what}: not learned or not measured yet")
    error = f" ± {detail['stderr']:.3g}" if isinstance(detail.get("stderr"), int | float) else ""
    about = ", ".join(f"{key} {detail[key]}" for key in ("metric", "n") if key in detail)
    title = f"{what}: {_raw(value)}{error}{f' ({about})' if about else ''}; expert {_raw(expert)}"
    if not expert:
        return Cell(DASH, _raw(value), title)
    ratio = value / expert
    return Cell(number(100 * ratio, 1), _raw(value), title, shade=ratio - 1 if ratio < 1 else min(1.0, 2 * (ratio - 1)))


def cost_rows(run: Run) -> list[CostRow]:
    """Per method and phase, over its stages: time, tokens, tokens per second, peak memory; then the total."""
    totals = {m.name: sum(entry.get("seconds") or 0.0 for entry in m.cost) for m in run.methods if m.cost}
    dearest = max(totals.values(), default=0.0) or 1.0
    rows = []
    for m in run.methods:
        phases = dict.fromkeys(str(entry.get("phase", "")) for entry in m.cost)
        rows += [_cost(m.name, p, [e for e in m.cost if str(e.get("phase", "")) == p], dearest) for p in phases]
        if m.cost:
            rows.append(_cost(m.name, "total", m.cost, dearest))
    return rows


def _cost(method: str, phase: str, entries: Sequence[Mapping[str, Any]], dearest: float) -> CostRow:
    seconds = sum(entry.get("seconds") or 0.0 for entry in entries)
    tokens = sum(entry.get("tokens") or 0 for entry in entries)
    peak = max((entry.get("peak_memory_bytes") or 0 for entry in entries), default=0)
    stages = "\n".join(f"{e.get('stage')} {e.get('phase')}: {duration(e.get('seconds'))}" for e in entries)
    return CostRow(
        method=method,
        phase=phase,
        seconds=Cell(duration(seconds), title=stages),
        tokens=Cell(f"{tokens:,}".replace(",", "\u202f") if tokens else DASH),
        speed=Cell(f"{tokens / seconds:,.0f}".replace(",", "\u202f") if tokens and seconds else DASH),
        memory=Cell(memory(peak)),
        share=seconds / dearest,
    )
