"""Where merged weights are written: safetensors files of known size, filled in any order, continued after a crash.

A folder is built under the name ``.<name>.partial`` beside its final place. What is finished stands in ``.<name>.journal``,
and is on the disk before it does; the same job continues from there, another job starts again.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftlm.core.errors import MergeError, RunError
from graftlm.core.files import MARKER, append_jsonl, is_complete, locked, milestone, read_jsonl, sync, write_json
from graftlm.merging.headers import BITS

__all__ = ["Planned", "Shards", "WorkFolder", "finish_renamed", "is_renamed", "shard_name", "work_folder"]

SHARD_BYTES = 5 * 10**9
"""The most bytes of one file, unless one tensor is larger."""


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: dtype as in safetensors ("BF16")."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of its numbers."""
        return BITS[self.dtype] * math.prod(self.shape) // 8


def shard_name(number: int, count: int) -> str:
    """File name of a shard, as Hugging Face has it."""
    return "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


class Shards:
    """Safetensors files, laid out in advance.

    Args:
        folder: where the files go.
        tensors: what they hold, in this order.
        name: file name of one, given its number from 1 and how many there are.
        limit: the most bytes of one file; `SHARD_BYTES` by default.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Sequence[Planned],
        name: Callable[[int, int], str],
        *,
        limit: int | None = None,
    ) -> None:
        limit = limit or SHARD_BYTES
        groups: list[list[Planned]] = [[]]
        for tensor in tensors:
            if groups[-1] and sum(each.bytes for each in groups[-1]) + tensor.bytes > limit:
                groups.append([])
            groups[-1].append(tensor)
        self.files = [folder / name(number, len(groups)) for number in range(1, len(groups) + 1)]
        self.bytes = sum(tensor.bytes for tensor in tensors)
        self.weight_map: dict[str, str] = {}
        self._places: dict[str, tuple[int, int]] = {}
        self._open: list[int] = []
        self._layouts = []
        for index, (file, group) in enumerate(zip(self.files, groups, strict=True)):
            header, size = _header(group)
            start = len(header)
            for tensor in group:
                self.weight_map[tensor.name] = file.name
                self._places[tensor.name] = (index, start)
                start += tensor.bytes
            self._layouts.append((header, size))

    def open(self) -> None:
        """Make the files, or go on with those that are there; their space is taken at once.

        Raises:
            RunError: there is no space for them.
        """
        for file, (header, size) in zip(self.files, self._layouts, strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
            self._open.append(descriptor)
            try:
                os.posix_fallocate(descriptor, 0, size)
            except OSError as error:
                free = shutil.disk_usage(file.parent).free
                raise RunError(
                    f"{file}: no space for {size:,} bytes ({error.strerror}; {free:,} are free). Make space and run the same "
                    f"command again: what was finished is kept."
                ) from None
            os.pwrite(descriptor, header, 0)

    def intact(self) -> bool:
        """Whether every file is there with its size."""
        return all(
            file.is_file() and file.stat().st_size == size
            for file, (_, size) in zip(self.files, self._layouts, strict=True)
        )

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Write bytes of a tensor from ``start`` within it."""
        index, offset = self._places[name]
        done = 0
        while done < len(data):
            done += os.pwrite(self._open[index], data[done:], offset + start + done)

    def sync(self) -> None:
        """What was written is on the disk."""
        for descriptor in self._open:
            os.fdatasync(descriptor)

    def close(self) -> None:
        """Give the files back."""
        for descriptor in self._open:
            os.close(descriptor)
        self._open = []


def _header(tensors: Sequence[Planned]) -> tuple[bytes, int]:
    """The head of a safetensors file, and the size of the file."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.bytes],
        }
        end += tensor.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + end


class WorkFolder:
    """A folder under construction, and a journal of what is finished."""

    def __init__(self, path: Path, journal: Path, job: str) -> None:
        self.path = path
        self._journal = journal
        self._job = job

    def restart(self) -> None:
        """Begin with nothing. The journal goes first: never does it speak of files that are gone."""
        self._journal.unlink(missing_ok=True)
        if self._journal.parent.is_dir():
            sync(self._journal.parent)
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        self.note(job=self._job)

    def resume(self, shards: "Shards") -> None:
        """Go on with these shards if all of them are whole, else begin again; what else is there is of a crash, and goes."""
        if any("tensors" in entry for entry in self.entries()) and not shards.intact():
            self.restart()
        known = set(shards.files)
        for file in [path for path in self.path.rglob("*") if path.is_file() and path not in known]:
            file.unlink()

    def entries(self) -> list[Mapping[str, Any]]:
        """The journal."""
        return read_jsonl(self._journal)

    def note(self, **values: Any) -> None:
        """Add a line; it is on the disk when this returns."""
        append_jsonl(self._journal, values)
        milestone("merge.noted")

    def write_index(self, shards: Shards) -> None:
        """The index that Hugging Face expects beside several files."""
        if len(shards.files) > 1:
            index = {"metadata": {"total_size": shards.bytes}, "weight_map": shards.weight_map}
            write_json(shards.files[0].parent / "model.safetensors.index.json", index)


def is_renamed(out: Path) -> bool:
    """Whether a crash came after the folder got its name, and before its journal was deleted."""
    return is_complete(out) and _beside(out, "journal").is_file()


def finish_renamed(out: Path, job: str) -> bool:
    """Clean up after such a crash; whether ``out`` is what this job makes."""
    journal, lock = _beside(out, "journal"), _beside(out, "lock")
    with locked(lock, busy=f"{out}: another process builds this folder. Wait for it, or stop it."):
        if not is_renamed(out) or read_jsonl(journal)[0].get("job") != job:
            return False
        journal.unlink()
    lock.unlink(missing_ok=True)
    return True


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f".{out.name}.{what}")


@contextlib.contextmanager
def work_folder(out: Path, job: str) -> Iterator[WorkFolder]:
    """Build a folder; it appears under its name when the block ends without an error.

    Args:
        out: the folder to make.
        job: digest of everything that decides its content: what another job left half-done is deleted.

    Raises:
        MergeError: ``out`` holds something.
        RunError: another process builds it.
    """
    path, journal, lock = (_beside(out, what) for what in ("partial", "journal", "lock"))
    with locked(lock, busy=f"{out}: another process builds this folder. Wait for it, or stop it."):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise MergeError(
                f"{out}: holds something; a new folder is expected. Name another --out, or delete this one."
            )
        work = WorkFolder(path, journal, job)
        entries = work.entries()
        if not path.is_dir() or not entries or entries[0].get("job") != job:
            work.restart()
        yield work
        (path / MARKER).touch()
        for file in sorted(path.rglob("*")):
            sync(file)
        sync(path)
        milestone("merge.written")
        if out.is_dir():
            out.rmdir()
        os.rename(path, out)
        milestone("merge.renamed")
        sync(out.parent)
        journal.unlink(missing_ok=True)
    lock.unlink(missing_ok=True)
