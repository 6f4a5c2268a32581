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
    "relative_gain",
    "retention",
    "summary",
]

Scores = Mapping[str, float]
"""Task -> score, on any scale that the experts share."""

Matrix = Sequence[Sequence[float]]
"""R[t][j], the score on task j after stage t, T x T."""


def relative_gain(scores: Scores, experts: Scores) -> float:
    """Percent of the expert's scores, mean over the expert's tasks.

    A task on which the expert scores 0 says nothing and is left out; nan if all do.

    Raises:
        DataError: a task of the expert has no score.
    """
    if missing := [task for task in experts if task not in scores]:
        raise DataError(f"relative gain: no score of {missing}; every task of the expert is expected. Evaluate them.")
    ratios = [scores[task] / experts[task] for task in experts if experts[task]]
    return 100 * statistics.fmean(ratios) if ratios else math.nan


def backward_gains(scores: Sequence[Mapping[str, Scores]], experts: Mapping[str, Scores]) -> list[float]:
    """Bw per stage, in percent.

    Args:
        scores: ``scores[i][modality][task]``, in order of learning, every modality seen after stage i + 1. The newest one
            of a later stage is not needed.
        experts: the upper bounds, ``experts[modality][task]``.
    """
    gains = []
    for i, stage in enumerate(scores):
        old = list(stage)[: max(1, i)]
        gains.append(statistics.fmean(relative_gain(stage[name], experts[name]) for name in old))
    return gains


def forward_gains(scores: Sequence[Mapping[str, Scores]], experts: Mapping[str, Scores]) -> list[float]:
    """Fw per stage, in percent; arguments as in `backward_gains`."""
    newest = [list(stage)[i] for i, stage in enumerate(scores)]
    return [relative_gain(stage[name], experts[name]) for stage, name in zip(scores, newest, strict=True)]


def summary(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
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


def _square(matrix: Matrix, least: int = 1) -> Matrix:
    if len(matrix) < least or any(len(row) != len(matrix) for row in matrix):
        raise DataError(
            f"score matrix of {len(matrix)} stages and rows of {sorted({len(row) for row in matrix})}; as many tasks as stages, "
            f"and at least {least}, are expected."
        )
    return matrix
