"""Compositions as tables and figures: what is expanded, kept and forgotten, and what was tried."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from graftlm.evaluation.gains import retention
from graftlm.report import figures
from graftlm.report.figures import Series
from graftlm.report.reading import Run
from graftlm.report.tables import DASH, Cell, mean_std, number, spread

__all__ = ["Row", "Sheet", "compared", "floor", "lead", "ranking", "sections"]

CEILING = "originals"
"""Rule of the row that is no composer: exact weights for every position."""

METHODS = {"composed": "composed again", "tailor": "Model Tailor", "finetune": "fine-tuning"}


@dataclass(frozen=True)
class Row:
    """One row. kind: "method", or "floor" for what is there to compare with."""

    name: str
    cells: tuple[Cell, ...]
    note: str = ""
    kind: str = "method"


@dataclass(frozen=True)
class Sheet:
    """A titled table, or figures, or both.

    Attributes:
        columns: of the table; a column whose name is in ``edges`` begins a group.
        heat: whether cells are shaded.
        charts: (title, what it shows, figure).
    """

    title: str
    about: str
    columns: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    edges: tuple[str, ...] = ()
    heat: bool = False
    charts: tuple[tuple[str, str, Markup], ...] = ()


def sections(run: Run) -> list[tuple[str, str, list[Sheet]]]:
    """(id, name, sheets) of everything that was measured."""
    found = run.composing
    studies = [
        *_sheet(found.get("ablation"), lambda: _ablation(run)),
        *_sheet(_masked(found), lambda: _masks(run)),
        *_sheet(found.get("sweep"), lambda: _sweep(found["sweep"])),
        *_sheet(found.get("counts") or found.get("storage"), lambda: _counts(run)),
    ]
    parts = [
        ("expansion", "Expansion", [_expansion(run)]),
        ("retention", "Retention", [_retention(run)]),
        ("forgetting", "Forgetting", _sheet(found.get("forgetting"), lambda: _forgetting(found["forgetting"]))),
        ("studies", "Studies", studies),
    ]
    return [(key, name, sheets) for key, name, sheets in parts if sheets]


def ranking(run: Run) -> Markup:
    """Mean retention per composer; the bar is the spread over experts."""
    lines = {name: i for i, name in enumerate(run.composing["composers"])}
    rows = []
    for name, row in _sorted(run):
        kept = list(row["retention"].values())
        rows.append((Series(name, lines[name], kept), row["retention_mean"], mean_std(kept)[1] or 0.0))
    said = "; ".join(f"{line.name}: {mean:.1f} %" for line, mean, _ in rows)
    return figures.ranking("Mean retention per composer", said, rows, blind=floor(run))


def floor(run: Run) -> float | None:
    """Mean retention of experts that are shown other samples' media."""
    if not run.blind or any(stage not in run.blind for stage in run.experts):
        return None
    return statistics.fmean(retention(run.blind[stage], scores) for stage, scores in run.experts.items())


def lead(run: Run) -> str:
    """The result in one or two sentences."""
    rows = _sorted(run)
    if not rows:
        return "Nothing was composed."
    (first, best), (last, worst) = rows[0], rows[-1]
    text = f"{first} keeps {best['retention_mean']:.1f} % of what the experts reach"
    text += f"; {last} keeps {worst['retention_mean']:.1f} %." if last != first else "."
    name, row = max(rows, key=lambda pair: pair[1]["expansion_mean"])
    text += f" Over combinations of inputs {name} is right most often: {100 * row['expansion_mean']:.1f} %."
    return text


