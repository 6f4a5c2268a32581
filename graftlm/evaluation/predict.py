"""Ask a model every question of a task, once, and write the answers down as they come.

The order of asking is fixed (by length of the prompt, then id), and so are the batches: a run that is cut short and
started again asks the rest in the same batches, and ends with the same file, byte by byte.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from graftlm.core.errors import DataError, RunError
from graftlm.core.files import append_jsonl, milestone, read_jsonl, write_text
from graftlm.data.types import Sample, Task

__all__ = ["Answering", "Prediction", "Progress", "predict", "read_predictions"]

Progress = Callable[[str, int, int], None]
"""Called with the task's name, items done and items in all."""


class Answering(Protocol):
    """What a model must be able to do here."""

    def generate(self, samples: Sequence[Sample], *, max_new_tokens: int) -> list[str]:
        """One text per sample."""
        ...


@dataclass(frozen=True)
class Prediction:
    """One line of a predictions file.

    Attributes:
        media: modality and path of every item, so that a report can show them.
    """

    sample_id: str
    task: str
    prompt: str
    output: str
    references: tuple[str, ...]
    media: tuple[tuple[str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As a line of JSON."""
        return asdict(self) | {"media": [{"modality": name, "source": source} for name, source in self.media]}

    @classmethod
    def from_dict(cls, line: dict[str, Any]) -> "Prediction":
        """From `to_dict`."""
        media = tuple((item["modality"], item["source"]) for item in line["media"])
        return cls(line["sample_id"], line["task"], line["prompt"], line["output"], tuple(line["references"]), media)


def predict(
    model: Answering,
    task: Task,
    samples: Sequence[Sample],
    path: Path,
    *,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> list[Prediction]:
    """Answer the samples; what the file already holds in whole batches is kept.

    Args:
        path: the JSONL file, in the order of asking.

    Raises:
        RunError: the file holds answers to other questions.
        DataError: two samples have one id.
    """
    _expect_unique(task, samples)
    order = sorted(samples, key=lambda sample: (len(sample.prompt), sample.id))
    done = read_predictions(path)
    _check(done, order, path)
    kept = len(done) if len(done) == len(order) else len(done) - len(done) % batch_size
    if kept < len(done):
        write_text(path, "".join(json.dumps(p.to_dict(), ensure_ascii=False) + "\n" for p in done[:kept]))
    for start in range(kept, len(order), batch_size):
        batch = order[start : start + batch_size]
        outputs = model.generate(batch, max_new_tokens=task.max_new_tokens)
        lines = [_line(task, sample, output) for sample, output in zip(batch, outputs, strict=True)]
        append_jsonl(path, *(line.to_dict() for line in lines))
        milestone("batch.predicted")
        if progress:
            progress(task.name, start + len(batch), len(order))
    return read_predictions(path)


def read_predictions(path: Path) -> list[Prediction]:
    """The whole lines of a predictions file; a missing file is empty.

    Raises:
        RunError: a line is not a prediction.
    """
    try:
        return [Prediction.from_dict(line) for line in read_jsonl(path)]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path}: a line is no prediction ({error!r}). The file was damaged; delete it and run the same command again."
        ) from None


def _line(task: Task, sample: Sample, output: str) -> Prediction:
    media = tuple((item.modality, str(item.source)) for item in sample.media)
    return Prediction(sample.id, task.name, sample.prompt, output, sample.answers, media)


def _expect_unique(task: Task, samples: Sequence[Sample]) -> None:
    twice = [name for name, count in Counter(sample.id for sample in samples).items() if count > 1]
    if twice:
        raise DataError(
            f"{task.name}: {len(twice)} sample ids are used more than once (first: '{twice[0]}'); scores are kept by id, so each "
            f"must be unique within its split. Correct the annotations or their reader."
        )


def _check(done: Sequence[Prediction], order: Sequence[Sample], path: Path) -> None:
    # Of media the names only: a data set may move, but blind answers must not pass for sighted ones.
    asked = [
        (line.sample_id, line.prompt, line.references, [(name, Path(source).name) for name, source in line.media])
        for line in done
    ]
    wanted = [
        (sample.id, sample.prompt, sample.answers, [(item.modality, item.source.name) for item in sample.media])
        for sample in order[: len(done)]
    ]
    if len(done) > len(order) or asked != wanted:
        where = next((i for i, (a, b) in enumerate(zip(asked, wanted, strict=False)) if a != b), len(order))
        raise RunError(
            f"{path}, line {where + 1}: an answer to another question than the {len(order)} that are asked now. The data or "
            f"the file changed; delete the file and run the same command again."
        )
