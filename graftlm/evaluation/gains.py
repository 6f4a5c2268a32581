"""How much a model kept and gained: pure functions on score tables.

Paper:   Zhang et al., Merge then Realign, EMNLP 2025, arXiv:2503.07663, §5.2 (relative, backward and forward relative
    gain); Lopez-Paz and Ranzato, GEM, NeurIPS 2017, arXiv:1706.08840 (ACC, BWT, FWT); Chaudhry et al., ECCV 2018,
    arXiv:1801.10112 (forgetting); MMER, ACL 2025, arXiv:2505.17110, Eq. 8 (retention).
Differs: backward gain at stage 1 is the first modality's own relative gain. That is the paper's 100 for every method whose
    first stage is the expert, and the printed values for EProj, whose first stage is not.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

__all__ = ["backward_gains", "forward_gains", "relative_gain", "summary"]

Scores = Mapping[str, float]


def relative_gain(scores: Scores, experts: Scores) -> float:
    """Percent of the experts' scores, mean over tasks. A task whose expert scores 0 is left out; nan if all do."""
    ratios = [scores[task] / experts[task] for task in experts if experts[task]]
    return 100 * statistics.fmean(ratios) if ratios else math.nan


def backward_gains(scores: Sequence[Mapping[str, Scores]], experts: Mapping[str, Scores]) -> list[float]:
    """Per stage, the mean relative gain of the modalities learned before it."""
    gains = []
    for i, stage in enumerate(scores):
        names = list(stage)
        old = names[:i] if i else names[:1]
        gains.append(statistics.fmean(relative_gain(stage[name], experts[name]) for name in old))
    return gains


def forward_gains(scores: Sequence[Mapping[str, Scores]], experts: Mapping[str, Scores]) -> list[float]:
    """Per stage, the relative gain of the modality learned in it."""
    return [relative_gain(stage[list(stage)[i]], experts[list(stage)[i]]) for i, stage in enumerate(scores)]


def summary(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation."""
    return statistics.fmean(values), statistics.stdev(values)