def compared(runs: Sequence[Run]) -> Sheet | None:
    """Several runs: means over runs ± sample standard deviation over runs."""
    runs = [run for run in runs if run.composing]
    if not runs:
        return None
    names = list(dict.fromkeys(name for run in runs for name in run.composing["composers"]))
    keys = (("retention_mean", 1.0), ("expanded_retention_mean", 1.0), ("expansion_mean", 100.0))
    rows = []
    for name in names:
        found = [run.composing["composers"][name] for run in runs if name in run.composing["composers"]]
        cells = []
        for key, factor in keys:
            mean, std = mean_std([factor * row[key] for row in found])
            each = ", ".join(number(factor * row[key]) for row in found)
            cells += [Cell(number(mean, 1), title=each), Cell(spread(std, 1))]
        rows.append(Row(name, tuple(cells), "" if len(found) == len(runs) else f"{len(found)} of {len(runs)} runs"))
    columns = ("retention", "over runs", "all in one model", "over runs", "combinations", "over runs")
    about = (
        "Retention of the experts' scores, recovered where the composer keeps them and with all modalities in one model, and "
        "accuracy over combinations of inputs, in percent: mean ± sample standard deviation over runs."
    )
    return Sheet("Composers", about, columns, tuple(rows), ("retention", "all in one model", "combinations"))


def _sheet(there: Any, make: Callable[[], Sheet]) -> list[Sheet]:
    return [make()] if there else []


def _sorted(run: Run) -> list[tuple[str, Mapping[str, Any]]]:
    """Composers, best retention first; without the ceiling, which is 100 by definition."""
    rows = [(name, row) for name, row in run.composing["composers"].items() if row["rule"] != CEILING]
    return sorted(rows, key=lambda pair: -pair[1]["retention_mean"])


def _starred(rows: Sequence[tuple[str, Sequence[float], str, str]], digits: int = 1) -> tuple[Row, ...]:
    """Rows of (name, numbers, note, kind); the best of every column is marked, among methods."""
    methods = [values for _, values, _, kind in rows if kind == "method"]
    best = [max(column) for column in zip(*methods, strict=True)] if methods else []
    made = []
    for name, values, note, kind in rows:
        marks = [kind == "method" and value == best[i] for i, value in enumerate(values)]
        cells = tuple(Cell(number(v, digits), best=mark) for v, mark in zip(values, marks, strict=True))
        made.append(Row(name, cells, note, kind))
    return tuple(made)


def _kind(row: Mapping[str, Any]) -> str:
    return "floor" if row["rule"] == CEILING else "method"


def _note(row: Mapping[str, Any]) -> str:
    """Which settings were chosen."""
    if row["rule"] == CEILING:
        return "every position with its expert's exact weights"
    own = [
        f"{key} {' / '.join(f'{values[key]:g}' for values in row['per_model'].values())}"
        for key in dict.fromkeys(key for values in row["per_model"].values() for key in values)
    ]
    return ", ".join([*(f"{key} {value}" for key, value in row["settings"].items()), *own])


def _expansion(run: Run) -> Sheet:
    composers = run.composing["composers"]
    combinations = tuple(next(iter(composers.values()))["expansion"]) if composers else ()
    rows: list[tuple[str, Sequence[float], str, str]] = []
    for name, row in composers.items():
        values = [*row["expansion"].values(), row["expansion_mean"]]
        rows.append((name, [100 * value for value in values], "", _kind(row)))
    for name, row in composers.items():
        if "blind" in row:
            values = [*row["blind"].values(), statistics.fmean(row["blind"].values())]
            rows.append(("blind", [100 * value for value in values], f"{name}, shown other samples' media", "floor"))
    about = (
        "Accuracy in percent on lettered questions over several inputs at once; chance is 25. One model, all modalities. "
        "Letters: image, video, audio, point cloud."
    )
    columns = (*(name.upper() for name in combinations), "mean")
    return Sheet("Combinations of inputs", about, columns, _starred(rows), ("mean",))


