"""Features of frozen encoders, kept on disk by content: an epoch, a method or a run never encodes a file twice.

A feature depends on the encoder (its code, settings and weights) and on the bytes of the file, and on nothing else:
files are encoded one at a time, because a matrix product may round differently in another batch, and a run that is
resumed must end bit by bit like one that was not.
"""

import contextlib
import logging
import os
import sqlite3
import sys
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from graftlm.core.errors import DataError
from graftlm.core.files import hash_file, hash_json, locked
from graftlm.data import media
from graftlm.data.types import Media
from graftlm.model.encoders.base import Encoder

__all__ = ["FeatureCache"]

Key = tuple[str, str]
"""Name of the encoder and digest of the file."""

Result = TypeVar("Result")

log = logging.getLogger(__name__)


class FeatureCache:
    """Encoder outputs by encoder and file content.

    One SQLite file per encoder; several processes may read and write it. A damaged row is computed again; a damaged
    file is set aside under another name, with a warning, and begun anew.

    Args:
        path: folder of the files; None keeps features in memory only.
        memory_bytes: bound of the copies in memory.
        batch: files encoded at once. More than 1 is faster on a GPU, but a feature then also depends, in its last bits,
            on the files beside it.

    Attributes:
        hits, misses: features found (in memory or on disk) and computed.
    """

    def __init__(self, path: Path | None = None, memory_bytes: int = 2**30, batch: int = 1) -> None:
        self.path = path
        self.memory_bytes = memory_bytes
        self.batch = max(1, batch)
        self.hits = self.misses = 0
        self._memory: OrderedDict[Key, Tensor] = OrderedDict()
        self._size = 0
        self._digests: dict[tuple[str, int, int], str] = {}
        self._stores: dict[str, Store] = {}
        self._names: weakref.WeakKeyDictionary[Encoder, tuple[tuple[int, ...], str]] = weakref.WeakKeyDictionary()

    def get(self, encoder: Encoder, items: Sequence[Media]) -> Tensor:
        """Features of the items, Float (N, L, E) on the CPU.

        Raises:
            DataError: a file cannot be read, or the cache cannot be used.
        """
        name = self._name(encoder)
        keys = [(name, self.digest(item)) for item in items]
        found: dict[Key, Tensor] = {}
        missing: dict[Key, Media] = {}
        for key, item in dict(zip(keys, items, strict=True)).items():
            if (tensor := self._find(key)) is None:
                missing[key] = item
            else:
                found[key] = tensor
        pending = list(missing.items())
        for start in range(0, len(pending), self.batch):
            found |= self._compute(encoder, dict(pending[start : start + self.batch]))
        self.hits += len(items) - len(missing)
        return torch.stack([found[key] for key in keys])

    def digest(self, item: Media) -> str:
        """SHA-256 of the item's file; hashed again only when size or time of change differ.

        Raises:
            DataError: the file cannot be read.
        """
        try:
            state = item.source.stat()
            key = (str(item.source), state.st_size, state.st_mtime_ns)
            if key not in self._digests:
                self._digests[key] = hash_file(item.source)
        except OSError as error:
            raise DataError(
                f"{item.source}: cannot be read ({error.strerror}); a file is expected. Restore it, or set skip_bad."
            ) from None
        return self._digests[key]

    def _name(self, encoder: Encoder) -> str:
        """Of the encoder and its code; found again when weights were loaded into it meanwhile."""
        state = tuple(tensor._version for tensor in (*encoder.parameters(), *encoder.buffers()))
        known = self._names.get(encoder)
        if known is None or known[0] != state:
            known = self._names[encoder] = (state, hash_json([encoder.fingerprint(), _code(encoder)]))
        return known[1]

    def _find(self, key: Key) -> Tensor | None:
        if key in self._memory:
            self._memory.move_to_end(key)
            return self._memory[key]
        store = self._store(key[0])
        tensor = store.read(key[1]) if store else None
        if tensor is not None:
            self._remember(key, tensor)
        return tensor

    def _compute(self, encoder: Encoder, missing: dict[Key, Media]) -> dict[Key, Tensor]:
        tensors = dict(zip(missing, _encode(encoder, [item.source for item in missing.values()]), strict=True))
        self.misses += len(tensors)
        for key, tensor in tensors.items():
            store = self._store(key[0])
            if store:
                store.write(key[1], tensor)
            self._remember(key, tensor)
        return tensors

    def _remember(self, key: Key, tensor: Tensor) -> None:
        self._memory[key] = tensor
        self._size += tensor.nbytes
        while self._size > self.memory_bytes:
            self._size -= self._memory.popitem(last=False)[1].nbytes

    def _store(self, name: str) -> "Store | None":
        if self.path is not None and name not in self._stores:
            self._stores[name] = Store(self.path / f"{name[:32]}.sqlite")
        return self._stores.get(name)


