"""From predictions and references to a score. This table imports nothing heavy; the metrics need no model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from graftlm.core.errors import DataError
from graftlm.core.registry import Registry

__all__ = ["METRICS", "Metric", "Score", "check_items"]


@dataclass(frozen=True, slots=True)
class Score:
    """What a metric says: ``value`` is the mean of ``per_item``, which keeps the order of the predictions."""

    value: float
    per_item: list[float]


class Metric(Protocol):
    """What the entries of `METRICS` can do."""

    def score(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
        """Compare each prediction with its own references.

        Raises:
            DataError: no predictions, another number of reference sets, or an item without references.
        """
        ...


METRICS = Registry(
    "metric",
    {
        "cider": "graftlm.evaluation.metrics.cider:CIDER",
        "exact": "graftlm.evaluation.metrics.accuracy:EXACT",
        "vqa": "graftlm.evaluation.metrics.accuracy:VQA",
        "vqa-official": "graftlm.evaluation.metrics.accuracy:VQA_OFFICIAL",
        "letter": "graftlm.evaluation.metrics.accuracy:LETTER",
    },
    "graftlm.metrics",
)


def check_items(metric: str, predictions: Sequence[object], references: Sequence[Sequence[object]]) -> None:
    """Refuse what no metric can score.

    Raises:
        DataError: no predictions, another number of reference sets, or an item without references.
    """
    if not predictions:
        raise DataError(f"{metric}: 0 predictions to score; at least one is needed. Check the split and the limit.")
    if len(predictions) != len(references):
        raise DataError(
            f"{metric}: {len(predictions)} predictions but {len(references)} reference sets; "
            "each prediction needs its own. Pass them in the same order."
        )
    empty = [number for number, item in enumerate(references) if not item]
    if empty:
        raise DataError(
            f"{metric}: {len(empty)} of {len(references)} items have no reference (first: item {empty[0]}); "
            "each needs at least one. Give every sample an answer, or drop it."
        )