def _retention(run: Run) -> Sheet:
    rows: list[tuple[str, Sequence[float], str, str]] = []
    probes = list(dict.fromkeys(p for row in run.composing["composers"].values() for p in row["probes"]))
    for name, row in run.composing["composers"].items():
        kept = [row["retention"][stage] for stage in run.order]
        joint = [row["expanded_retention"][stage] for stage in run.order]
        values = [*kept, row["retention_mean"], *joint, row["expanded_retention_mean"]]
        values += [100 * row["probes"].get(probe, float("nan")) for probe in probes]
        rows.append((name, values, _note(row), _kind(row)))
        if "own" in row:
            own = row["own"]
            values = [*(own["retention"][stage] for stage in run.order), own["retention_mean"]]
            values += [*(own["expanded_retention"][stage] for stage in run.order), own["expanded_retention_mean"]]
            values += [float("nan") for _ in probes]
            rows.append((f"{name}, of its own", values, "percent of the experts that it composed", "floor"))
    about = (
        "Percent of what each expert reaches alone. Left: the expert, recovered where the composer keeps it apart, else the "
        "merged model. Right: one model with all modalities at once. Under each name the settings chosen on validation data."
    )
    columns = (*run.order, "mean", *(f"{stage} " for stage in run.order), "mean ", *probes)
    return Sheet("Of each expert", about, columns, _starred(rows), (run.order[0], f"{run.order[0]} ", *probes[:1]))


def _ablation(run: Run) -> Sheet:
    found = run.composing
    name = next((name for name, row in found["composers"].items() if "blind" in row), "")
    whole = {name: found["composers"][name]} if name else {}
    rows = [
        (
            each,
            [100 * row["expansion_mean"], row["retention_mean"], row["expanded_retention_mean"]],
            _note(row),
            "method",
        )
        for each, row in {**whole, **found["ablation"]}.items()
    ]
    about = "The same composition without one step of the decoupling."
    return Sheet("Without a step", about, ("combinations", "retention", "all in one model"), _starred(rows))


