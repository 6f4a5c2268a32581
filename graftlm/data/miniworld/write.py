"""Raw arrays as real files: PNG, MP4, WAV and PLY, the same bytes for the same array."""

from pathlib import Path

import av
import numpy as np
import soundfile
from PIL import Image

from graftlm.core.errors import DataError
from graftlm.data.miniworld.canvas import SIDE, Array
from graftlm.data.miniworld.render_audio import RATE
from graftlm.data.miniworld.render_video import FRAMES

__all__ = ["SUFFIXES", "write_media"]

SUFFIXES = {"image": ".png", "video": ".mp4", "audio": ".wav", "point": ".ply"}

_VERTEX = np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3)])
_QUALITY = {"crf": "16", "preset": "ultrafast"}
"""Pixel noise survives, within about 2 of 255: encoders are trained on raw arrays."""


def write_media(path: Path, modality: str, raw: Array) -> None:
    """Store what `render.render` made, in the format of its modality.

    Raises:
        DataError: the modality is unknown.
    """
    match modality:
        case "image":
            Image.fromarray(_bytes(raw)).save(path, compress_level=1)
        case "video":
            _write_video(path, raw)
        case "audio":
            soundfile.write(path, raw, RATE, subtype="PCM_16", format="WAV")
        case "point":
            _write_points(path, raw)
        case _:
            raise DataError(f"no file format for modality '{modality}' - expected one of {', '.join(SUFFIXES)}.")


def _bytes(raw: Array) -> np.typing.NDArray[np.uint8]:
    return np.round(raw * 255).astype(np.uint8)


def _write_video(path: Path, frames: Array) -> None:
    """One second of H.264 without colour subsampling; one thread and no dates, so that bytes repeat."""
    with av.open(path, "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=FRAMES, options=_QUALITY)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv444p"
        stream.codec_context.thread_count = 1
        for frame in _bytes(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _write_points(path: Path, points: Array) -> None:
    vertices = np.empty(len(points), _VERTEX)
    vertices["xyz"], vertices["rgb"] = points[:, :3], _bytes(points[:, 3:])
    properties = [f"property float {axis}" for axis in "xyz"] + [
        f"property uchar {c}" for c in ("red", "green", "blue")
    ]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}", *properties, "end_header"]
    path.write_bytes("\n".join(header).encode() + b"\n" + vertices.tobytes())
