"""Media files as float32 tensors: Pillow, PyAV, soundfile, and a small reader of point clouds.

A file that is missing, cut short or of another kind is a `DataError` that names it.
"""

import os
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from graftlm.core.errors import DataError

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream
    from numpy.typing import NDArray
    from soundfile import SoundFile

__all__ = ["load_audio", "load_frames", "load_image", "load_points"]

HEADER_LIMIT = 65536
"""A PLY header longer than this is not one."""

FEWEST_FRAMES = 0.95
"""Share of the frames that a container promises; with fewer (one is forgiven) the file was cut short."""

AUDIO_BLOCK = 1 << 20
"""Samples that are read at a time."""

RATES = range(1000, 1_000_001)
"""Samples per second of a sound; a header with another rate is wrong, and resampling by it would fill the memory."""

COUNT = re.compile("[0-9]{1,15}")
"""A number of points; longer ones are no number of anything."""

BRIGHTEST = 1.5
"""Colours beyond this are bytes. Rounding may bring a colour a little above 1, and no byte lies between 1 and 2."""

ARRAY_ERRORS = (
    *(OSError, ValueError, LookupError, EOFError, TypeError, MemoryError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError, SyntaxError, struct.error),
)
"""What NumPy and zipfile raise at a damaged or hostile file: a locked member, an unknown compression, a header of code."""

PLY_TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4", "double": "f8",
    "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4", "float32": "f4",
    "float64": "f8",
}  # fmt: skip


def load_image(path: Path, size: int | None = None) -> Tensor:
    """A picture, Float (3, H, W) in [0, 1]; resized to ``size`` x ``size`` (bicubic) if that is given and differs."""
    from PIL import Image

    _expect_file(path, "image")
    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
            if size is not None and rgb.size != (size, size):
                rgb = rgb.resize((size, size), Image.Resampling.BICUBIC)
            array = np.asarray(rgb, dtype=np.float32)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _corrupt(path, "image", error) from error
    return torch.from_numpy(array / 255).permute(2, 0, 1).contiguous()


def load_frames(path: Path, count: int, size: int | None = None) -> Tensor:
    """``count`` frames of a clip, sampled uniformly, Float (count, 3, H, W) in [0, 1]; a short clip repeats frames."""
    import av
    from PIL import Image

    _expect_file(path, "video")
    try:
        total = _count_frames(path)
        wanted = [int((i + 0.5) * total / count) for i in range(count)]
        # Decoded twice, so that a clip of minutes never lies in memory as pictures.
        frames = {i: frame.to_image() for i, frame in enumerate(_decoded(path)) if i in wanted}  # type: ignore[no-untyped-call]
        chosen = [frames[i] for i in wanted]
        if size is not None:
            chosen = [f if f.size == (size, size) else f.resize((size, size), Image.Resampling.BICUBIC) for f in chosen]
        array = np.stack([np.asarray(frame.convert("RGB"), dtype=np.float32) for frame in chosen])
    except (av.error.FFmpegError, OSError, LookupError, ValueError) as error:
        raise _corrupt(path, "video", error) from error
    return torch.from_numpy(array / 255).permute(0, 3, 1, 2).contiguous()


def load_audio(path: Path, rate: int) -> Tensor:
    """A sound in mono at ``rate`` samples per second, Float (T,)."""
    import soundfile
    import soxr

    _expect_file(path, "audio")
    try:
        _expect_whole_wave(path)
        with soundfile.SoundFile(path) as file:
            own_rate = file.samplerate
            if own_rate not in RATES:
                raise ValueError(f"{own_rate} samples per second; {RATES[0]} to {RATES[-1]} are expected")
            # By blocks: a header may promise more than there is, and would be given the memory for it.
            wave = np.concatenate([np.empty((0, file.channels), np.float32), *_blocks(file)])
    except (soundfile.LibsndfileError, OSError, RuntimeError, ValueError) as error:
        raise _corrupt(path, "audio", error) from error
    if not len(wave):
        raise DataError(
            f"{path}: no sample in this sound. At least one is expected; restore the file, or use skip_bad=true."
        )
    mono = wave.mean(axis=1)
    if not np.isfinite(mono).all():
        raise _corrupt(path, "audio", "a value is not finite")
    return torch.from_numpy(mono if own_rate == rate else soxr.resample(mono, own_rate, rate).astype(np.float32))


