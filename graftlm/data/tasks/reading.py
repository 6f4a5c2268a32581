"""What every data set needs: read annotations, find media, and say plainly what is missing."""

import csv
import dataclasses
import functools
import hashlib
import io
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ParamSpec

from graftlm.core.errors import DataError
from graftlm.data import media
from graftlm.data.types import Kind, Media, Modality, Sample, Task

__all__ = [
    "CAPTION_PROMPT",
    "data_set",
    "divide",
    "draw",
    "hold_out",
    "inside",
    "one",
    "read_csv",
    "read_json",
    "read_lines",
    "task",
    "verify",
]

CAPTION_PROMPT = "describe this ."
"""The instruction of captioning when the data set has none."""

log = logging.getLogger(__name__)

Settings = ParamSpec("Settings")

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

LONGEST_NAME = 255
"""Bytes in the name of a file: what file systems take."""


def data_set(load: Callable[Settings, Task]) -> Callable[Settings, Task]:
    """Wraps a data set's ``load``: an annotation of another form than expected is a `DataError` that says where."""

    @functools.wraps(load)
    def named(*args: Settings.args, **kwargs: Settings.kwargs) -> Task:
        try:
            return load(*args, **kwargs)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, OSError) as error:
            raise DataError(
                f"{args[0] if args else kwargs.get('root')}: an annotation is not of the form that {load.__module__} reads "
                f"({error!r}). Its documentation says which files and fields are expected; restore the annotation files."
            ) from error

    return named


READERS: dict[Modality, Callable[[Path], Any]] = {
    "image": media.load_image,
    "video": lambda path: media.load_frames(path, 1),
    "audio": lambda path: media.load_audio(path, 8000),
    "point": media.load_points,
}


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: missing, or not JSON.
    """
    text = _text(path)
    try:
        content = json.loads(text)
        if SURROGATE.search(text):  # half of a pair is no text: no tokenizer takes it
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}). Restore the annotation file.") from None
    return content


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, without empty ones and ``#`` comments."""
    return [line.rstrip("\r") for line in _text(path).split("\n") if line.strip() and not line.startswith("#")]


def read_csv(path: Path, columns: Sequence[str], *, header: bool = True) -> list[dict[str, str]]:
    """The rows of a CSV file as dicts.

    Args:
        columns: names that must be there; of a file without header, all names in order.

    Raises:
        DataError: missing, or a column is not there.
    """
    try:
        rows = list(csv.reader(io.StringIO(_text(path), newline="")))
    except csv.Error as error:
        raise DataError(f"{path}: not CSV ({error}). Restore the annotation file.") from None
    names = rows[0] if header and rows else list(columns)
    if missing := [name for name in columns if name not in names]:
        raise DataError(f"{path}: columns {missing} are missing; it has {names}. Restore the annotation file.")
    body = rows[1:] if header else rows
    if bad := next((i for i, row in enumerate(body, 1 + header) if row and len(row) != len(names)), 0):
        raise DataError(
            f"{path}, row {bad}: {len(body[bad - 1 - header])} fields, but {len(names)} columns. Restore the file."
        )
    return [dict(zip(names, row, strict=True)) for row in body if row]


def inside(root: Path, *parts: str) -> Path:
    """A file of the data set.

    Raises:
        DataError: an annotation names a file outside of the data set's folder, or by no name that a file can have.
    """
    relative = PurePosixPath(*parts)
    if any("\0" in part or len(part.encode()) > LONGEST_NAME for part in relative.parts):
        raise DataError(
            f"{root}: an annotation names {str(relative)[:80]!a}, which is no name of a file. A path of parts of at most "
            f"{LONGEST_NAME} bytes is expected; restore the annotation files."
        )
    if relative.is_absolute() or ".." in relative.parts:
        raise DataError(
            f"{root}: an annotation names '{relative}', outside of the data set. A path inside it is expected."
        )
    return root / relative


def task(
    name: str,
    kind: Kind,
    modalities: tuple[Modality, ...],
    metric: str,
    splits: Sequence[Iterable[Sample]],
    *,
    root: Path,
    skip_bad: bool,
    limit: int | None,
    max_new_tokens: int = 32,
    train_size: int | None = None,
    test_size: int | None = None,
) -> Task:
    """A task of train, val and test samples whose media exist.

    Args:
        limit: the first samples of every split.
        train_size: most training samples, drawn at random, the same on every machine.
        test_size: most test samples, likewise. Of bad files, samples are left out before drawing.

    Raises:
        DataError: media are missing (unless ``skip_bad``: then their samples are left out and counted), a sample has no
            text, two have one id, or nothing is left to measure.
    """
    kept, skipped = [], 0
    for samples, size in zip(splits, (train_size, None, test_size), strict=True):
        every = tuple(samples)
        _expect_text(name, every)
        if not skip_bad:
            every = draw(every, size)[:limit]
        missing = {item.source for sample in every for item in sample.media if not item.source.is_file()}
        whole = tuple(s for s in every if not any(item.source in missing for item in s.media))
        if missing and not skip_bad:
            raise DataError(
                f"{name}: {len(missing)} media files of {len(every) - len(whole)} samples (of {len(every)}) are missing, first "
                f"{min(missing)}. Restore them, or go on without their samples with skip_bad=true."
            )
        skipped += len(every) - len(whole)
        kept.append(draw(whole, size)[:limit])
    _expect_test(name, root, kept, skipped)
    if skipped:
        log.warning("%s: %d samples skipped because their media are missing or corrupt", name, skipped)
    source = f"{root.name}, {sum(map(len, kept))} samples" + (f", {skipped} skipped" if skipped else "")
    return Task(name, kind, modalities, metric, kept[0], kept[1], kept[2], max_new_tokens, source)


