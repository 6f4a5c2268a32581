"""Is one method better than another? Paired differences of per-sample scores, resampled.

Both methods answered the same items, so an item that is hard for one is hard for both: differences are taken item by
item, and items are drawn anew within every task. The interval speaks of the test items; how much training varies is
for several seeds to say.

Paper:   Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13 (percentile interval).
Differs: CIDEr's document frequencies are those of the whole test set, not of each resample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graftlm.core import seeds
from graftlm.core.errors import DataError
from graftlm.core.files import read_json

__all__ = ["Difference", "Pair", "paired_difference", "paired_gain", "paired_over_runs"]

Items = Mapping[str, Mapping[str, float]]
"""Task -> sample id -> score."""


@dataclass(frozen=True)
class Difference:
    """A difference with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def told_apart(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Pair:
    """Two methods in one run.

    Attributes:
        first, second: what they scored, item by item, on the same items.
        weights: task -> what one unit of its mean score adds to the result; tasks that are not named do not count.
    """

    first: Items
    second: Items
    weights: Mapping[str, float]


def paired_gain(
    first: Path, second: Path, experts: Mapping[str, float], *, seed: int = 0, draws: int = 2000
) -> Difference:
    """How much the mean relative gain of one evaluated folder exceeds another's, in percent points.

    Args:
        first, second: folders with ``items.json``.
        experts: task -> the expert's score; these tasks count, each alike.
    """
    return paired_difference(
        read_json(first / "items.json"), read_json(second / "items.json"), experts, seed=seed, draws=draws
    )


def paired_difference(
    first: Items, second: Items, experts: Mapping[str, float], *, seed: int = 0, draws: int = 2000
) -> Difference:
    """As `paired_gain`, on tables.

    Raises:
        DataError: no experts; the two did not answer the same items; an expert scores 0.
    """
    if not experts:
        raise DataError("paired difference: 0 experts' scores; one per task to compare is expected.")
    rng = seeds.rng(seed, "bootstrap")
    values, samples = [], np.zeros(draws)
    for task, expert in experts.items():
        if not expert or first.get(task, {}).keys() != second.get(task, {}).keys() or not first.get(task):
            raise DataError(
                f"paired difference on {task}: the expert scores {expert}, and {len(first.get(task, {}))} and "
                f"{len(second.get(task, {}))} items were answered; the same items and an expert above 0 are expected."
            )
        gaps = 100 / expert * np.array([value - second[task][item] for item, value in first[task].items()])
        drawn = rng.integers(0, len(gaps), size=(draws, len(gaps)))
        values.append(float(gaps.mean()))
        samples += gaps[drawn].mean(axis=1) / len(experts)
    low, high = np.quantile(samples, [0.025, 0.975])
    return Difference(float(np.mean(values)), float(low), float(high))


def paired_over_runs(groups: Sequence[Sequence[Pair]], *, seed: int = 0, draws: int = 2000) -> Difference:
    """How much a weighted sum of task scores of one method exceeds another's, mean over runs.

    Groups are drawn with replacement, and within each the items of every task. Runs of one group share test items (the orders
    of one seed do), so these are drawn once for all of them: a hard item is hard in every order.

    Args:
        groups: the runs; a single one is not drawn, and the interval then speaks of its items alone.

    Raises:
        DataError: no runs or no weights; the two did not answer the same items.
    """
    if not groups or not all(groups) or not any(pair.weights for group in groups for pair in group):
        raise DataError("paired difference: no runs, or no tasks to compare in; one of each at least is expected.")
    rng = seeds.rng(seed, "bootstrap", "runs")
    gaps = [_gaps(group) for group in groups]
    values = [sum(float(each.mean()) for each in group) for group in gaps]
    picks = rng.integers(0, len(gaps), size=(draws, len(gaps)))
    samples = np.zeros(draws)
    for slot in range(len(gaps)):
        for index, group in enumerate(gaps):
            drawn = np.zeros(draws)
            for each in group:
                drawn += each[rng.integers(0, len(each), size=(draws, len(each)))].mean(axis=1)
            samples += np.where(picks[:, slot] == index, drawn, 0.0) / len(gaps)
    low, high = np.quantile(samples, [0.025, 0.975])
    return Difference(float(np.mean(values)), float(low), float(high))


def _gaps(group: Sequence[Pair]) -> list[np.ndarray]:
    """Per set of items, their weighted differences, mean over the runs of a group."""
    found: dict[tuple[str, frozenset[str]], np.ndarray] = {}
    for pair in group:
        for task, weight in pair.weights.items():
            first, second = pair.first.get(task, {}), pair.second.get(task, {})
            if first.keys() != second.keys() or not first:
                raise DataError(
                    f"paired difference on {task}: {len(first)} and {len(second)} items were answered; the same items are "
                    f"expected. Evaluate both on the same split."
                )
            gap = weight / len(group) * np.array([first[item] - second[item] for item in sorted(first)])
            key = (task, frozenset(first))
            found[key] = found[key] + gap if key in found else gap
    return list(found.values())
