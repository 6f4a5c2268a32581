"""Score a model on tasks: predictions first, numbers second, so that new numbers never need new answers.

predictions/<task>.jsonl   what was answered, with the references
items.json                 task -> sample id -> score, for paired statistics
scores.json                task -> metric, value, n, standard error; written last
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from graftlm.core.errors import RunError
from graftlm.core.files import read_json, write_json
from graftlm.data.types import Task
from graftlm.evaluation.metrics import METRICS, Metric
from graftlm.evaluation.predict import Answering, Prediction, Progress, predict, read_predictions

__all__ = ["TaskScore", "evaluate", "rescore"]


@dataclass(frozen=True)
class TaskScore:
    """A task's score: the mean over ``n`` items, and the standard error of that mean (of the items, not of training)."""

    metric: str
    value: float
    n: int
    stderr: float


def evaluate(
    model: Answering,
    tasks: Sequence[Task],
    folder: Path,
    *,
    split: Literal["val", "test"] = "test",
    limit: int | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> dict[str, TaskScore]:
    """Answer and score every task.

    Args:
        folder: where predictions and scores go; answers that are there are not asked for again.
        limit: only the first so many items of a task.
    """
    answers = {}
    for task in tasks:
        samples = task.measured(split)[:limit]
        path = folder / "predictions" / f"{task.name}.jsonl"
        answers[task.name] = predict(model, task, samples, path, batch_size=batch_size, progress=progress)
    return _score(folder, answers, {task.name: task.metric for task in tasks})


def rescore(folder: Path, metrics: Mapping[str, str] | None = None) -> dict[str, TaskScore]:
    """Score the written predictions again; no model is needed.

    Args:
        metrics: task -> metric, where another one than before is wanted.

    Raises:
        RunError: the folder holds no scores, or fewer predictions than were scored before.
    """
    path = folder / "scores.json"
    if not path.is_file():
        raise RunError(f"{path}: missing; a folder that was evaluated is expected. Evaluate it first.")
    before = read_json(path)
    names = {task: score["metric"] for task, score in before.items()} | dict(metrics or {})
    answers = {task: read_predictions(folder / "predictions" / f"{task}.jsonl") for task in names}
    for task, lines in answers.items():
        if task not in before or len(lines) != before[task]["n"]:
            raise RunError(
                f"{folder}: {len(lines)} predictions of '{task}', where {before.get(task, {}).get('n', 0)} were scored; all of "
                f"them are expected. Evaluate it again: what is there is kept."
            )
    return _score(folder, answers, names)


def _score(
    folder: Path, answers: Mapping[str, Sequence[Prediction]], metrics: Mapping[str, str]
) -> dict[str, TaskScore]:
    scores: dict[str, TaskScore] = {}
    items: dict[str, dict[str, float]] = {}
    for task, lines in answers.items():
        metric: Metric = METRICS.get(metrics[task])
        score = metric.score([line.output for line in lines], [line.references for line in lines])
        error = statistics.stdev(score.per_item) / math.sqrt(len(lines)) if len(lines) > 1 else 0.0
        scores[task] = TaskScore(metrics[task], score.value, len(lines), error)
        items[task] = {line.sample_id: value for line, value in zip(lines, score.per_item, strict=True)}
    write_json(folder / "items.json", items)
    write_json(folder / "scores.json", {task: asdict(score) for task, score in scores.items()})
    return scores
