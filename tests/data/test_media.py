"""Real files decoded; broken and hostile ones named."""

from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from graftlm.core.errors import DataError
from graftlm.data.media import load_audio, load_frames, load_image, load_points


def test_image(tmp_path: Path) -> None:
    array = np.zeros((4, 6, 3), np.uint8)
    array[0, 5] = (255, 51, 0)
    Image.fromarray(array).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    assert image.shape == (3, 4, 6) and image.dtype == torch.float32
    assert image[:, 0, 5].tolist() == pytest.approx([1, 0.2, 0])
    assert load_image(tmp_path / "a.png", 8).shape == (3, 8, 8)


def video(path: Path, count: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "1"})
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv444p"
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 20 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_frames_are_sampled_uniformly(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4", 8)
    frames = load_frames(tmp_path / "a.mp4", 4, 16)
    assert frames.shape == (4, 3, 16, 16)
    assert [round(float(f.mean()) * 255 / 20) for f in frames] == [1, 3, 5, 7]


def test_a_short_clip_repeats_frames(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4", 2)
    assert load_frames(tmp_path / "a.mp4", 4).shape[0] == 4


def test_audio_becomes_mono_at_the_asked_rate(tmp_path: Path) -> None:
    wave = np.stack([np.full(1600, 0.5), np.full(1600, -0.1)], axis=1)
    soundfile.write(tmp_path / "a.wav", wave, 16000)
    assert load_audio(tmp_path / "a.wav", 16000)[800].item() == pytest.approx(0.2, abs=1e-3)
    assert abs(len(load_audio(tmp_path / "a.wav", 8000)) - 800) <= 1


HEADER = "ply\nformat {form} 1.0\nelement vertex {count}\n{properties}end_header\n"
PLAIN = "".join(f"property float {axis}\n" for axis in "xyz")
COLORS = "".join(f"property uchar {c}\n" for c in ("red", "green", "blue"))


def test_points_ascii_and_binary(tmp_path: Path) -> None:
    ascii_file = HEADER.format(form="ascii", count=2, properties=PLAIN + COLORS) + "0 1 2 255 0 0\n3 4 5 0 51 0\n"
    (tmp_path / "a.ply").write_text(ascii_file)
    points = load_points(tmp_path / "a.ply")
    assert points.tolist()[1] == pytest.approx([3, 4, 5, 0, 0.2, 0])
    body = np.array([(9, 0, 1, 2)], dtype=[("w", "<f8"), ("z", "<f4"), ("y", "<f4"), ("x", "<f4")]).tobytes()
    mixed = "property double w\nproperty float z\nproperty float y\nproperty float x\n"
    head = HEADER.format(form="binary_little_endian", count=1, properties=mixed).encode()
    (tmp_path / "b.ply").write_bytes(head + body)
    assert load_points(tmp_path / "b.ply").tolist() == [[2, 1, 0, 0, 0, 0]]


def test_points_from_numpy_without_pickle(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((3, 6), np.float32))
    assert load_points(tmp_path / "a.npy").shape == (3, 6)
    np.savez(tmp_path / "b.npz", points=np.ones((3, 3), np.float32))
    assert load_points(tmp_path / "b.npz")[:, 3:].sum() == 0
    np.save(tmp_path / "c.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"c\.npy: corrupt point cloud"):
        load_points(tmp_path / "c.npy")
    np.save(tmp_path / "d.npy", np.ones((3, 4)))
    with pytest.raises(DataError, match=r"shape \(3, 4\); \(P, 3\) or \(P, 6\) is expected"):
        load_points(tmp_path / "d.npy")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not a ply", "no header"),
        (HEADER.format(form="ascii", count=10**12, properties=PLAIN) + "0 0 0\n", "points, but only"),
        (HEADER.format(form="binary_little_endian", count=10**12, properties=PLAIN), "points of 12 bytes, but only 0"),
        (HEADER.format(form="ascii", count=1, properties="property list uchar int i\n") + "0\n", "not a plain number"),
        (HEADER.format(form="ascii", count=1, properties=PLAIN) + "0 nan 0\n", "not finite"),
        (HEADER.format(form="ascii", count=0, properties=PLAIN), "no point"),
        (HEADER.format(form="ascii", count=1, properties="property float x\n") + "0\n", "corrupt PLY"),
        (HEADER.format(form="binary_big_endian", count=1, properties=PLAIN), "binary_little_endian is expected"),
        ("ply\nformat ascii 1.0\nelement face 1\nend_header\n", "first element is not 'vertex'"),
    ],
)
def test_hostile_point_clouds(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.ply").write_text(text)
    with pytest.raises(DataError, match=message):
        load_points(tmp_path / "a.ply")


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("a.png", load_image),
        ("a.mp4", lambda path: load_frames(path, 4)),
        ("a.wav", lambda path: load_audio(path, 8000)),
        ("a.ply", load_points),
        ("a.npz", load_points),
    ],
)
def test_missing_empty_and_corrupt_files_are_named(name: str, reader: object, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(DataError, match=rf"{name}: this .* is missing"):
        reader(path)  # type: ignore[operator]
    path.write_bytes(b"")
    with pytest.raises(DataError, match=rf"{name}: this .* is empty"):
        reader(path)  # type: ignore[operator]
    path.write_bytes(b"garbage" * 50)
    with pytest.raises(DataError, match=rf"{name}: corrupt"):
        reader(path)  # type: ignore[operator]
