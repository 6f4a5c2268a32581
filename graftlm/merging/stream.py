"""The merge engine: walks over the weights of a base and N models, a few rows at a time, and writes what a rule makes of them.

Memory does not grow with the models: workers have buffers of their own, files are read ahead in file order, and outputs are
filled in place. A threshold over the whole model (TIES, MMER) is exact: one walk counts all magnitudes, see `trim_limits`,
and where magnitudes equal to the threshold are more than may stay, the first ones of the model stay, in the order of the
base's files. What is finished is noted tensor by tensor, so a merge that was killed goes on, and ends byte-identical: no
result depends on chunks, threads or time.
"""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graftlm.core.errors import MergeError
from graftlm.merging import kernels
from graftlm.merging.output import Shards, WorkFolder
from graftlm.merging.sources import Raw, Source

__all__ = ["CHUNK", "COPIES", "RAM", "Combination", "Limit", "Merge", "Progress", "default_threads"]

CHUNK = 1 << 18
"""Numbers read, computed and written at once: with those of the models, about a second-level cache."""

RAM = 2_000_000_000
"""Bytes that a rule of whole tensors may take."""

COPIES = 6
"""Float32 copies of a piece that such a rule holds at once, beside those of the models."""

NOTED_BYTES = 1 << 30
"""Written bytes after which progress is noted; what a crash may cost."""

SAMPLES = 64
"""Chunks read beforehand to guess the thresholds."""

EMPTY_MASKS, EMPTY_MOMENTS = np.zeros((0, 0), np.bool_), np.zeros((0, 0))

Progress = Callable[[str, int, int], None]
"""Told what happens, how many bytes are done, and of how many."""


def default_threads() -> int:
    """One per usable core, at most four: a merge soon waits for memory."""
    return min(4, len(os.sched_getaffinity(0)))


@dataclass(frozen=True)
class Combination:
    """What becomes of the task vectors.

    Attributes:
        thin: "none", "trim" to the largest of the whole model, or "drop" at random.
        combine: a name of `kernels.COMBINE`.
        scale: of the merged vector, or with "average" and nothing thinned the weight of the mean.
        density: share that trimming keeps; drop: share that dropping drops.
        per_tensor: trim each tensor by itself.
        compat_reference: keep every magnitude from the k-th smallest on, as the released TIES code.
        keep: write "merged" weights, the merged vector with "masks", or "signs" alone.
        significance: λ_i of the masks, one per model; 0 leaves that test out.
        congruence: whether masks need equal signs; without, as in the paper's ablation.
        rescale: add one least-squares scale per tensor and model to the masks.
        weights: of the models in an average; none are equal ones.
    """

    thin: str = "none"
    combine: str = "average"
    scale: float = 1.0
    density: float = 1.0
    drop: float = 0.0
    seed: int = 0
    per_tensor: bool = False
    compat_reference: bool = False
    keep: str = "merged"
    significance: tuple[float, ...] = ()
    congruence: bool = True
    rescale: bool = False
    weights: tuple[float, ...] = ()

    @property
    def scans(self) -> bool:
        """Whether a first walk must count magnitudes."""
        return self.keep != "signs" and self.thin == "trim" and (self.density < 1 or self.compat_reference)


@dataclass(frozen=True)
class Limit:
    """Which magnitudes of one model stay: those above ``bits``, and those equal to it before flat index ``cut``.

    Attributes:
        bits: of the threshold, as a float32 without its sign.
        cut: index in the concatenation of all merged tensors; None keeps all that are equal.
    """

    bits: int
    cut: int | None = None


@dataclass(frozen=True)
class Chunk:
    """Whole rows of one tensor: ``first`` is the flat index of their first number among all tensors."""

    tensor: int
    rows: slice
    start: int
    size: int
    first: int


@dataclass
class Buffers:
    """What one worker works in."""

    base: dict[type, Raw] = field(default_factory=dict)
    models: dict[type, Raw] = field(default_factory=dict)
    out: dict[type, Raw] = field(default_factory=dict)
    masks: NDArray[np.bool_] = field(default_factory=lambda: EMPTY_MASKS)
    tally: "Tally | None" = None


