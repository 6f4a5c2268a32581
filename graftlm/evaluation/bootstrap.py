"""Is one method better than another? Paired differences of per-sample scores, resampled.

Both methods answered the same items, so an item that is hard for one is hard for both: differences are taken item by
item, and items are drawn anew within every task. The interval speaks of the test items; how much training varies is
for several seeds to say.

Paper:   Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13 (percentile interval).
Differs: CIDEr's document frequencies are those of the whole test set, not of each resample.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graftlm.core import seeds
from graftlm.core.errors import DataError
from graftlm.core.files import read_json

__all__ = ["Difference", "paired_difference", "paired_gain"]

Items = Mapping[str, Mapping[str, float]]
"""Task -> sample id -> score."""


@dataclass(frozen=True)
class Difference:
    """A difference with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


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
