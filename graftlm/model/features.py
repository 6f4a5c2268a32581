"""Features of frozen encoders, kept on disk by content: an epoch, a method or a run never encodes a file twice.

A feature depends on the encoder (its fingerprint) and on the bytes of the file, and on nothing else: on a CPU files are
encoded one at a time, because a matrix product may round differently in another batch, and a run that is resumed must
end bit by bit like one that was not.
"""

import sqlite3
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from graftlm.core.errors import DataError
from graftlm.core.files import hash_file
from graftlm.data.types import Media
from graftlm.model.encoders.base import Encoder

__all__ = ["FeatureCache"]


class FeatureCache:
    """Encoder outputs by encoder and file content.

    One SQLite file per encoder; several processes may read and write it. A damaged row is computed again.

    Args:
        path: folder of the files; None keeps features in memory only.
        memory_bytes: bound of the copies in memory.

    Attributes:
        hits, misses: features found (in memory or on disk) and computed.
    """

    def __init__(self, path: Path | None = None, memory_bytes: int = 2**30) -> None:
        self.path = path
        self.memory_bytes = memory_bytes
        self.hits = self.misses = 0
        self._memory: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        self._size = 0
        self._digests: dict[tuple[str, int, int], str] = {}
        self._files: dict[str, sqlite3.Connection] = {}
        self._fingerprints: weakref.WeakKeyDictionary[Encoder, str] = weakref.WeakKeyDictionary()

    def get(self, encoder: Encoder, items: Sequence[Media]) -> Tensor:
        """Features of the items, Float (N, L, E) on the CPU.

        Raises:
            DataError: a file cannot be read.
        """
        name = self._fingerprints.get(encoder)
        if name is None:
            name = self._fingerprints[encoder] = encoder.fingerprint()
        return torch.stack([self._one(encoder, name, item) for item in items])

    def digest(self, item: Media) -> str:
        """SHA-256 of the item's file; hashed again only when size or time of change differ."""
        state = item.source.stat()
        key = (str(item.source), state.st_size, state.st_mtime_ns)
        if key not in self._digests:
            self._digests[key] = hash_file(item.source)
        return self._digests[key]

    def _one(self, encoder: Encoder, name: str, item: Media) -> Tensor:
        key = (name, self._digest_or_explain(item))
        if key in self._memory:
            self._memory.move_to_end(key)
            self.hits += 1
            return self._memory[key]
        tensor = self._read(*key)
        if tensor is None:
            self.misses += 1
            tensor = _encode(encoder, item)
            self._write(*key, tensor)
        else:
            self.hits += 1
        self._memory[key] = tensor
        self._size += tensor.nbytes
        while self._size > self.memory_bytes and len(self._memory) > 1:
            self._size -= self._memory.popitem(last=False)[1].nbytes
        return tensor

    def _digest_or_explain(self, item: Media) -> str:
        try:
            return self.digest(item)
        except OSError as error:
            raise DataError(f"{item.source}: cannot be read ({error.strerror}). Restore the file, or use skip_bad=true.") from None

    def _open(self, name: str) -> sqlite3.Connection | None:
        if self.path is None:
            return None
        if name not in self._files:
            self.path.mkdir(parents=True, exist_ok=True)
            file = sqlite3.connect(self.path / f"{name[:32]}.sqlite", timeout=60, isolation_level=None)
            file.execute("PRAGMA journal_mode=WAL")
            file.execute("PRAGMA synchronous=OFF")  # a lost or torn row is only computed again
            file.execute("CREATE TABLE IF NOT EXISTS features (digest TEXT PRIMARY KEY, shape TEXT, crc INTEGER, data BLOB)")
            self._files[name] = file
        return self._files[name]

    def _read(self, name: str, digest: str) -> Tensor | None:
        file = self._open(name)
        if file is None:
            return None
        row = file.execute("SELECT shape, crc, data FROM features WHERE digest = ?", (digest,)).fetchone()
        if row is None or zlib.crc32(row[2]) != row[1]:
            return None
        array = np.frombuffer(row[2], dtype=np.float32).reshape([int(n) for n in row[0].split(",")])
        return torch.from_numpy(array.copy())

    def _write(self, name: str, digest: str, tensor: Tensor) -> None:
        file = self._open(name)
        if file is not None:
            data = tensor.numpy().tobytes()
            shape = ",".join(map(str, tensor.shape))
            file.execute("INSERT OR REPLACE INTO features VALUES (?, ?, ?, ?)", (digest, shape, zlib.crc32(data), data))


@torch.no_grad()
def _encode(encoder: Encoder, item: Media) -> Tensor:
    """Float (L, E) of one file, on the CPU."""
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    tokens: Tensor = encoder(encoder.read(item.source)[None].to(device))[0]
    return tokens.float().cpu().contiguous()