def load_points(path: Path) -> Tensor:
    """A point cloud, Float (P, 6): x, y, z, and red, green, blue in [0, 1] (zero where the file has no colour)."""
    _expect_file(path, "point cloud")
    if path.suffix.lower() == ".ply":
        return _read_ply(path)
    try:
        points = _read_array(path)
    except ARRAY_ERRORS as error:
        raise _corrupt(path, "point cloud", error) from error
    if points.ndim != 2 or points.shape[1] not in (3, 6) or not len(points):
        raise DataError(f"{path}: an array of shape {points.shape}; (P, 3) or (P, 6) is expected.")
    return _points(path, points[:, :3], points[:, 3:] if points.shape[1] == 6 else np.zeros_like(points))


def _points(path: Path, position: "NDArray[np.float32]", color: "NDArray[np.float32]") -> Tensor:
    points = np.concatenate([position, color], axis=1)
    if not np.isfinite(points).all():
        raise _corrupt(path, "point cloud", "a coordinate or a colour is not finite")
    if points[:, 3:].max() > BRIGHTEST:
        points[:, 3:] /= 255
    return torch.from_numpy(points)


def _read_array(path: Path) -> "NDArray[np.float32]":
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                return _numbers(archive[archive.files[0]])
    # Mapped, so that a shape that the file cannot hold is refused before memory is given to it.
    return _numbers(np.load(path, mmap_mode="r", allow_pickle=False))


def _numbers(array: "NDArray[Any]") -> "NDArray[np.float32]":
    if np.asarray(array).dtype.kind not in "iuf":
        raise ValueError("its values are not real numbers")
    with np.errstate(over="ignore"):  # too large for 32 bits is infinite, and refused as such
        return np.array(array, dtype=np.float32)


def _decoded(path: Path) -> "Iterator[VideoFrame]":
    import av

    with av.open(str(path)) as container:
        yield from container.decode(_pictures(container))


def _pictures(container: "InputContainer") -> "VideoStream":
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise ValueError("there is no decoder of its codec")
    stream.codec_context.thread_count = 1  # the same bytes on every machine and at every load
    return stream


def _blocks(file: "SoundFile") -> "Iterator[NDArray[np.float32]]":
    while len(block := file.read(AUDIO_BLOCK, dtype="float32", always_2d=True)):
        yield block


def _count_frames(path: Path) -> int:
    import av

    with av.open(str(path)) as container:
        stream = _pictures(container)
        total, claimed = sum(1 for _ in container.decode(stream)), stream.frames  # zero where the format does not say
    if not total:
        raise DataError(
            f"{path}: no frame in this video. At least one is expected; restore the file, or use skip_bad=true."
        )
    if total < FEWEST_FRAMES * claimed - 1:
        raise _corrupt(path, "video", f"it ends after {total} of {claimed} frames")
    return total


def _expect_whole_wave(path: Path) -> None:
    """Libsndfile reads a WAV file that was cut short as a shorter sound; its header knows better."""
    with path.open("rb") as file:
        head = file.read(12)
    claimed = int.from_bytes(head[4:8], "little") + 8
    streamed = claimed in (8, 2**32 + 7)  # written to a pipe: the size was never filled in
    if head[:4] == b"RIFF" and not streamed and claimed > path.stat().st_size + 1:
        raise _corrupt(path, "audio", f"{path.stat().st_size} of {claimed} bytes")