class Store:
    """One SQLite file: digest -> feature, with a checksum."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: sqlite3.Connection | None = None
        self._inode = 0

    def read(self, digest: str) -> Tensor | None:
        """Float (L, E); None when there is none, or a damaged one."""
        query = "SELECT shape, crc, data FROM features WHERE digest = ?"
        row = self._try(lambda file: file.execute(query, (digest,)).fetchone())
        try:
            if row is None or zlib.crc32(row[2]) != row[1]:
                return None
            array = np.frombuffer(row[2], dtype=np.float32).reshape([int(n) for n in row[0].split(",")])
        except (TypeError, ValueError, AttributeError):  # a column of another type or a shape of another size
            return None
        return torch.from_numpy(array.copy())

    def write(self, digest: str, tensor: Tensor) -> None:
        """Keep a feature; a damaged one is replaced."""
        data = tensor.numpy().tobytes()
        row = (digest, ",".join(map(str, tensor.shape)), zlib.crc32(data), data)
        self._try(lambda file: file.execute("INSERT OR REPLACE INTO features VALUES (?, ?, ?, ?)", row))

    def _try(self, action: Callable[[sqlite3.Connection], Result]) -> Result:
        """Act on the file; once more on a new one if it is damaged."""
        try:
            try:
                return action(self._open())
            except sqlite3.DatabaseError as error:
                if type(error) is not sqlite3.DatabaseError:  # its subclasses mean: in use, disk full, misuse ...
                    raise
                self._set_aside(error)
                return action(self._open())
        except (sqlite3.Error, OSError) as error:
            raise DataError(
                f"{self.path}: the feature cache cannot be used ({error}); a file on a local disk with free space is "
                f"expected. Free space, or name another folder; the file may be deleted at any time."
            ) from error

    def _open(self) -> sqlite3.Connection:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked():  # the switch to WAL does not wait for other processes
                self.path.touch()
                self._inode = self.path.stat().st_ino
                self._file = _connect(self.path)
        return self._file

    def _set_aside(self, error: sqlite3.DatabaseError) -> None:
        """Rename the damaged file, unless another process did so meanwhile."""
        if self._file is not None:
            self._file.close()
            self._file = None
        with self._locked():
            if self.path.exists() and self.path.stat().st_ino == self._inode:
                aside = self.path.with_suffix(".damaged")
                os.replace(self.path, aside)
                for log_file in ("-wal", "-shm"):
                    Path(f"{self.path}{log_file}").unlink(missing_ok=True)
                log.warning("%s: damaged (%s); now %s, and its features are computed again.", self.path, error, aside)

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        return locked(self.path.with_suffix(".lock"), wait=60)


def _connect(path: Path) -> sqlite3.Connection:
    file = sqlite3.connect(path, timeout=60, isolation_level=None)
    try:
        file.execute("PRAGMA journal_mode=WAL")
        file.execute("PRAGMA synchronous=OFF")  # a lost or torn row is only computed again
        file.execute(
            "CREATE TABLE IF NOT EXISTS features (digest TEXT PRIMARY KEY, shape TEXT, crc INTEGER, data BLOB)"
        )
    except sqlite3.Error:
        file.close()
        raise
    return file


def _code(encoder: Encoder) -> list[str]:
    """Hashes of the source files that turn a file into features."""
    modules = {sys.modules[each.__module__] for each in type(encoder).__mro__ if issubclass(each, Encoder)} | {media}
    files = {vars(module).get("__file__") for module in modules}  # a notebook has none
    return [hash_file(Path(file)) for file in sorted(file for file in files if file)]


@torch.no_grad()
def _encode(encoder: Encoder, sources: Sequence[Path]) -> list[Tensor]:
    """Float (L, E) per file, on the CPU; files whose raw inputs have one shape go through together."""
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    inputs = [encoder.read(source) for source in sources]
    together = len(inputs) > 1 and len({each.shape for each in inputs}) == 1
    groups = [torch.stack(inputs)] if together else [each[None] for each in inputs]
    # a feature is kept for good: it must not depend on whether a training step under autocast asked for it first
    with torch.autocast(device.type, enabled=False):
        return [tokens.float().cpu().contiguous() for group in groups for tokens in encoder(group.to(device))]
