"""Media files as data URIs that any browser shows without asking another file.

What a file is follows from its suffix. Everything is made small first: a page carries dozens of them.
"""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import numpy.typing as npt
import soundfile
from PIL import Image

from graftlm.core.errors import DataError

__all__ = ["Budget", "Shown", "show"]

Kind = Literal["image", "video", "audio", "point", "note"]
Floats = npt.NDArray[np.float32]

SUFFIXES: Mapping[Kind, tuple[str, ...]] = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"),
    "video": (".mp4", ".avi", ".mkv", ".webm", ".mov"),
    "audio": (".wav", ".flac", ".ogg", ".mp3"),
    "point": (".ply", ".npy", ".npz"),
}
SIDE = 320
"""Longest side of a picture, pixels."""
FRAMES, SECONDS, RATE, POINTS = 16, 10, 16_000, 1536


@dataclass(frozen=True)
class Shown:
    """One media item as the page shows it.

    Attributes:
        uri: of the picture, animation or sound; empty for "point" and "note".
        still: of the static form: frames side by side, or three views of a point cloud.
        points: base64 of uint8 (P, 6): x, y, z, red, green, blue.
        peaks: loudness over time, 0 to 1.
        pixelated: whether the picture is so small that it should not be smoothed.
        text: what to say instead of, or about, the item.
    """

    kind: Kind
    modality: str
    name: str
    text: str = ""
    uri: str = ""
    still: str = ""
    points: str = ""
    peaks: tuple[float, ...] = ()
    pixelated: bool = False

    @property
    def size(self) -> int:
        """Characters that the item adds to the page."""
        return len(self.uri) + len(self.still) + len(self.points) + 20 * len(self.peaks)


@dataclass
class Budget:
    """How many characters of media a page may still take."""

    left: int
    _seen: dict[tuple[str, str], Shown] = field(default_factory=dict)

    def show(self, media: Mapping[str, Any], root: Path) -> Shown:
        """Like `show`, but a note once the page is full."""
        modality, source = str(media.get("modality", "")), str(media.get("source", ""))
        key = modality, source
        if key not in self._seen:
            self._seen[key] = show(modality, root / source)
        shown = self._seen[key]
        if shown.size > self.left:
            return Shown("note", modality, shown.name, f"{modality} left out: the page is full")
        self.left -= shown.size
        return shown


def show(modality: str, path: Path) -> Shown:
    """One media file, made small; a missing or damaged one becomes a note that says so."""
    if not path.is_file():
        return Shown("note", modality, path.name, f"media missing: {path.name}")
    kind = next((kind for kind, suffixes in SUFFIXES.items() if path.suffix.lower() in suffixes), "note")
    try:
        match kind:
            case "image":
                return _image(modality, path)
            case "video":
                return _video(modality, path)
            case "audio":
                return _audio(modality, path)
            case "point":
                return _points(modality, path)
    except (OSError, ValueError, IndexError, RuntimeError, av.FFmpegError, DataError, Image.DecompressionBombError):
        return Shown("note", modality, path.name, f"media unreadable: {path.name}")
    return Shown("note", modality, path.name, f"no picture for this kind of file: {path.name}")


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _webp(images: list[Image.Image], milliseconds: int = 0) -> str:
    file = io.BytesIO()
    lossless = max(images[0].size) <= 128
    first, *rest = images
    moving = {"save_all": True, "append_images": rest, "duration": milliseconds} if rest else {}
    first.save(file, "WEBP", quality=80, lossless=lossless, **moving)
    return _uri("image/webp", file.getvalue())


def _small(image: Image.Image, side: int = SIDE) -> Image.Image:
    image = image.convert("RGB")
    image.thumbnail((side, side))
    return image


def _image(modality: str, path: Path) -> Shown:
    with Image.open(path) as image:
        text = f"{image.width} × {image.height}"
        return Shown("image", modality, path.name, text, _webp([_small(image)]), pixelated=max(image.size) <= 128)


