"""Validation sets of a user's own: one file of questions with answers, in the formats that fine-tunes are trained on.

A line of JSON, or an entry of a JSON list, is one of

    {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}       as LLaVA has it
    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}   as chats have it
    {"prompt": ..., "answer": ...}, or "answers": [...] where several are right

with an ``id`` if it likes. Of a conversation only the first question and its answer count; a system message is refused,
because what a model is asked would not be what is in the file.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from graftlm.core.errors import ConfigError, DataError, did_you_mean
from graftlm.data.types import Sample, Task
from graftlm.evaluation.metrics import METRICS

__all__ = ["LIKELIHOOD", "check_metric", "read_sets"]

LIKELIHOOD = "likelihood"
"""A measure beside those of answers: how probable the model finds the reference."""

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Fields of an entry that ask for more than text."""


def check_metric(metric: str) -> str:
    """The name of a metric of answers, or `LIKELIHOOD`.

    Raises:
        ConfigError: no such metric.
    """
    known = [LIKELIHOOD, *METRICS.table()]
    if metric not in known:
        raise ConfigError(f"--metric {metric}: no such metric; {did_you_mean(metric, known)}")
    return metric


def read_sets(paths: Sequence[Path], metric: str, *, max_new_tokens: int = 64, taken: Sequence[str] = ()) -> list[Task]:
    """One task per file, named after it; samples are its val split.

    Args:
        taken: names that other sets have.

    Raises:
        DataError: a file is missing, of another form, or holds no sample.
    """
    tasks: list[Task] = []
    for path in paths:
        names = {*taken, *(task.name for task in tasks)}
        name = path.stem if path.stem not in names else f"{path.resolve().parent.name}-{path.stem}"
        while name in names:
            name += "-2"
        samples = _read(path / "val.json" if path.is_dir() else path, name)
        tasks.append(
            Task(
                name,
                "instruction",
                (),
                metric,
                (),
                tuple(samples),
                (),
                max_new_tokens,
                f"{path}, {len(samples)} samples",
            )
        )
    return tasks


def _read(path: Path, task: str) -> list[Sample]:
    entries = _entries(path)
    samples = [_sample(path, f"entry {number}", entry, task, number) for number, entry in enumerate(entries, start=1)]
    if not samples:
        raise DataError(f"{path}: no entries; at least one question with its answer is expected.")
    twice = {sample.id for sample in samples}
    if len(twice) < len(samples):  # chats are often numbered anew in every part
        samples = [
            Sample(f"{i}-{each.id}", task, (), each.prompt, each.answers) for i, each in enumerate(samples, start=1)
        ]
    return samples


def _entries(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file; a validation set in JSON or JSON lines is expected. Check the path."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}). A text file of JSON is expected.") from None
    if text.lstrip().startswith("["):
        return cast("list[Any]", _parse(path, text, "the file"))
    lines = enumerate(text.split("\n"), start=1)
    return [_parse(path, line, f"line {number}") for number, line in lines if line.strip()]


def _parse(path: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, {where}: not JSON ({error}). JSON lines or one JSON list are expected.") from None


def _sample(path: Path, where: str, entry: Any, task: str, number: int) -> Sample:
    if not isinstance(entry, dict):
        raise DataError(f"{path}, {where}: {entry!r:.80}; an object is expected.")
    if media := [name for name in MEDIA if entry.get(name)]:
        raise DataError(
            f"{path}, {where}: has '{media[0]}', but sets from files are of text alone. Leave such entries out; models with "
            f"senses are measured as checkpoints of graftlm, with --data and the names of data sets."
        )
    prompt, answers = _turns(path, where, entry)
    if not prompt.strip() or not answers or not all(isinstance(text, str) and text.strip() for text in answers):
        raise DataError(f"{path}, {where}: an empty question or answer; text is expected in both.")
    return Sample(str(entry.get("id", number)), task, (), prompt, tuple(answers))


def _turns(path: Path, where: str, entry: Mapping[str, Any]) -> tuple[str, list[str]]:
    for key, who, what, names in (
        ("conversations", "from", "value", (("human", "user"), ("gpt", "assistant"))),
        ("messages", "role", "content", (("user", "human"), ("assistant", "gpt"))),
    ):
        if key not in entry:
            continue
        turns = entry[key]
        if not isinstance(turns, list) or not all(
            isinstance(each, dict) and isinstance(each.get(what), str) for each in turns
        ):
            raise DataError(f"{path}, {where}: '{key}' is no list of turns with '{who}' and a text in '{what}'.")
        speakers = [each.get(who) for each in turns[:2]]
        if len(turns) < 2 or speakers[0] not in names[0] or speakers[1] not in names[1]:
            raise DataError(
                f"{path}, {where}: '{key}' begins with {speakers}; turns of '{names[0][0]}' and '{names[1][0]}' are expected."
            )
        return turns[0][what], [turns[1][what]]
    answers = entry.get("answers", entry.get("answer"))
    if not isinstance(entry.get("prompt"), str) or not isinstance(answers, str | list):
        raise DataError(
            f"{path}, {where}: fields {', '.join(entry) or 'none'}; 'conversations', 'messages', or 'prompt' with 'answer' are "
            f"expected."
        )
    return entry["prompt"], [answers] if isinstance(answers, str) else list(answers)
