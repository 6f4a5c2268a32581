"""What a merge will read, write, hold in memory and take, before it is done."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from graftlm.merging import kernels
from graftlm.merging.compose import Inputs, needed_bytes
from graftlm.merging.headers import TensorInfo
from graftlm.merging.recipe import COMPOSERS, combination
from graftlm.merging.sources import Raw
from graftlm.merging.stream import CHUNK, COPIES, RAM, default_threads

__all__ = ["Forecast", "forecast"]

SAMPLE = 1 << 18
"""Numbers on which the arithmetic is timed."""

SAMPLE_BYTES = 1 << 26
"""Bytes of the base on which reading is timed."""


@dataclass(frozen=True)
class Forecast:
    """One merge in numbers.

    Attributes:
        parameters: merged numbers of one model.
        passes: how often every input is read; the first of two finds thresholds.
        memory_bytes: at most, anonymous; the page cache is the system's.
        seconds: wall time, from the speed of a sample of this machine's arithmetic and reading.
    """

    parameters: int
    models: int
    read_bytes: int
    written_bytes: int
    passes: int
    memory_bytes: int
    seconds: float
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def forecast(inputs: Inputs, threads: int | None = None) -> Forecast:
    """Measure a little, and say what the whole will take."""
    threads = threads or default_threads()
    count = len(inputs.models)
    passes, memory, per_number = 1, RAM, 0.0
    if inputs.recipe.rule in COMPOSERS:
        how = combination(inputs.recipe)
        passes = 2 if how.scans else 1
        width = max(
            inputs.base.tensors[name].numel // max(inputs.base.tensors[name].shape[:1] or (1,)) for name in inputs.names
        )
        piece = max(CHUNK, 8 * width) * (4 * (count + 2) + count * (how.keep != "merged"))
        tallies = count * (3 << 16) * 8 + count * kernels.BINS * 24
        memory = 200_000_000 + threads * (2 * piece + tallies)
        per_number = _arithmetic(inputs, count)
    else:
        largest = max(inputs.base.tensors[name].numel for name in inputs.names)
        memory = min(RAM, 4 * largest * (count + 1 + COPIES)) + 400_000_000
        threads = 1
    read = sum(path.stat().st_size for path in inputs.files)
    written = needed_bytes(inputs)
    seconds = (passes * read + written) / _bandwidth(next(iter(inputs.base.tensors.values()))) + (
        inputs.numel * per_number / threads
    )
    return Forecast(inputs.numel, count, read, written, passes, memory, seconds, threads)


def _arithmetic(inputs: Inputs, count: int) -> float:
    """Seconds per merged number, all passes together, on one thread."""
    how = combination(inputs.recipe)
    bfloat = all(inputs.base.tensors[name].dtype == "BF16" for name in inputs.names)
    rng = np.random.default_rng(0)
    form = np.uint16 if bfloat else np.float32
    base: Raw = rng.integers(0x3C00, 0x3D00, SAMPLE).astype(np.uint16)
    models: Raw = base[None] + rng.integers(0, 4, (count, SAMPLE)).astype(np.uint16)
    if not bfloat:
        base, models = ((x.astype(np.uint32) << 16).view(np.float32) for x in (base, models))
    out, f32 = np.empty(SAMPLE, form), np.float32
    masks = np.empty((count, SAMPLE), np.bool_) if how.keep == "masks" else np.zeros((0, 0), np.bool_)
    limits, keys = np.full(count, 1, np.uint32), np.zeros(count, np.uint64)
    halves, none = np.full(count, 0.5, np.float32), np.zeros((0, 0))
    counts, fine = np.zeros((4, kernels.BINS), np.int32), np.zeros(3 << 16, np.int64)
    scales = np.empty(64, np.float32)

    def walk() -> None:
        if how.scans:
            for model in models:
                kernels.histogram(base, model, counts, np.uint32(0x7F00), fine)
        if how.keep == "signs":
            for model in models:
                kernels.signs(base, model, SAMPLE // 64, np.empty(SAMPLE, np.bool_), scales)
        elif how.thin == "none" and how.combine == "average":
            kernels.average(base, models, np.ones(count), f32(1), out)
        else:
            thin, combine = kernels.THIN[how.thin], kernels.COMBINE[how.combine]
            moments = np.zeros((count, 2)) if how.rescale else none
            kernels.merge(
                *(
                    base,
                    models,
                    thin,
                    limits,
                    keys,
                    0,
                    f32(1),
                    combine,
                    f32(0),
                    f32(1),
                    out,
                    True,
                    halves,
                    masks,
                    moments,
                )
            )

    walk()  # compiles, the first time
    start = time.perf_counter()
    for _ in range(4):
        walk()
    return (time.perf_counter() - start) / (4 * SAMPLE)


def _bandwidth(info: TensorInfo) -> float:
    """Bytes per second of reading a sample of a file."""
    start, done = time.perf_counter(), 0
    with info.file.open("rb", buffering=0) as file:
        while done < SAMPLE_BYTES and (piece := file.read(1 << 21)):
            done += len(piece)
    return max(done, 1) / max(time.perf_counter() - start, 1e-6)