def _video(modality: str, path: Path) -> Shown:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        # Long clips are thinned while they are decoded, so that memory stays small.
        every, count, frames = max(1, stream.frames // (2 * FRAMES)), 0, []
        for count, frame in enumerate(container.decode(stream), 1):
            if (count - 1) % every == 0:
                frames.append(_small(Image.fromarray(frame.to_ndarray(format="rgb24")), 240))
        seconds = count / float(stream.average_rate or 4)
    if not frames:
        raise DataError(f"{path}: a video without frames - at least one was expected - replace the file.")
    chosen = [frames[i] for i in np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().astype(int)]
    # A clip of a few frames would flash by at its true rate.
    duration = max(int(1000 * seconds / len(chosen)), 2400 // len(chosen) if len(chosen) < 8 else 40)
    text = f"{count} frames, {seconds:.1f} s"
    still = _webp([_strip([chosen[i] for i in np.linspace(0, len(chosen) - 1, min(4, len(chosen))).astype(int)])])
    tiny = max(frames[0].size) <= 128
    return Shown("video", modality, path.name, text, _webp(chosen, duration), still, pixelated=tiny)


def _strip(images: list[Image.Image]) -> Image.Image:
    side = 96
    strip = Image.new("RGB", (len(images) * (side + 4) - 4, side), "#808080")
    for i, image in enumerate(images):
        strip.paste(image.resize((side, side)), (i * (side + 4), 0))
    return strip


def _audio(modality: str, path: Path) -> Shown:
    with soundfile.SoundFile(path) as file:
        rate, seconds = file.samplerate, len(file) / file.samplerate
        wave: Floats = file.read(SECONDS * rate, dtype="float32", always_2d=True).mean(axis=1)
    if rate > RATE and len(wave):
        count = int(len(wave) * RATE / rate)
        wave = np.interp(np.linspace(0, len(wave) - 1, count), np.arange(len(wave)), wave).astype(np.float32)
        rate = RATE
    data = io.BytesIO()
    soundfile.write(data, wave, rate, format="WAV", subtype="PCM_16")
    peaks = [float(np.abs(part).max()) if len(part) else 0.0 for part in np.array_split(wave, 96)]
    loudest = max(peaks) or 1.0
    text = f"{seconds:.1f} s" + (f", the first {SECONDS} s" if seconds > SECONDS else "")
    uri = _uri("audio/wav", data.getvalue())
    return Shown("audio", modality, path.name, text, uri, peaks=tuple(round(peak / loudest, 3) for peak in peaks))


def _points(modality: str, path: Path) -> Shown:
    from graftlm.data.media import load_points

    cloud: Floats = load_points(path).numpy()
    keep = np.linspace(0, len(cloud) - 1, min(POINTS, len(cloud))).astype(int)
    xyz, rgb = cloud[keep, :3], cloud[keep, 3:6]
    if not rgb.any():  # a file without colours reads as black, on a dark ground
        rgb = np.full_like(rgb, 0.8)
    # Centred, the farthest point on the unit ball: any rotation stays in view.
    unit = xyz - (xyz.min(axis=0) + xyz.max(axis=0)) / 2
    unit = unit / max(float(np.linalg.norm(unit, axis=1).max()), 1e-9)
    packed = np.concatenate([(unit + 1) * 127.5, rgb * 255], axis=1).clip(0, 255).round().astype(np.uint8)
    x, y, z = unit.T
    views = _strip([_view(*axes, rgb) for axes in ((x, z, -y), (y, z, x), (x, y, z))])
    text = f"{len(cloud)} points: front, side, top"
    data = base64.b64encode(packed.tobytes()).decode()
    return Shown("point", modality, path.name, text, still=_webp([views]), points=data)


def _view(across: Floats, up: Floats, near: Floats, rgb: Floats) -> Image.Image:
    """An orthographic picture, each axis in [-1, 1]; far points are drawn first and darker."""
    side = 192
    picture = np.full((side, side, 3), 28, dtype=np.uint8)
    columns, rows = (((axis + 1) / 2 * (side - 8)).astype(int) for axis in (across, -up))
    for i in np.argsort(near):
        shade = (0.75 + 0.25 * near[i]) * 255
        picture[rows[i] : rows[i] + 6, columns[i] : columns[i] + 6][_dot()] = (rgb[i] * shade).clip(0, 255)
    return Image.fromarray(picture)


@cache
def _dot() -> npt.NDArray[np.bool_]:
    axis = np.arange(6) - 2.5
    return np.asarray(axis[:, None] ** 2 + axis**2 <= 7.5)