def draw(samples: Sequence[Sample], count: int | None) -> tuple[Sample, ...]:
    """At most ``count`` samples, chosen by a hash of their ids, in the order they had."""
    if count is None or len(samples) <= count:
        return tuple(samples)
    chosen = sorted(range(len(samples)), key=lambda i: _rank(samples[i].id))[:count]
    return tuple(samples[i] for i in sorted(chosen))


def hold_out(samples: Sequence[Sample], count: int | None) -> tuple[list[Sample], list[Sample]]:
    """Val and test, of ``count`` media each (None: half), from one public split, where a test split is not public.

    All samples about one file go to one side.
    """
    files = sorted({str(s.media[0].source.name) for s in samples}, key=_rank)
    count = count if count is not None and 2 * count <= len(files) else (len(files) + 1) // 2
    sides = {name: i // count for i, name in enumerate(files[: 2 * count])}
    parts = [[s for s in samples if sides.get(s.media[0].source.name) == side] for side in (0, 1)]
    return parts[1], parts[0]


def divide(names: Sequence[str], train: int | None, test: int | None) -> list[list[str]]:
    """Train, val and test of one list of names, by a hash of each: at most ``test`` (and a tenth) for val and for test."""
    ranked = sorted(names, key=_rank)
    size = min(len(ranked) // 10, len(ranked) if test is None else test)
    return [ranked[2 * size :][:train], ranked[size : 2 * size], ranked[:size]]


def _rank(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _expect_text(name: str, samples: Sequence[Sample]) -> None:
    for sample in samples:
        texts = (sample.prompt, *sample.answers)
        if not sample.answers or not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"{name}: sample {sample.id} has prompt {sample.prompt!r} and answers {sample.answers!r}. Text and at "
                f"least one answer are expected; restore the annotation files."
            )
    if len({sample.id for sample in samples}) != len(samples):
        twice = Counter(sample.id for sample in samples).most_common(1)[0][0]
        raise DataError(f"{name}: two samples with the id '{twice}'. Restore the annotation files.")


def _expect_test(name: str, root: Path | str, splits: Sequence[Sequence[Sample]], skipped: int) -> None:
    if not splits[2]:
        what = "test sample" if any(splits) else "sample"
        raise DataError(
            f"{name}: no {what} in {root}{f' ({skipped} skipped)' if skipped else ''}. Check the annotation files."
        )


def verify(found: Task, *, skip_bad: bool = False, known: dict[Path, str] | None = None) -> Task:
    """Decode every media file once. `task` only looks whether files exist: decoding a large data set takes long.

    Args:
        known: what earlier calls found wrong with files ("" is nothing); those are not decoded again, new ones are added.

    Raises:
        DataError: files are corrupt (unless ``skip_bad``: then their samples are left out and counted).
    """
    known = {} if known is None else known
    items = {item for s in (*found.train, *found.val, *found.test) for item in s.media if item.modality in READERS}
    for item in sorted(items, key=lambda item: item.source):
        if item.source not in known:
            known[item.source] = _damage(item)
    errors = {item.source: known[item.source] for item in items if known[item.source]}
    if errors and not skip_bad:
        raise DataError(f"{found.name}: {len(errors)} media files are corrupt, first: {errors[min(errors)]}")

    def whole(samples: Sequence[Sample]) -> tuple[Sample, ...]:
        return tuple(s for s in samples if not any(item.source in errors for item in s.media))

    splits = [whole(samples) for samples in (found.train, found.val, found.test)]
    skipped = sum(map(len, (found.train, found.val, found.test))) - sum(map(len, splits))
    if not skipped:
        return found
    _expect_test(found.name, found.source, splits, skipped)
    log.warning("%s: %d samples skipped because their media are corrupt", found.name, skipped)
    source = f"{found.source}, {skipped} corrupt skipped"
    return dataclasses.replace(found, train=splits[0], val=splits[1], test=splits[2], source=source)


def _damage(item: Media) -> str:
    try:
        READERS[item.modality](item.source)
    except DataError as error:
        return str(error)
    return ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: this annotation file is missing. Check the data set's folder.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Restore the annotation file.") from None


def one(modality: Modality, source: Path) -> tuple[Media, ...]:
    """A sample's media when it has one item."""
    return (Media(modality, source),)
