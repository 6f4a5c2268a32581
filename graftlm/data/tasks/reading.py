"""What every data set needs: read annotations, find media, and say plainly what is missing."""

import csv
import functools
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ParamSpec

from graftlm.core.errors import DataError
from graftlm.data import media
from graftlm.data.types import Kind, Media, Modality, Sample, Task

__all__ = ["CAPTION_PROMPT", "data_set", "inside", "read_csv", "read_json", "read_lines", "task", "verify"]

CAPTION_PROMPT = "describe this ."
"""The instruction of captioning when the data set has none."""

log = logging.getLogger(__name__)

Settings = ParamSpec("Settings")


def data_set(load: Callable[Settings, Task]) -> Callable[Settings, Task]:
    """Wraps a data set's ``load``: an annotation of another form than expected is a `DataError` that says where."""

    @functools.wraps(load)
    def named(*args: Settings.args, **kwargs: Settings.kwargs) -> Task:
        try:
            return load(*args, **kwargs)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise DataError(
                f"{args[0]}: an annotation is not of the form that {load.__module__} reads ({error!r}). Its documentation says "
                f"which files and fields are expected; restore the annotation files."
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
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}). Restore the annotation file.") from None


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, without empty ones and ``#`` comments."""
    return [line for line in _text(path).splitlines() if line.strip() and not line.startswith("#")]


def read_csv(path: Path, columns: Sequence[str], *, header: bool = True) -> list[dict[str, str]]:
    """The rows of a CSV file as dicts.

    Args:
        columns: names that must be there; of a file without header, all names in order.

    Raises:
        DataError: missing, or a column is not there.
    """
    rows = list(csv.reader(_text(path).splitlines()))
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
        DataError: an annotation names a file outside of the data set's folder.
    """
    relative = PurePosixPath(*parts)
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
) -> Task:
    """A task of train, val and test samples whose media exist.

    Raises:
        DataError: media are missing (unless ``skip_bad``: then their samples are left out and counted), or nothing is left.
    """
    kept, skipped = [], 0
    for samples in splits:
        every = tuple(samples)
        every = every if limit is None else every[:limit]
        missing = {item.source for sample in every for item in sample.media if not item.source.is_file()}
        whole = tuple(s for s in every if not any(item.source in missing for item in s.media))
        if missing and not skip_bad:
            raise DataError(
                f"{name}: {len(missing)} media files of {len(every) - len(whole)} samples (of {len(every)}) are missing, first "
                f"{min(missing)}. Restore them, or go on without their samples with skip_bad=true."
            )
        skipped += len(every) - len(whole)
        kept.append(whole)
    if not any(kept):
        raise DataError(
            f"{name}: no sample in {root}{f' ({skipped} skipped)' if skipped else ''}. Check the annotation files."
        )
    if skipped:
        log.warning("%s: %d samples skipped because their media are missing or corrupt", name, skipped)
    source = f"{root.name}, {sum(map(len, kept))} samples" + (f", {skipped} skipped" if skipped else "")
    return Task(name, kind, modalities, metric, kept[0], kept[1], kept[2], max_new_tokens, source)


def verify(found: Task, *, skip_bad: bool = False) -> Task:
    """Decode every media file once. `task` only looks whether files exist: decoding a large data set takes long.

    Raises:
        DataError: files are corrupt (unless ``skip_bad``: then their samples are left out and counted).
    """
    errors: dict[Path, str] = {}
    good: set[Path] = set()
    for item in (item for s in (*found.train, *found.val, *found.test) for item in s.media):
        if item.source not in errors and item.source not in good and item.modality in READERS:
            try:
                READERS[item.modality](item.source)
                good.add(item.source)
            except DataError as error:
                errors[item.source] = str(error)
    if errors and not skip_bad:
        first = min(errors)
        raise DataError(f"{found.name}: {len(errors)} media files are corrupt, first: {errors[first]}")

    def whole(samples: Sequence[Sample]) -> tuple[Sample, ...]:
        return tuple(s for s in samples if not any(item.source in errors for item in s.media))

    splits = [whole(samples) for samples in (found.train, found.val, found.test)]
    skipped = sum(map(len, (found.train, found.val, found.test))) - sum(map(len, splits))
    if not skipped:
        return found
    log.warning("%s: %d samples skipped because their media are corrupt", found.name, skipped)
    source = f"{found.source}, {skipped} corrupt skipped"
    return Task(
        found.name,
        found.kind,
        found.modalities,
        found.metric,
        splits[0],
        splits[1],
        splits[2],
        found.max_new_tokens,
        source,
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: this annotation file is missing. Check the data set's folder.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Restore the annotation file.") from None


def one(modality: Modality, source: Path) -> tuple[Media, ...]:
    """A sample's media when it has one item."""
    return (Media(modality, source),)
