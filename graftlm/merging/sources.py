"""Where weights are read from, a few rows at a time: model folders, and updates on top of them.

A source gives any run of whole rows of a tensor in raw form, ``uint16`` for bfloat16 or ``float32``, into a buffer that is
there already. Files are read by position, never mapped: memory stays what the buffers take, and a file that is cut while
it is read is an error, not a dead process.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graftlm.core.errors import CheckpointError, MergeError
from graftlm.merging.headers import FLOATS, TensorInfo

__all__ = ["Factors", "FileSource", "FileState", "LowRank", "Raw", "Source", "Update", "UpdatedSource"]

Raw = NDArray[Any]
"""Weights as read: uint16 holds bfloat16, float32 is itself."""

LowRank = tuple[NDArray[np.float32], NDArray[np.float32], float]
"""A (R, in), B (out, R) and the scale of scale · B A."""

KEPT_FACTORS = 8
"""Factors of low-rank updates that a source keeps in memory."""

PRODUCT_ROWS = 128
"""Rows of a low-rank update that are computed at once."""


@dataclass(frozen=True)
class FileState:
    """What says that a file is still the one that was opened: size, time of change, inode."""

    size: int
    modified: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> "FileState":
        """The state now."""
        stat = path.stat()
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ino)


class Source:
    """Weights by name. Sources are used from several threads."""

    def __init__(self) -> None:
        self.opened: dict[Path, FileState] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        raise NotImplementedError

    def form(self, name: str) -> type[np.generic]:
        """The raw form of a tensor: ``numpy.uint16`` (bfloat16) or ``numpy.float32``."""
        raise NotImplementedError

    def read(self, name: str, rows: slice, out: Raw) -> None:
        """Fill ``out``, flat and of either form, with rows of a tensor; a tensor of rank 0 has one row."""
        raise NotImplementedError

    def ahead(self, name: str, rows: slice) -> None:
        """These rows are needed soon."""

    def changes(self, name: str) -> bool:
        """Whether the tensor may differ from the base's; False is certain."""
        return True

    def changed(self) -> list[Path]:
        """Files that are not what they were when opened."""
        return [path for path, state in self.opened.items() if not path.exists() or FileState.of(path) != state]

    def close(self) -> None:
        """Give the files back."""