def _read_ply(path: Path) -> Tensor:
    try:
        data = path.read_bytes()
        end = re.search(rb"(?m)^end_header\r?\n", data[:HEADER_LIMIT])
        if not data.startswith(b"ply") or end is None:
            raise ValueError("no header")
        form, count, dtype = _ply_header(data[: end.end()].decode("ascii", "replace"))
        vertices = _ply_vertices(data[end.end() :], form, count, dtype)
    except (OSError, ValueError, LookupError) as error:
        raise _corrupt(path, "PLY file", error) from error
    position, color = _columns(vertices, ("x", "y", "z")), np.zeros((count, 3), np.float32)
    if {"red", "green", "blue"} <= set(vertices):
        color = _columns(vertices, ("red", "green", "blue"))
        color /= 255 if dtype["red"].kind in "iu" else 1
    return _points(path, position, color)


def _ply_header(header: str) -> "tuple[str, int, np.dtype[Any]]":
    """Format, number of points and the type of one; the vertices must come first."""
    words = [line.split() for line in header.split("\n") if line.strip()]
    form = next((w[1] for w in words if w[0] == "format" and len(w) > 1), "")
    places = [i for i, w in enumerate(words) if w[0] == "element"]
    element = words[places[0]] if places else []
    if element[1:2] != ["vertex"] or len(element) != 3 or not COUNT.fullmatch(element[2]):
        raise ValueError("its first element is not 'vertex' with a count")
    if not int(element[2]):
        raise ValueError("no point")
    stop = places[1] if len(places) > 1 else len(words)
    properties = [w for w in words[places[0] : stop] if w[0] == "property"]
    if any(len(w) != 3 or w[1] not in PLY_TYPES for w in properties):
        raise ValueError("a vertex property is not a plain number")
    names = [w[2] for w in properties]
    if len(set(names)) != len(names):
        raise ValueError("two vertex properties of one name")
    if not {"x", "y", "z"} <= set(names):
        raise ValueError(f"vertex properties {names}; x, y and z are expected")
    return form, int(element[2]), np.dtype([(w[2], "<" + PLY_TYPES[w[1]]) for w in properties])


def _ply_vertices(body: bytes, form: str, count: int, dtype: "np.dtype[Any]") -> "dict[str, NDArray[Any]]":
    names = dtype.names or ()
    if form == "binary_little_endian":
        if count * dtype.itemsize > len(body):
            raise ValueError(f"{count} points of {dtype.itemsize} bytes, but only {len(body)} bytes follow")
        return {name: np.frombuffer(body, dtype, count)[name] for name in names}
    if form == "ascii":
        lines = body.split(b"\n", count)[:count]
        if len(lines) < count or not lines[-1].strip():
            raise ValueError(f"{count} points, but only {len(lines)} lines follow")
        table = np.array([line.split()[: len(names)] for line in lines], dtype=np.float64)
        return {name: table[:, i] for i, name in enumerate(names)}
    raise ValueError(f"format '{form}'; ascii or binary_little_endian is expected")


def _columns(vertices: "dict[str, NDArray[Any]]", names: tuple[str, ...]) -> "NDArray[np.float32]":
    with np.errstate(over="ignore"):  # too large for 32 bits is infinite, and refused as such
        return np.stack([vertices[name].astype(np.float32) for name in names], axis=1)


def _expect_file(path: Path, kind: str) -> None:
    if not path.is_file():
        raise DataError(
            f"{path}: this {kind} is missing. Restore the file, or leave its samples out with skip_bad=true."
        )
    if os.path.getsize(path) == 0:
        raise DataError(f"{path}: this {kind} is empty. Restore the file, or leave its samples out with skip_bad=true.")


def _corrupt(path: Path, kind: str, error: object) -> DataError:
    return DataError(
        f"{path}: corrupt {kind} ({error}). Restore the file, or leave its samples out with skip_bad=true."
    )
