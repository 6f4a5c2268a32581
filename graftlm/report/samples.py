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
GRADED = frozenset({"cider"})
"""Metrics without a right or wrong: an item is judged beside the expert's average."""

Mark = Literal["right", "wrong", "partial", "unknown"]


@dataclass(frozen=True)
class Answer:
    """One output beside its references.

    Attributes:
        mark: for graded metrics, "right" is at least the expert's average, "wrong" less than a tenth of it.
        note: the item's score, as the task's scores are printed, where it is not simply right or wrong.
        share: from nothing (0) to right (1).
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
    """All predictions of one model for one task: sample id -> line, and score on the metric's scale of items."""

    lines: Mapping[str, Mapping[str, Any]]
    scores: Mapping[str, float | None]
    metric: str
    value: float


@dataclass(frozen=True)
class _Standard:
    """What counts as right: an item's score of ``level``, which prints as ``printed``."""

    level: float = 1.0
    printed: float = 1.0
    graded: bool = False

    def share(self, score: float) -> float:
        return min(1.0, score / self.level)


def choose(run: Run, count: int) -> list[TaskSamples]:
    """Up to ``count`` items per task, those on which answers differ most first."""
    found = [_choose_task(run, stage, task, count) for stage, task in _tasks(run)]
    return [samples for samples in found if samples.items]


def _tasks(run: Run) -> Iterator[tuple[str, str]]:
    for stage, tasks in run.tasks.items():
        yield from ((stage, task) for task in tasks)
    yield from (("", probe) for probe in run.probes)
    for row in list(run.composing.get("composers", {}).values())[:1]:
        yield from (("", task) for task in (*(f"expansion_{name}" for name in row["expansion"]), *row["probes"]))


def _choose_task(run: Run, stage: str, task: str, count: int) -> TaskSamples:
    first = run.order.index(stage) if stage in run.order else len(run.order) - 1
    columns = run.order[first:]
    said: dict[str, list[_Said]] = {}
    for method in run.methods:
        folders = dict(stage_folders(run.folder / "methods" / method.name))
        said[method.name] = [_read(folders.get(column), task) for column in columns]
    if run.composing:
        columns = ("all modalities in one model",)
        for name in run.composing["composers"]:
            said[name] = [_read(run.folder / "composers" / name / "expand", task)]
    expert = _read(run.folder / "experts" / stage if stage else None, task)
    everyone = [expert, *(column for each in said.values() for column in each)]
    known = dict.fromkeys(id_ for column in everyone for id_ in column.lines)
    metric = next((column.metric for column in everyone if column.metric), "")
    standard = _standard(everyone, metric)
    order = sorted(known, key=lambda id_: (-_disagreement(everyone[1:], id_, standard), derive(0, task, id_)))
    items = tuple(_item(id_, said, expert, standard) for id_ in order[:count])
    return TaskSamples(task, stage, metric, tuple(columns), items)


def _read(folder: Path | None, task: str) -> _Said:
    if folder is None:
        return _Said({}, {}, "", 0.0)
    lines = {str(line.get("sample_id")): line for line in read_jsonl(folder / "predictions" / f"{task}.jsonl")}
    path = folder / "scores.json"
    entry = read_json(path).get(task, {}) if path.exists() else {}
    metric = str(entry.get("metric", ""))
    path = folder / "items.json"
    given = read_json(path).get(task, {}) if path.exists() else {}
    scores = given if isinstance(given, Mapping) else dict(zip(lines, given, strict=False))
    judged = {id_: _score(line, scores.get(id_), metric) for id_, line in lines.items()}
    return _Said(lines, judged, metric, entry.get("value") or 0.0)


def _score(line: Mapping[str, Any], given: Any, metric: str) -> float | None:
    """The item's score; without a given one, whether the output is one of the references."""
    if isinstance(given, int | float) and isfinite(given):
        return float(given)
    if metric in GRADED:
        return None
    return float(_plain(line.get("output", "")) in map(_plain, line.get("references", ())))


def _standard(everyone: Sequence[_Said], metric: str) -> _Standard:
    """For a graded metric the average of the first model that has scores: the expert, unless it is not there."""
    if metric not in GRADED:
        return _Standard()
    for said in everyone:
        scores = [score for score in said.scores.values() if score is not None]
        if any(scores):
            level = sum(scores) / len(scores)
            return _Standard(level, said.value or level, graded=True)
    return _Standard(graded=True)


def _plain(text: object) -> str:
    return " ".join(re.findall(r"\w+", str(text).lower()))


def _disagreement(everyone: Sequence[_Said], sample_id: str, standard: _Standard) -> float:
    """Variance of the item's scores, plus a little for every different output."""
    present = [said for said in everyone if sample_id in said.lines]
    shares = [standard.share(score) for said in present if (score := said.scores[sample_id]) is not None]
    mean = sum(shares) / len(shares) if shares else 0.0
    variance = sum((share - mean) ** 2 for share in shares) / len(shares) if shares else 0.0
    outputs = {_plain(said.lines[sample_id].get("output", "")) for said in present}
    return variance + 0.01 * len(outputs)


def _item(sample_id: str, said: Mapping[str, Sequence[_Said]], expert: _Said, standard: _Standard) -> Item:
    answers = {name: tuple(_answer(column, sample_id, standard) for column in each) for name, each in said.items()}
    everyone = [expert, *(column for each in said.values() for column in each)]
    line = next(column.lines[sample_id] for column in everyone if sample_id in column.lines)
    return Item(
        sample_id=sample_id,
        prompt=_clip(line.get("prompt", "")),
        references=tuple(_clip(text) for text in list(dict.fromkeys(map(str, line.get("references", ()))))[:5]),
        media=tuple(media for media in line.get("media") or () if isinstance(media, Mapping)),
        expert=_answer(expert, sample_id, standard),
        rows=tuple((name, each) for name, each in answers.items() if any(each)),
    )


def _answer(said: _Said, sample_id: str, standard: _Standard) -> Answer | None:
    line = said.lines.get(sample_id)
    if line is None:
        return None
    text, score = _clip(line.get("output", "")), said.scores[sample_id]
    if score is None:
        return Answer(text, "unknown")
    share = standard.share(score)
    mark: Mark = "right" if share >= 0.995 else "wrong" if share < 0.1 else "partial"
    printed = score / standard.level * standard.printed
    note = f"{printed:.0f}" if standard.graded else f"{printed:.2f}" if mark == "partial" else ""
    return Answer(text, mark, note, share)


def _clip(text: object) -> str:
    words = str(text)
    return words if len(words) <= LONGEST else words[: LONGEST - 1] + "…"