def _masked(found: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Composer -> share of the parameters that each mask selects."""
    return {name: row["mask_share"] for name, row in found["composers"].items() if row.get("mask_share")}


def _masks(run: Run) -> Sheet:
    shares = _masked(run.composing)
    routes = tuple(next(iter(shares.values())))
    rows = tuple(
        Row(name, tuple(Cell(number(100 * share.get(route, 0.0), 1), shade=share.get(route, 0.0)) for route in routes))
        for name, share in shares.items()
    )
    return Sheet("Masks", "Percent of the LLM's parameters that each mask selects.", routes, rows, heat=True)


def _sweep(rows: Sequence[Mapping[str, Any]]) -> Sheet:
    densities = list(dict.fromkeys(row["density"] for row in rows))
    significances = list(dict.fromkeys(row["significance"] for row in rows))
    values = [row["expansion"] for row in rows]
    low, high = min(values), max(values)
    table = []
    for density in densities:
        cells = []
        for significance in significances:
            row = next(row for row in rows if (row["density"], row["significance"]) == (density, significance))
            shade = (row["expansion"] - low) / (high - low) if high > low else 0.0
            below = f"{row['retention']:.1f} kept"
            cells.append(Cell(number(100 * row["expansion"], 1), below, shade=shade))
        table.append(Row(f"K = {100 * density:g} %", tuple(cells)))
    lines = [
        Series(f"λ = {significance:g}", i, [row["retention"] for row in rows if row["significance"] == significance])
        for i, significance in enumerate(significances)
    ]
    said = "; ".join(f"{line.name}: {', '.join(number(v, 1) for v in line.values)}" for line in lines)
    stages = [f"{100 * density:g} %" for density in densities]
    chart = figures.curves(
        "Retention against density", f"Percent of the experts. {said}.", stages, lines, numbered=False
    )
    about = (
        "Validation data. Accuracy over combinations for every density K (share of each expert's changes that is merged) and "
        "significance λ (one for all experts), with the mean retention below."
    )
    columns = tuple(f"λ = {value:g}" for value in significances)
    charts = (("Retention", "Against the density K, one line per λ", chart),)
    return Sheet("Density and significance", about, columns, tuple(table), heat=True, charts=charts)


def _counts(run: Run) -> Sheet:
    found, charts = run.composing, []
    if counts := found.get("counts"):
        sizes = sorted({len(names.split("+")) for names in counts})
        composers = list(next(iter(counts.values())))
        index = {name: i for i, name in enumerate(found["composers"])}
        lines = []
        for name in composers:
            kept = [
                statistics.fmean(
                    statistics.fmean(row[name]["retention"].values())
                    for names, row in counts.items()
                    if len(names.split("+")) == size
                )
                for size in sizes
            ]
            lines.append(Series(name, index.get(name, 0), [*kept, found["composers"][name]["retention_mean"]]))
        stages = [*(f"{size} experts" for size in sizes), f"{len(run.order)} experts"]
        said = "; ".join(f"{line.name}: {', '.join(number(v, 1) for v in line.values)}" for line in lines)
        chart = figures.curves("Retention against the number of experts", said, stages, lines, numbered=False)
        charts.append(("Retention", "Mean over the experts of every set, percent", chart))
    storage = found.get("storage", {})
    if by_count := storage.get("by_count"):
        methods = list(next(iter(by_count.values())))
        lines = [
            Series(name, i, [100 * bits[name] / bits["originals"] for bits in by_count.values()])
            for i, name in enumerate(methods)
        ]
        stages = [f"{count} experts" for count in by_count]
        said = "; ".join(f"{line.name}: {', '.join(number(v, 0) for v in line.values)}" for line in lines)
        chart = figures.curves("Storage against the number of experts", said, stages, lines, numbered=False)
        charts.append(("Storage", "Percent of the originals', by the paper's formulas", chart))
    bits = storage.get("bits", {})
    rows = [
        Row(name, (Cell(_mebibytes(value)), Cell(number(100 * value / bits["originals"], 1))))
        for name, value in bits.items()
    ]
    about = "Every set of experts is composed anew, with settings chosen for it. plain: averaging, task arithmetic, TIES, DARE."
    return Sheet(
        "Number of experts, and storage", about, ("storage", "% of originals"), tuple(rows), charts=tuple(charts)
    )


def _mebibytes(bits: float) -> str:
    return f"{bits / 8e6:.2f} MB"


def _forgetting(scenarios: Mapping[str, Mapping[str, Any]]) -> Sheet:
    rows: list[Row] = []
    for name, row in scenarios.items():
        tasks = ", ".join(row["tasks"])
        for method, said in METHODS.items():
            previous, new, others, joint = _forgotten(row, method)
            values = [previous, new, others, joint]
            cells = tuple(Cell(number(value, 1)) for value in values)
            first = method == "composed"
            rows.append(Row(f"{name}: {said}" if first else said, cells, tasks if first else ""))
        untouched = statistics.fmean(row["untouched"].values())
        rows.append(Row("before", (Cell(DASH), Cell(number(untouched, 1)), Cell(DASH), Cell(DASH)), "", "floor"))
    about = (
        "New tasks for an expert that is part of a composition. Previous: of the same modality, percent of the expert. New: "
        "percent of fine-tuning on it alone; before is the expert that never saw it. Model Tailor and fine-tuning know one "
        "modality; only the composition has others to forget."
    )
    columns = ("previous", "new", "other modalities", "combinations")
    return Sheet("New tasks", about, columns, tuple(rows))


def _forgotten(row: Mapping[str, Any], method: str) -> tuple[float | None, float, float | None, float | None]:
    """Previous tasks of the same modality, new tasks, other modalities, combinations."""
    if method == "composed":
        composed = row["composed"]
        previous = composed.get("previous", {})
        mean = statistics.fmean(previous.values()) if previous else None
        new = statistics.fmean(composed["new"].values())
        return mean, new, composed.get("others_mean"), 100 * composed["expansion_mean"]
    owners = row[method].values()
    previous_mean, new = (statistics.fmean(each[key] for each in owners) for key in ("previous", "new"))
    return previous_mean, new, None, None