class FileSource(Source):
    """Tensors of safetensors files.

    Raises:
        MergeError: a tensor is asked for that the files lack, or that holds no floating-point numbers.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
        super().__init__()
        self.folder = folder
        self.tensors = tensors
        self._files: dict[Path, int] = {}
        for path in dict.fromkeys(info.file for info in tensors.values()):
            self.opened[path] = FileState.of(path)
            self._files[path] = os.open(path, os.O_RDONLY)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Source.shape`."""
        return self._info(name).shape

    def form(self, name: str) -> type[np.generic]:
        """See `Source.form`; float16 is read as float32."""
        return np.uint16 if self._info(name).dtype == "BF16" else np.float32

    def read(self, name: str, rows: slice, out: Raw) -> None:
        """See `Source.read`."""
        info = self._info(name)
        start, size = _extent(info, rows)
        if (info.dtype == "BF16" and out.dtype == np.uint16) or (info.dtype == "F32" and out.dtype == np.float32):
            self._fill(info, start, out.data.cast("B"))
            return
        if out.dtype != np.float32:
            raise MergeError(
                f"{info.file}: '{name}' is {info.dtype} and was asked for as bfloat16; float32 is expected."
            )
        stored = np.empty(size // 2, np.float16 if info.dtype == "F16" else np.uint16)
        self._fill(info, start, stored.data.cast("B"))
        if info.dtype == "F16":
            out[:] = stored
        else:
            np.left_shift(stored, 16, out=out.view(np.uint32), dtype=np.uint32)

    def ahead(self, name: str, rows: slice) -> None:
        """See `Source.ahead`."""
        info = self._info(name)
        start, size = _extent(info, rows)
        os.posix_fadvise(self._files[info.file], info.start + start, size, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """See `Source.close`."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise MergeError(f"{self.folder}: no tensor '{name}'; the base has one. These are other models.")
        if info.dtype not in FLOATS:
            raise MergeError(f"{info.file}: '{name}' is {info.dtype}; one of {', '.join(FLOATS)} is expected.")
        return info

    def _fill(self, info: TensorInfo, start: int, buffer: memoryview) -> None:
        done, descriptor = 0, self._files[info.file]
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], info.start + start + done)
            if count == 0:
                raise CheckpointError(
                    f"{info.file}: ends within '{info.name}', which needs {info.bytes} bytes from {info.start}. The file was "
                    f"cut while it was read; use another copy."
                )
            done += count


@dataclass(frozen=True)
class Factors:
    """A low-rank update, scale · B A, or its transpose; A (R, in) and B (out, R) are stored tensors."""

    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool = False


Update = Factors | TensorInfo
"""A change to one tensor: factors to add, or a stored tensor to add or to put in its place."""


class UpdatedSource(Source):
    """A base with updates: a PEFT adapter on its base, or a graftlm checkpoint's ledger.

    Args:
        base: what is updated.
        updates: per tensor, in order: ("add" or "put", update).
        files: reads the stored tensors among the updates.
    """

    def __init__(
        self, base: Source, updates: Mapping[str, Sequence[tuple[str, Update]]], files: Sequence[FileSource]
    ) -> None:
        super().__init__()
        self._base = base
        self._updates = updates
        self._lock = threading.Lock()
        self._kept: dict[tuple[Path, str], NDArray[np.float32]] = {}
        self._files = {path: source for source in files for path in source.opened}
        self.opened = {path: state for source in (base, *files) for path, state in source.opened.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Source.shape`."""
        return self._base.shape(name)

    def changes(self, name: str) -> bool:
        """See `Source.changes`."""
        return name in self._updates

    def form(self, name: str) -> type[np.generic]:
        """See `Source.form`; what was updated is float32."""
        return np.float32 if name in self._updates else self._base.form(name)

    def read(self, name: str, rows: slice, out: Raw) -> None:
        """See `Source.read`."""
        updates = self._updates.get(name, ())
        if not updates:
            self._base.read(name, rows, out)
            return
        first = max((i for i, (how, _) in enumerate(updates) if how == "put"), default=-1)
        if first < 0:
            self._base.read(name, rows, out)
        for how, update in updates[max(first, 0) :]:
            if isinstance(update, Factors):
                out += self._product(update, rows).reshape(-1)
            elif how == "put":
                self._stored(update, rows, out)
            else:
                change = np.empty_like(out)
                self._stored(update, rows, change)
                out += change

    def factors(self, name: str) -> list[LowRank] | None:
        """The updates of a tensor that are all of low rank, as (A, B, scale) with scale · B A in the tensor's own orientation.

        Returns:
            None if something else changes the tensor; an empty list if nothing does.
        """
        found: list[LowRank] = []
        for how, update in self._updates.get(name, ()):
            if how != "add" or not isinstance(update, Factors):
                return None
            a, b = self._whole(update.a), self._whole(update.b)
            found.append((b.T, a.T, update.scale) if update.transposed else (a, b, update.scale))
        return found

    def ahead(self, name: str, rows: slice) -> None:
        """See `Source.ahead`."""
        updates = self._updates.get(name, ())
        if not any(how == "put" for how, _ in updates):
            self._base.ahead(name, rows)
        for _, update in updates:
            if isinstance(update, TensorInfo):
                self._files[update.file].ahead(update.name, rows)

    def close(self) -> None:
        """See `Source.close`."""
        for source in (self._base, *self._files.values()):
            source.close()

    def _product(self, update: Factors, rows: slice) -> NDArray[np.float32]:
        """Rows of scale · B A. The factor that every row needs stays in memory while a tensor is read."""
        whole, part = (update.b, update.a) if update.transposed else (update.a, update.b)
        right = self._whole(whole)
        if update.transposed:
            return np.float32(update.scale) * (self._whole(part)[:, rows].T @ right.T)
        out = np.empty((rows.stop - rows.start, right.shape[1]), np.float32)
        # in fixed blocks: how a product is summed depends on its shape, and no result may depend on how rows are read
        for start in range(rows.start // PRODUCT_ROWS * PRODUCT_ROWS, rows.stop, PRODUCT_ROWS):
            block = slice(start, min(start + PRODUCT_ROWS, part.shape[0]))
            left = np.empty((block.stop - block.start, part.shape[1]), np.float32)
            self._stored(part, block, left.reshape(-1))
            first, last = max(block.start, rows.start), min(block.stop, rows.stop)
            product = np.float32(update.scale) * (left @ right)
            out[first - rows.start : last - rows.start] = product[first - start : last - start]
        return out

    def _whole(self, info: TensorInfo) -> NDArray[np.float32]:
        with self._lock:
            found = self._kept.get((info.file, info.name))
        if found is None:
            found = np.empty(info.shape, np.float32)
            self._stored(info, slice(0, info.shape[0]), found.reshape(-1))
            with self._lock:
                self._kept[info.file, info.name] = found
                while len(self._kept) > KEPT_FACTORS:
                    self._kept.pop(next(iter(self._kept)))
        return found

    def _stored(self, info: TensorInfo, rows: slice, out: Raw) -> None:
        self._files[info.file].read(info.name, rows, out)


def _extent(info: TensorInfo, rows: slice) -> tuple[int, int]:
    """First byte within the tensor, and number of bytes, of a run of rows."""
    per_row = info.bytes // max(info.shape[0], 1) if info.shape else info.bytes
    return rows.start * per_row, (rows.stop - rows.start) * per_row
