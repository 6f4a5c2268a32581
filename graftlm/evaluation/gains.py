"""How much a model kept and gained: pure functions on score tables.

    relative gain    RG_j = mean over tasks of (score / expert's score)             of modality j, in percent
    backward gain    Bw^i = mean over j < i of RG_j                                 what stage i left of the earlier ones
    forward gain     Fw^i = RG_i                                                    what stage i made of its own

Paper:   Zhang et al., Merge then Realign, EMNLP 2025, arXiv:2503.07663, §5.1 (relative gains); Lopez-Paz and Ranzato, GEM,
    NeurIPS 2017, arXiv:1706.08840 (ACC, BWT, FWT); Chaudhry et al., ECCV 2018, arXiv:1801.10112 (forgetting); MMER, ACL
    2025, arXiv:2505.17110, Eq. 8 (retention).
Differs: the backward gain of stage 1 is the first modality's own relative gain. That is the paper's 100 for every method
    whose first stage is the expert, and the printed values for EProj, whose first stage is not. The spread is the sample
    standard deviation, as the paper's tables have it (it does not say so).
"""

import math
import statistics
from collections.abc import Mapping, Sequence

from graftlm.core.errors import DataError

__all__ = [
    "accuracy",
    "backward_gains",
    "backward_transfer",
    "forgetting",
    "forward_gains",
    "forward_transfer",
    "incremental_accuracy",
    "learning_accuracy",
    "ranks",
    "relative_gain",
    "relative_matrix",
    "retention",
    "summary",
]

Scores = Mapping[str, float | None]
"""Task -> score, on any scale that the experts share; None where nothing was measured."""

Matrix = Sequence[Sequence[float]]
"""R[t][j], the score on task j after stage t, T x T."""


def relative_gain(scores: Scores, experts: Scores) -> float:
    """Percent of the expert's scores, mean over the expert's tasks.

    A task on which the expert scores 0 says nothing and is left out; nan if all do.

    Raises:
        DataError: a task of the expert has no score.
    """
    known = {task: score for task, score in scores.items() if score is not None}
    if missing := [task for task in experts if task not in known]:
        raise DataError(f"relative gain: no score of {missing}; every task of the expert is expected. Evaluate them.")
    ratios = [known[task] / expert for task, expert in experts.items() if expert]
    return 100 * statistics.fmean(ratios) if ratios else math.nan


def backward_gains(scores: Sequence[Mapping[str, Scores]], experts: Mapping[str, Scores]) -> list[float]:
    """Bw per stage, in percent.

    Args:
        scores: ``scores[i][modality][task]``, in order of learning, every modality seen after stage i + 1. The newest one
            of a later stage is not needed.
        experts: the upper bounds, ``experts[modality][task]``.

    Raises:
        DataError: a stage lacks a modality or holds them in another order; a score or an expert is missing.
    """
    return [
        statistics.fmean(_gain(scores, experts, i, name) for name in _seen(scores, i, max(1, i)))
        for i in range(len(scores))
    ]


def forward_gains(scores: Sequence[Mapping[str, Scores]], experts: Mapping[str, Scores]) -> list[float]:
    """Fw per stage, in percent; arguments and errors as in `backward_gains`, but the newest modality is needed."""
    return [_gain(scores, experts, i, _seen(scores, i, i + 1)[i]) for i in range(len(scores))]


def summary(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value); nan if a value is.

    Raises:
        DataError: no values.
    """
    if not values:
        raise DataError("summary: 0 values; the gain of at least one stage is expected. Finish a stage first.")
    if any(map(math.isnan, values)):  # `statistics.stdev` fails on nan
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def accuracy(matrix: Matrix) -> float:
    """ACC: the mean score after the last stage."""
    return statistics.fmean(_square(matrix)[-1])


def backward_transfer(matrix: Matrix) -> float:
    """BWT: mean change of a task's score between its own stage and the last. Negative is forgetting."""
    rows = _square(matrix, least=2)
    return statistics.fmean(rows[-1][j] - rows[j][j] for j in range(len(rows) - 1))


def forward_transfer(matrix: Matrix, initial: Sequence[float]) -> float:
    """FWT: mean score of a task just before its stage, above its score before all learning (``initial``)."""
    rows = _square(matrix, least=2)
    if len(initial) != len(rows):
        raise DataError(f"forward transfer: {len(initial)} initial scores; one per task, {len(rows)}, is expected.")
    return statistics.fmean(rows[j - 1][j] - initial[j] for j in range(1, len(rows)))


def forgetting(matrix: Matrix, *, after_learning: bool = False) -> float:
    """FM: mean fall of a task from its best score before the last stage.

    Args:
        after_learning: the best since its own stage, instead of the best ever.
    """
    rows = _square(matrix, least=2)
    last = len(rows) - 1
    return statistics.fmean(
        max(rows[t][j] for t in range(j if after_learning else 0, last)) - rows[last][j] for j in range(last)
    )


def incremental_accuracy(matrix: Matrix) -> float:
    """Mean over stages of the mean score on what was learned so far."""
    return statistics.fmean(statistics.fmean(row[: t + 1]) for t, row in enumerate(_square(matrix)))


def learning_accuracy(matrix: Matrix) -> float:
    """Mean score of every task right after its own stage."""
    return statistics.fmean(row[t] for t, row in enumerate(_square(matrix)))


def retention(scores: Scores, originals: Scores) -> float:
    """Percent of the original models' scores, mean of the tasks' ratios (not the ratio of means)."""
    return relative_gain(scores, originals)


def relative_matrix(scores: Sequence[Mapping[str, Scores]], experts: Mapping[str, Scores]) -> list[list[float]]:
    """R[t][j]: the relative gain of stage j's tasks after stage t, in percent, so that metrics of unlike scales never mix.

    nan where a task was not measured, or the expert scores 0 on everything.

    Args:
        scores: ``scores[t][stage][task]``.
        experts: ``experts[stage][task]``, in the order of learning.
    """
    return [
        [
            relative_gain(after[stage], expert) if set(expert) <= set(after.get(stage, {})) else math.nan
            for stage, expert in experts.items()
        ]
        for after in scores
    ]


def ranks(values: Sequence[float]) -> list[float]:
    """1 for the largest; equal values share the mean of their places."""
    return [
        1 + sum(other > value for other in values) + (sum(other == value for other in values) - 1) / 2
        for value in values
    ]


def _seen(scores: Sequence[Mapping[str, Scores]], i: int, count: int) -> list[str]:
    """The first ``count`` modalities of stage i + 1: from a table with a gap, others would be taken for them."""
    names, last = list(scores[i]), list(scores[-1])
    if not count <= len(names) <= i + 1 or names != last[: len(names)]:
        raise DataError(
            f"gains: stage {i + 1} has scores of {names}, the last stage of {last}; in order of learning, one modality more "
            f"at every stage is expected. Evaluate every task seen after every stage."
        )
    return names[:count]


def _gain(scores: Sequence[Mapping[str, Scores]], experts: Mapping[str, Scores], i: int, name: str) -> float:
    if name not in experts:
        raise DataError(
            f"gains: no expert of '{name}', only of {list(experts)}; an upper bound per modality is expected."
        )
    return relative_gain(scores[i].get(name, {}), experts[name])


def _square(matrix: Matrix, least: int = 1) -> Matrix:
    if len(matrix) < least or any(len(row) != len(matrix) for row in matrix):
        raise DataError(
            f"score matrix of {len(matrix)} stages and rows of {sorted({len(row) for row in matrix})}; as many tasks as stages, "
            f"and at least {least}, are expected."
        )
    return matrix
