"""Choose the test items that tell methods and stages apart, and lay out what each of them said."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from graftlm.core.files import read_json, read_jsonl
from graftlm.core.seeds import derive
from graftlm.report.reading import Run, stage_folders

__all__ = ["Answer", "Item", "TaskSamples", "choose"]

LONGEST = 220
"""Characters of a text that are shown."""
BEST = {"cider": 10.0}
"""The score of a perfect item per metric; 1 for those that are not named."""

Mark = Literal["right", "wrong", "partial", "unknown"]


@dataclass(frozen=True)
class Answer:
    """One output beside its references.

    Attributes:
        note: the item's score where it is not simply right or wrong.
        share: the score as a share of the best one, 0 to 1.
    """

    text: str
    mark: Mark
    note: str = ""
    share: float = 0.0


@dataclass(frozen=True)
class Item:
    """One test item and everything that was said about it.

    Attributes:
        media: what the prediction file holds: {modality, source}.
        rows: method -> one answer per column of `TaskSamples.columns`; None where there is none.
    """

    sample_id: str
    prompt: str
    references: tuple[str, ...]
    media: tuple[Mapping[str, Any], ...]
    expert: Answer | None
    rows: tuple[tuple[str, tuple[Answer | None, ...]], ...]


@dataclass(frozen=True)
class TaskSamples:
    """The chosen items of one task; ``columns`` are the stages after which it was measured."""

    task: str
    stage: str
    metric: str
    columns: tuple[str, ...]
    items: tuple[Item, ...]


@dataclass(frozen=True)
class _Said:
    """All predictions of one model for one task: sample id -> (line, score)."""

    lines: Mapping[str, Mapping[str, Any]]
    scores: Mapping[str, float | None]
    metric: str


def choose(run: Run, count: int) -> list[TaskSamples]:
    """Up to ``count`` items per task, those on which answers differ most first."""
    found = [_choose_task(run, stage, task, count) for stage, task in _tasks(run)]
    return [samples for samples in found if samples.items]


def _tasks(run: Run) -> Iterator[tuple[str, str]]:
    for stage, tasks in run.tasks.items():
        yield from ((stage, task) for task in tasks)
    yield from (("", probe) for probe in run.probes)


def _choose_task(run: Run, stage: str, task: str, count: int) -> TaskSamples:
    first = run.order.index(stage) if stage in run.order else len(run.order) - 1
    columns = run.order[first:]
    said: dict[str, list[_Said]] = {}
    for method in run.methods:
        folders = dict(stage_folders(run.folder / "methods" / method.name))
        said[method.name] = [_read(folders.get(column), task) for column in columns]
    expert = _read(run.folder / "experts" / stage if stage else None, task)
    everyone = [expert, *(column for each in said.values() for column in each)]
    known = dict.fromkeys(id_ for column in everyone for id_ in column.lines)
    order = sorted(known, key=lambda id_: (-_disagreement(said, id_), derive(0, task, id_)))
    metric = next((s.metric for s in everyone if s.metric), "")
    return TaskSamples(task, stage, metric, tuple(columns), tuple(_item(id_, said, expert) for id_ in order[:count]))


def _read(folder: Path | None, task: str) -> _Said:
    if folder is None:
        return _Said({}, {}, "")
    lines = {str(line.get("sample_id")): line for line in read_jsonl(folder / "predictions" / f"{task}.jsonl")}
    path = folder / "scores.json"
    entry = read_json(path).get(task, {}) if path.exists() else {}
    metric = str(entry.get("metric", ""))
    path = folder / "items.json"
    given = read_json(path).get(task, {}) if path.exists() else {}
    scores = given if isinstance(given, Mapping) else dict(zip(lines, given, strict=False))
    return _Said(lines, {id_: _score(line, scores.get(id_), metric) for id_, line in lines.items()}, metric)


def _score(line: Mapping[str, Any], given: Any, metric: str) -> float | None:
    """The item's score in [0, 1]; without a given one, whether the output is one of the references."""
    if isinstance(given, int | float) and isfinite(given):
        return min(1.0, float(given) / BEST.get(metric, 1.0))
    if _plain(line.get("output", "")) in map(_plain, line.get("references", ())):
        return 1.0
    return None if metric in BEST else 0.0


def _plain(text: object) -> str:
    return " ".join(re.findall(r"\w+", str(text).lower()))


def _disagreement(said: Mapping[str, Sequence[_Said]], sample_id: str) -> float:
    """Variance of the item's scores, plus a little for every different output."""
    present = [column for columns in said.values() for column in columns if sample_id in column.lines]
    scores = [score for column in present if (score := column.scores[sample_id]) is not None]
    mean = sum(scores) / len(scores) if scores else 0.0
    variance = sum((score - mean) ** 2 for score in scores) / len(scores) if scores else 0.0
    outputs = {_plain(column.lines[sample_id].get("output", "")) for column in present}
    return variance + 0.01 * len(outputs)


def _item(sample_id: str, said: Mapping[str, Sequence[_Said]], expert: _Said) -> Item:
    rows = tuple((name, tuple(_answer(column, sample_id) for column in columns)) for name, columns in said.items())
    line = next(
        column.lines[sample_id]
        for column in [expert, *(column for columns in said.values() for column in columns)]
        if sample_id in column.lines
    )
    return Item(
        sample_id=sample_id,
        prompt=_clip(line.get("prompt", "")),
        references=tuple(_clip(text) for text in list(dict.fromkeys(map(str, line.get("references", ()))))[:5]),
        media=tuple(media for media in line.get("media") or () if isinstance(media, Mapping)),
        expert=_answer(expert, sample_id),
        rows=tuple((name, answers) for name, answers in rows if any(answers)),
    )


def _answer(said: _Said, sample_id: str) -> Answer | None:
    line = said.lines.get(sample_id)
    if line is None:
        return None
    score = said.scores[sample_id]
    text = _clip(line.get("output", ""))
    if score is None:
        return Answer(text, "unknown")
    best = BEST.get(said.metric, 1.0)
    mark: Mark = "right" if score >= 0.995 else "wrong" if score < 0.05 else "partial"
    graded = mark == "partial" or said.metric in BEST
    return Answer(text, mark, f"{score * best:.1f}" if graded else "", score)


def _clip(text: object) -> str:
    words = str(text)
    return words if len(words) <= LONGEST else words[: LONGEST - 1] + "…"