class Tally:
    """What one worker counted: magnitudes of every model."""

    def __init__(self, models: int) -> None:
        self.fine = np.zeros((models, 3 << 16), np.int64)
        self._bins = np.zeros((models, 4, kernels.BINS), np.int32)
        self._flushed = np.zeros((models, kernels.BINS), np.int64)
        self._size = 0

    def add(self, base: Raw, models: Raw, first: Sequence[int]) -> bool:
        """Count a chunk; whether something in it is not finite."""
        self._size += base.size
        if self._size >= 1 << 31:  # a bin could overflow
            self._flushed = self.totals()
            self._bins[:] = 0
            self._size = base.size
        for i, model in enumerate(models):
            kernels.histogram(base, model, self._bins[i], np.uint32(first[i]), self.fine[i])
        return bool(self._bins[:, :, kernels.NOT_FINITE >> 16 :].any())

    def totals(self) -> NDArray[np.int64]:
        """(models, BINS)."""
        totals: NDArray[np.int64] = self._flushed + self._bins.sum(1, dtype=np.int64)
        return totals


class Merge:
    """One merge of models that continue a base.

    Args:
        base: θ_pre.
        models: θ_1 … θ_n, by name.
        names: the tensors to merge, in the order of the base's files.
        how: what becomes of the task vectors.
        dtype: storage dtype of what is written, per tensor ("BF16").
        shards: where it goes; keys are tensor names, or with masks and signs those names and ``.shared``, ``.masks`` …
        seeds: hash key of a model's and tensor's random numbers, for dropping.
        threads: workers.
        chunk: numbers per chunk, about; `CHUNK` by default.
        whole: numbers of which densities are a share: those of a model, also of tensors that no model changed.
    """

    def __init__(
        self,
        base: Source,
        models: Mapping[str, Source],
        names: Sequence[str],
        how: Combination,
        dtype: Mapping[str, str],
        shards: Shards,
        *,
        seeds: Callable[[str, str], int] = lambda model, tensor: 0,
        threads: int | None = None,
        chunk: int | None = None,
        whole: int | None = None,
    ) -> None:
        self._base = base
        self._models = dict(models)
        self._names = list(names)
        self._how = how
        self._dtype = dtype
        self._shards = shards
        self._seeds = seeds
        self._threads = threads or default_threads()
        self._chunk = chunk or CHUNK
        self._shapes = [base.shape(name) or (1,) for name in self._names]
        self._sizes = [int(np.prod(shape)) for shape in self._shapes]
        self._offsets = np.concatenate([[0], np.cumsum(self._sizes)]).astype(np.int64)
        self._limits = [[Limit(0)] * len(models)]
        self._whole = whole or int(self._offsets[-1])
        self._zero = 0
        self._moments: dict[int, NDArray[np.float64]] = {}
        self._free: deque[Buffers] = deque()

    @property
    def numel(self) -> int:
        """Numbers of one model that are merged."""
        return int(self._offsets[-1])

    def run(self, work: WorkFolder, progress: Progress) -> list[float]:
        """Merge what is not merged yet.

        Returns:
            With masks, the share of the weights that each model keeps; else nothing.

        Raises:
            MergeError: a weight is NaN or infinite, or files changed.
        """
        done, kept = 0, [0] * len(self._models)
        for entry in work.entries():
            if "limits" in entry:
                self._limits = [[Limit(bits, cut) for bits, cut in limits] for limits in entry["limits"]]
                self._zero = entry["zero"]
            if "tensors" in entry:
                done, kept = entry["tensors"], entry["kept"]
        if self._how.scans and not any("limits" in entry for entry in work.entries()):
            every = range(len(self._names))
            groups = [[tensor] for tensor in every] if self._how.per_tensor else [list(every)]
            self._limits = [self._find_limits(group, progress) for group in groups]
            self._zero = self._majority(progress) if self._how.compat_reference else 0
            work.note(limits=[[[x.bits, x.cut] for x in limits] for limits in self._limits], zero=self._zero)
        kept = self._walk(work, done, kept, progress)
        return [count / max(self.numel, 1) for count in kept] if self._how.keep == "masks" else []

    # --- the main walk ------------------------------------------------------------------------------------------------

    def _walk(self, work: WorkFolder, done: int, kept: list[int], progress: Progress) -> list[int]:
        total = sum(self._written(i) for i in range(len(self._names)))
        written = noted = sum(self._written(i) for i in range(done))
        progress("merging", written, total)
        for index in range(done, len(self._names)):
            self._moments[index] = np.zeros((len(self._models), 2))
        chunks = list(self._chunks(range(done, len(self._names))))
        last = {chunk.tensor: i for i, chunk in enumerate(chunks)}
        for position, (chunk, (counts, moments)) in enumerate(self._parallel(chunks, self._merge)):
            kept = [before + count for before, count in zip(kept, counts, strict=True)]
            self._moments[chunk.tensor] += moments  # in the order of the chunks, so that no sum depends on threads
            if last[chunk.tensor] != position:
                continue
            self._finish(chunk.tensor)
            written += self._written(chunk.tensor)
            progress("merging", written, total)
            if written - noted >= NOTED_BYTES or position == len(chunks) - 1:
                self._expect_unchanged()
                self._shards.sync()
                work.note(tensors=chunk.tensor + 1, kept=kept)
                noted = written
        return kept

    def _merge(self, chunk: Chunk, room: Buffers) -> tuple[list[int], NDArray[np.float64]]:
        """Merge and write one chunk; how many weights each mask keeps, and the moments of rescaling."""
        how, name = self._how, self._names[chunk.tensor]
        base, models = self._read(chunk, room)
        nothing, moments = [0] * len(self._models), np.zeros((len(self._models), 2))
        if how.keep == "signs":
            self._signs(chunk, base, models)
            return nothing, moments
        out = _part(room.out, self._out_form(name, base), chunk.size)
        masks = room.masks[:, : chunk.size] if how.keep == "masks" else EMPTY_MASKS
        if how.keep == "masks" and masks.shape[1] < chunk.size:
            room.masks = np.empty((len(self._models), chunk.size), np.bool_)
            masks = room.masks
        if how.thin == "none" and how.combine == "average" and how.keep == "merged":
            shares = np.array(how.weights or [1.0] * len(self._models))
            bad = kernels.average(base, models, shares, np.float32(how.scale), out)
        else:
            bad = sum(
                self._merge_part(chunk, base[part], models[:, part], out[part], masks[:, part], moments, part, limits)
                for part, limits in self._parts(chunk)
            )
        if bad:
            self._blame(chunk, base, models)
        self._write(name, chunk, out)
        if how.keep != "masks":
            return nothing, moments
        self._write_bits(f"{name}.masks", chunk, masks)
        return [int(np.count_nonzero(mask)) for mask in masks], moments

    def _merge_part(
        self,
        chunk: Chunk,
        base: Raw,
        models: Raw,
        out: Raw,
        masks: NDArray[np.bool_],
        moments: NDArray[np.float64],
        part: slice,
        limits: NDArray[np.uint32],
    ) -> int:
        how, name = self._how, self._names[chunk.tensor]
        count = len(self._models)
        keys = np.array([self._seeds(model, name) for model in self._models], np.uint64)
        halves = np.array(how.significance or [1.0] * count, np.float32) * np.float32(0.5)
        bad: int = kernels.merge(
            base,
            models,
            kernels.THIN[how.thin],
            limits,
            keys,
            chunk.start + part.start,
            np.float32(1 - how.drop),
            kernels.COMBINE[how.combine],
            np.float32(self._zero),
            np.float32(how.scale),
            out,
            how.congruence,
            halves,
            masks,
            moments if how.rescale else EMPTY_MOMENTS,
        )
        return bad

    def _parts(self, chunk: Chunk) -> Iterator[tuple[slice, NDArray[np.uint32]]]:
        """Runs of a chunk with the least magnitude that stays, per model; a run ends where a model's quota of ties does."""
        if self._how.thin == "drop":
            limit = int(np.floor(self._how.drop * 2**24 + 0.5))
            yield slice(0, chunk.size), np.full(len(self._models), limit, np.uint32)
            return
        limits = self._limits[chunk.tensor if len(self._limits) > 1 else 0]
        cuts = {limit.cut - chunk.first for limit in limits if limit.cut is not None}
        edges = [0, *sorted(cut for cut in cuts if 0 < cut < chunk.size), chunk.size]
        for start, stop in itertools.pairwise(edges):
            least = [limit.bits + int(limit.cut is not None and chunk.first + start >= limit.cut) for limit in limits]
            yield slice(start, stop), np.array([max(bits, 1) for bits in least], np.uint32)

    def _signs(self, chunk: Chunk, base: Raw, models: Raw) -> None:
        name, rows = self._names[chunk.tensor], chunk.rows.stop - chunk.rows.start
        flat = len(self._shapes[chunk.tensor]) < 2
        rows = 1 if flat else rows
        positive = np.empty((len(self._models), chunk.size), np.bool_)
        scales = np.empty((len(self._models), rows), np.float32)
        for i in range(len(self._models)):
            if kernels.signs(base, models[i], chunk.size // rows, positive[i], scales[i]):
                self._blame(chunk, base, models)
        self._write_bits(f"{name}.signs", chunk, positive)
        all_rows = 1 if flat else self._shapes[chunk.tensor][0]
        for i, scale in enumerate(scales):
            start = (i * all_rows + (0 if flat else chunk.rows.start)) * 4
            self._shards.write(f"{name}.scales", start, np.ascontiguousarray(scale).data.cast("B"))

    def _finish(self, tensor: int) -> None:
        """All chunks of a tensor are merged: what needs all of it is written."""
        if self._how.rescale and self._how.keep == "masks":
            both, square = self._moments[tensor].T
            scales = np.divide(both, square, out=np.zeros_like(both), where=square > 0).astype(np.float32)
            self._shards.write(f"{self._names[tensor]}.scales", 0, scales.data.cast("B"))

    # --- thresholds ---------------------------------------------------------------------------------------------------

    def _find_limits(self, tensors: Sequence[int], progress: Progress) -> list[Limit]:
        """The exact threshold of every model over these tensors, and where its quota of equal magnitudes ends."""
        size = sum(self._sizes[tensor] for tensor in tensors)
        rank = _rank(self._how, size if self._how.per_tensor else self._whole)
        if rank == 0:
            return [Limit(kernels.NOT_FINITE)] * len(self._models)
        if rank >= size:
            return [Limit(0)] * len(self._models)
        ranks = [rank] * len(self._models)
        chunks = list(self._chunks(tensors))
        guesses = self._guess(chunks, rank / size)
        counts, fine = self._count(chunks, guesses, progress, "counting")
        found: list[tuple[int, int] | None] = []
        for i, rank in enumerate(ranks):
            found.append(_exact(counts[i], fine[i], guesses[i], rank))
        if any(limit is None for limit in found):  # the guess was wrong, which the counts have just told
            guesses = [_bin(counts[i], rank)[0] for i, rank in enumerate(ranks)]
            counts, fine = self._count(chunks, guesses, progress, "counting again")
            found = [_exact(counts[i], fine[i], guesses[i], rank) for i, rank in enumerate(ranks)]
        limits = []
        for i, limit in enumerate(found):
            assert limit is not None
            bits, quota = limit
            equal = int(fine[i][bits - (guesses[i] << 16)])
            partial = not self._how.compat_reference and bits > 0 and quota < equal
            limits.append(Limit(bits, self._cut(chunks, i, bits, quota, progress) if partial else None))
        return limits

    def _guess(self, chunks: Sequence[Chunk], share: float) -> list[int]:
        """The bin of each threshold above which lies a share of all magnitudes, from a sample."""
        step = max(1, len(chunks) // SAMPLES)
        sample = chunks[::step][: SAMPLES * 2]
        counts, _ = self._count(sample, [0] * len(self._models), lambda *_: None, "")
        size = sum(chunk.size for chunk in sample)
        return [max(_bin(count, max(1, int(share * size)))[0] - 1, 0) for count in counts]

    def _count(
        self, chunks: Sequence[Chunk], first: Sequence[int], progress: Progress, what: str
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Magnitudes per bin, and single magnitudes of three bins from ``first`` on, of every model."""
        count = len(self._models)
        tallies: list[Tally] = []
        total = sum(chunk.size for chunk in chunks)

        def work(chunk: Chunk, room: Buffers) -> None:
            if room.tally is None:
                room.tally = Tally(count)
                tallies.append(room.tally)
            base, models = self._read(chunk, room)
            if room.tally.add(base, models, first):
                self._blame(chunk, base, models)

        done = 0
        for chunk, _ in self._parallel(chunks, work):
            done += chunk.size
            progress(what, done, total)
        for room in self._free:
            room.tally = None
        bins = np.sum([tally.totals() for tally in tallies], axis=0)
        fines = np.sum([tally.fine for tally in tallies], axis=0)
        for i in range(count):
            if first[i] == 0:
                fines[i, 0] = bins[i, 0] - fines[i, 1 : 1 << 16].sum()
        return bins, fines

    def _cut(self, chunks: Sequence[Chunk], model: int, bits: int, quota: int, progress: Progress) -> int:
        """The flat index behind the last of the first ``quota`` magnitudes that equal a threshold."""

        def equal(chunk: Chunk, room: Buffers) -> int:
            base, models = self._read(chunk, room, only=model)
            return int(kernels.equal(base, models[0], np.uint32(bits)))

        left = quota
        for chunk, count in self._parallel(chunks, equal):
            progress("placing ties", chunk.first, self.numel)
            if count >= left:
                base, models = self._read(chunk, Buffers(), only=model)
                return chunk.first + int(kernels.nth_equal(base, models[0], np.uint32(bits), left)) + 1
            left -= count
        return chunks[-1].first + chunks[-1].size

    def _majority(self, progress: Progress) -> int:
        """The sign that most summed entries have: what the released TIES code gives to those that sum to 0."""

        def work(chunk: Chunk, room: Buffers) -> int:
            base, models = self._read(chunk, room)
            return sum(
                int(kernels.majority(base[part], models[:, part], limits)) for part, limits in self._parts(chunk)
            )

        votes = 0
        for chunk, count in self._parallel(list(self._chunks(range(len(self._names)))), work):
            votes += count
            progress("electing", chunk.first, self.numel)
        return int(np.sign(votes))

    # --- reading and writing ------------------------------------------------------------------------------------------

    def _chunks(self, tensors: Sequence[int]) -> Iterator[Chunk]:
        """Whole rows; every chunk but a tensor's last has a multiple of eight numbers, so that its bits fill bytes."""
        for tensor in tensors:
            shape = self._shapes[tensor]
            width = self._sizes[tensor] // max(shape[0], 1)
            whole_bytes = 1 if width % 8 == 0 else 8  # rows
            step = max(whole_bytes, self._chunk // max(width, 1) // whole_bytes * whole_bytes)
            if self._how.keep == "signs" and len(shape) < 2:
                step = max(shape[0], 1)  # one scale for all of it
            for row in range(0, shape[0], step):
                stop = min(row + step, shape[0])
                start = row * width
                yield Chunk(tensor, slice(row, stop), start, (stop - row) * width, int(self._offsets[tensor]) + start)

    def _parallel(self, chunks: Sequence[Chunk], work: Callable[[Chunk, Buffers], Any]) -> Iterator[tuple[Chunk, Any]]:
        """(chunk, result) in order; few are under way at once, and the next ones are read ahead."""
        with ThreadPoolExecutor(self._threads) as pool:

            def task(chunk: Chunk) -> Any:
                try:
                    room = self._free.popleft()
                except IndexError:
                    room = Buffers()
                try:
                    return work(chunk, room)
                finally:
                    self._free.append(room)

            waiting: deque[tuple[Chunk, Future[Any]]] = deque()
            try:
                for chunk in chunks:
                    name = self._names[chunk.tensor]
                    for source in (self._base, *self._models.values()):
                        source.ahead(name, chunk.rows)
                    waiting.append((chunk, pool.submit(task, chunk)))
                    if len(waiting) > 2 * self._threads:
                        first, future = waiting.popleft()
                        yield first, future.result()
                while waiting:
                    first, future = waiting.popleft()
                    yield first, future.result()
            finally:
                for _, future in waiting:
                    future.cancel()

    def _read(self, chunk: Chunk, room: Buffers, only: int | None = None) -> tuple[Raw, Raw]:
        """The chunk of the base, (n,), and of all models or one, (N, n), in one raw form."""
        name = self._names[chunk.tensor]
        sources = list(self._models.values())
        if only is not None:
            sources = [sources[only]]
        forms = {source.form(name) for source in (self._base, *sources)}
        form = forms.pop() if len(forms) == 1 else np.float32
        base = _part(room.base, form, chunk.size)
        models = _part(room.models, form, chunk.size * len(sources)).reshape(len(sources), chunk.size)
        self._base.read(name, chunk.rows, base)
        for i, source in enumerate(sources):
            source.read(name, chunk.rows, models[i])
        return base, models

    def _out_form(self, name: str, base: Raw) -> type[np.generic]:
        return np.uint16 if self._dtype[name] == "BF16" else np.float32

    def _write(self, name: str, chunk: Chunk, out: Raw) -> None:
        key = f"{name}.shared" if self._how.keep == "masks" else name
        if self._dtype[name] == "F16":
            out = out.astype(np.float16)
            if not np.isfinite(out).all():
                raise MergeError(f"'{name}': the merged weights leave the range of float16. Write another dtype.")
        self._shards.write(key, chunk.start * out.itemsize, out.data.cast("B"))

    def _write_bits(self, key: str, chunk: Chunk, bits: NDArray[np.bool_]) -> None:
        packed = np.packbits(bits, axis=1, bitorder="little")
        row = -(-self._sizes[chunk.tensor] // 8)
        for i, line in enumerate(packed):
            self._shards.write(key, i * row + chunk.start // 8, line.data.cast("B"))

    def _written(self, tensor: int) -> int:
        return self._sizes[tensor] * (4 if self._dtype[self._names[tensor]] == "F32" else 2)

    # --- errors -------------------------------------------------------------------------------------------------------

    def _blame(self, chunk: Chunk, base: Raw, models: Raw) -> None:
        """Say which weight is not finite.

        Raises:
            MergeError: always.
        """
        name = self._names[chunk.tensor]
        for who, raw in (("the base", base), *zip(self._models, models, strict=True)):
            numbers = np.left_shift(raw, 16, dtype=np.uint32).view(np.float32) if raw.dtype == np.uint16 else raw
            if not np.isfinite(numbers).all():
                at = int(np.flatnonzero(~np.isfinite(numbers))[0]) + chunk.start
                raise MergeError(
                    f"'{name}' of {who}: number {at} is {numbers[at - chunk.start]}; finite weights are expected. "
                    f"That model is broken; `graftlm doctor --deep` lists every such tensor."
                )
        raise MergeError(f"'{name}': the merged weights overflow, though the models' are finite. Use a smaller scale.")

    def _expect_unchanged(self) -> None:
        changed: list[Path] = [p for source in (self._base, *self._models.values()) for p in source.changed()]
        if changed:
            raise MergeError(
                f"{changed[0]}: changed while it was merged; inputs must stay as they are. Run the command again, when it is "
                f"complete: it starts from the beginning."
            )


def _part(pool: dict[type, Raw], form: type[np.generic], size: int) -> Raw:
    """The first numbers of a buffer that is kept and grows."""
    if form not in pool or pool[form].size < size:
        pool[form] = np.empty(size, form)
    return pool[form][:size]


def _rank(how: Combination, size: int) -> int:
    """How many of ``size`` magnitudes stay; with the released TIES code, those from the k-th smallest on."""
    if how.compat_reference:
        return min(int(how.density * size) + 1, size)
    return int(np.floor(how.density * size + 0.5))


def _bin(counts: NDArray[np.int64], rank: int) -> tuple[int, int]:
    """The bin of the rank-th largest magnitude, and its rank within it."""
    above = np.cumsum(counts[::-1])
    at = int(np.searchsorted(above, max(rank, 1)))
    before = int(above[at - 1]) if at else 0
    return kernels.BINS - 1 - at, max(rank, 1) - before


def _exact(counts: NDArray[np.int64], fine: NDArray[np.int64], first: int, rank: int) -> tuple[int, int] | None:
    """Bits of the rank-th largest magnitude, and how many equal ones stay; None if it is not among the fine bins."""
    number, within = _bin(counts, rank)
    if not first <= number < first + (fine.size >> 16):
        return None
    singles = fine[(number - first) << 16 : (number - first + 1) << 16]
    above = np.cumsum(singles[::-1])
    at = int(np.searchsorted(above, within))
    before = int(above[at - 1]) if at else 0
    return (number << 16) + 65535 - at, within - before
