"""Several runs as one: means and spreads over seeds and orders, and what differs between the runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from graftlm.report.figures import Series
from graftlm.report.reading import MethodResult, Run, flatten
from graftlm.report.tables import DASH, Cell, mean_std, number, spread

__all__ = ["Comparison", "Difference", "Group", "compare_runs"]

Order = tuple[str, ...]
Rows = tuple[tuple[str, tuple[tuple[Cell, Cell, Cell], ...], tuple[Cell, ...]], ...]


@dataclass(frozen=True)
class Group:
    """Curves of the runs of one order, or of all: means over runs with the lowest and the highest run."""

    title: str
    stages: tuple[str, ...]
    backward: tuple[Series, ...]
    forward: tuple[Series, ...]


@dataclass(frozen=True)
class Difference:
    """A setting or a property of the machine that is not the same in all runs."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """What `compare_runs` found.

    Attributes:
        rows: method -> per order: mean, spread over runs, and the spread over stages (mean over runs); then, with
            several orders, mean and spread over all runs; then probes.
        settings, environment: what differs.
        same: how many properties of the environment are the same everywhere.
    """

    runs: tuple[Run, ...]
    orders: tuple[Order, ...]
    probes: tuple[str, ...]
    rows: Rows
    groups: tuple[Group, ...]
    settings: tuple[Difference, ...]
    environment: tuple[Difference, ...]
    same: int


def compare_runs(runs: Sequence[Run]) -> Comparison:
    """Put runs side by side; methods of the same name are taken as the same method."""
    names = list(dict.fromkeys(method.name for run in runs for method in run.methods))
    orders = tuple(dict.fromkeys(run.order for run in runs))
    probes = tuple(dict.fromkeys(probe for run in runs for probe in run.probes))
    by_order = [[run for run in runs if run.order == order] for order in orders]
    columns = by_order if len(orders) == 1 else [*by_order, list(runs)]
    rows = tuple(
        (name, tuple(_result(name, group) for group in columns), _probes(name, runs, probes)) for name in names
    )
    groups = [_group(" → ".join(order), order, names, group) for order, group in zip(orders, by_order, strict=True)]
    if len(orders) > 1:
        stages = ("",) * max(map(len, orders))
        groups.insert(0, _group("average of all runs", stages, names, list(runs)))
    environments = [run.environment for run in runs]
    differing = _differences(environments)
    return Comparison(
        runs=tuple(runs),
        orders=orders,
        probes=probes,
        rows=_best(rows),
        groups=tuple(groups),
        settings=_differences([flatten(run.settings) for run in runs]),
        environment=differing,
        same=len({key for each in environments for key in each}) - len(differing),
    )


def _results(name: str, runs: Sequence[Run]) -> list[MethodResult]:
    """A method's results in the runs that finished it."""
    return [method for run in runs for method in run.methods if method.name == name and not method.missing]


def _result(name: str, runs: Sequence[Run]) -> tuple[Cell, Cell, Cell]:
    results = _results(name, runs)
    means = [method.mean for method in results if method.mean is not None]
    if not means:
        return Cell(DASH), Cell(""), Cell("")
    mean, std = mean_std(means)
    inner = [method.std for method in results if method.std is not None]
    each = ", ".join(number(value) for value in means)
    within = mean_std(inner)[0] if inner else None
    some = f"{len(means)} of {len(runs)} runs" if len(means) < len(runs) else ""
    return Cell(number(mean), below=some, title=f"runs: {each}"), Cell(spread(std)), Cell(spread(within))


def _probes(name: str, runs: Sequence[Run], probes: Sequence[str]) -> tuple[Cell, ...]:
    cells = []
    for probe in probes:
        values = [m.probes[-1][probe] for m in _results(name, runs) if m.probes and probe in m.probes[-1]]
        mean, std = mean_std(values) if values else (None, None)
        cells.append(Cell(number(mean, 3), below=spread(std, 3)))
    return tuple(cells)


def _best(rows: Rows) -> Rows:
    """The same rows with the best mean of every column marked."""
    marked = []
    for name, results, probes in rows:
        cells = []
        for i, (mean, outer, inner) in enumerate(results):
            column = [other[i][0].text for _, other, _ in rows if other[i][0].text != DASH]
            best = mean.text != DASH and float(mean.text) == max(map(float, column))
            cells.append((replace(mean, best=best), outer, inner))
        marked.append((name, tuple(cells), probes))
    return tuple(marked)


def _group(title: str, stages: tuple[str, ...], names: Sequence[str], runs: Sequence[Run]) -> Group:
    def series(pick: Callable[[MethodResult], Sequence[float]]) -> tuple[Series, ...]:
        lines = []
        for index, name in enumerate(names):
            found = [pick(method) for method in _results(name, runs)]
            at = [[values[i] for values in found if i < len(values)] for i in range(len(stages))]
            lines.append(
                Series(
                    name,
                    index,
                    [mean_std(values)[0] if values else None for values in at],
                    [min(values, default=None) for values in at],
                    [max(values, default=None) for values in at],
                )
            )
        return tuple(lines)

    return Group(title, stages, series(lambda m: m.backward), series(lambda m: m.forward))


def _differences(each: Sequence[Mapping[str, str]]) -> tuple[Difference, ...]:
    keys = dict.fromkeys(key for values in each for key in values)
    found = [Difference(key, tuple(values.get(key, DASH) for values in each)) for key in keys]
    return tuple(difference for difference in found if len(set(difference.values)) > 1)
