"""Real files decoded; broken and hostile ones named."""

import struct
from collections.abc import Callable
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
    ("form", "count", "properties", "message"),
    [
        ("ascii", "9" * 5000, PLAIN, "first element is not 'vertex' with a count"),
        ("ascii", str(10**20), PLAIN, "first element is not 'vertex' with a count"),
        ("ascii", "1", "property float x\n" * 2, "two vertex properties of one name"),
        ("binary_little_endian", str(10**12), "", "corrupt PLY"),
    ],
)
def test_hostile_headers(form: str, count: str, properties: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.ply").write_text(HEADER.format(form=form, count=count, properties=properties) + "0 0 0\n")
    with pytest.raises(DataError, match=message):
        load_points(tmp_path / "a.ply")


def test_an_array_header_gets_no_memory_that_the_file_cannot_fill(tmp_path: Path) -> None:
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (10**13, 6)})
        file.write(bytes(48))
    with pytest.raises(DataError, match=r"a\.npy: corrupt point cloud"):
        load_points(tmp_path / "a.npy")


def test_colors_as_bytes_and_values_that_are_none(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", points=np.array([[300, 0, 0, 255, 51, 0]], np.float32))
    assert load_points(tmp_path / "a.npz")[0].tolist() == pytest.approx([300, 0, 0, 1, 0.2, 0])
    np.save(tmp_path / "b.npy", np.full((2, 6), np.nan))
    with pytest.raises(DataError, match=r"b\.npy: corrupt point cloud \(a coordinate or a colour is not finite"):
        load_points(tmp_path / "b.npy")
    soundfile.write(tmp_path / "c.wav", np.array([0, np.nan]), 8000, subtype="FLOAT")
    with pytest.raises(DataError, match=r"c\.wav: corrupt audio \(a value is not finite"):
        load_audio(tmp_path / "c.wav", 8000)


def test_a_flac_header_gets_no_memory_that_the_file_cannot_fill(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, np.zeros(8000), 8000)
    data = bytearray(path.read_bytes())
    data[21] |= 0x0F  # with the next four bytes: the number of samples, here 2^36 - 1
    data[22:26] = b"\xff" * 4
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.flac: corrupt audio"):
        load_audio(path, 8000)


@pytest.mark.parametrize("rate", [1, 7, 2**31 - 1])
def test_a_sound_of_an_absurd_rate_is_not_resampled(rate: int, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(1000), 8000)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[24:28] = struct.pack("<I", rate)
    (tmp_path / "a.wav").write_bytes(data)
    with pytest.raises(DataError, match=rf"a\.wav: corrupt audio \({rate} samples per second; 1000 to 1000000"):
        load_audio(tmp_path / "a.wav", 16000)


@pytest.mark.parametrize("array", [np.full((2, 6), 1e300), np.ones((2, 6), complex), np.full((2, 3), "a")])
def test_arrays_of_no_coordinates(array: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=r"a\.npy: corrupt point cloud \((a coordinate|its values are not real)"):
        load_points(tmp_path / "a.npy")


def test_headers_of_arrays_that_are_locked_unknown_or_no_literal(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 3)))
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data.replace(b"}", b"{", 1))
    np.savez(tmp_path / "good.npz", points=np.ones((2, 3)))
    data = (tmp_path / "good.npz").read_bytes()
    directory = data.index(b"PK\x01\x02")
    for name, offset, value in (("locked.npz", 8, 1), ("unknown.npz", 10, 77)):
        changed = bytearray(data)
        changed[offset - 2] = changed[directory + offset] = value
        (tmp_path / name).write_bytes(changed)
    for name in ("a.npy", "locked.npz", "unknown.npz"):
        with pytest.raises(DataError, match=rf"{name}: corrupt point cloud"):
            load_points(tmp_path / name)


def test_a_video_that_nothing_decodes_is_named(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4", 4)
    (tmp_path / "a.mp4").write_bytes((tmp_path / "a.mp4").read_bytes().replace(b"avc1", b"zzzz"))
    with pytest.raises(DataError, match=r"a\.mp4: corrupt video \(there is no decoder"):
        load_frames(tmp_path / "a.mp4", 4)


def test_ply_as_other_programs_write_it(tmp_path: Path) -> None:
    floats = "".join(f"property float {c}\n" for c in ("red", "green", "blue"))
    text = HEADER.format(form="ascii", count=1, properties="comment end_header\n" + PLAIN + floats) + "1 2 3 255 51 0\n"
    (tmp_path / "A.PLY").write_bytes(text.replace("\n", "\r\n").encode())
    assert load_points(tmp_path / "A.PLY")[0].tolist() == pytest.approx([1, 2, 3, 1, 0.2, 0])


def test_rounded_colors_are_not_taken_for_bytes(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[0, 0, 0, 1.0001, 0.5, 0]]))
    assert load_points(tmp_path / "a.npy")[0, 4].item() == 0.5


KINDS: tuple[tuple[str, Callable[[Path], torch.Tensor]], ...] = (
    ("a.png", load_image),
    ("a.jpg", load_image),
    ("a.wav", lambda path: load_audio(path, 8000)),
    ("a.flac", lambda path: load_audio(path, 8000)),
    ("a.npy", load_points),
    ("a.npz", load_points),
    ("a.ply", load_points),
)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # of Pillow and NumPy, about what then cannot be read
@pytest.mark.parametrize(("name", "reader"), KINDS)
def test_damaged_bytes_are_a_data_error_or_finite_numbers(
    name: str, reader: Callable[[Path], torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / name
    if name == "a.ply":
        body = "".join(f"{i} 1 2 255 0 9\n" for i in range(9))
        path.write_text(HEADER.format(form="ascii", count=9, properties=PLAIN + COLORS) + body)
    else:
        make(path)
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        changed = bytearray(data)
        for place in rng.integers(0, min(len(data), 250), 3):
            changed[place] = rng.choice([0, 255, 57, int(rng.integers(256))])
        path.write_bytes(changed)
        try:
            assert torch.isfinite(reader(path)).all()
        except DataError as error:
            assert name in str(error)


def test_long_sounds_are_read_whole(tmp_path: Path) -> None:
    wave = np.linspace(-0.9, 0.9, 2_100_000, dtype=np.float32)
    soundfile.write(tmp_path / "a.flac", wave, 16000, subtype="PCM_24")
    assert np.abs(load_audio(tmp_path / "a.flac", 16000).numpy() - wave).max() < 1e-5


def make(path: Path) -> None:
    rng = np.random.default_rng(0)
    match path.suffix:
        case ".wav" | ".flac":
            soundfile.write(path, rng.uniform(-0.5, 0.5, 20000), 8000)
        case ".mp4":
            video(path, 12)
        case ".avi":
            with av.open(str(path), "w") as container:
                stream = container.add_stream("mpeg4", rate=8)
                stream.width = stream.height = 64
                stream.pix_fmt = "yuv420p"
                for _ in range(40):
                    pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
                container.mux(stream.encode())
        case ".npz":
            np.savez(path, points=rng.normal(size=(300, 6)))
        case ".npy":
            np.save(path, rng.normal(size=(300, 6)))
        case _:
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("a.png", load_image),
        ("a.jpg", load_image),
        ("a.mp4", lambda path: load_frames(path, 4)),
        ("a.avi", lambda path: load_frames(path, 4)),
        ("a.wav", lambda path: load_audio(path, 8000)),
        ("a.flac", lambda path: load_audio(path, 8000)),
        ("a.npy", load_points),
        ("a.npz", load_points),
    ],
)
def test_files_cut_short_are_named(name: str, reader: object, tmp_path: Path) -> None:
    path = tmp_path / name
    make(path)
    assert torch.isfinite(reader(path)).all()  # type: ignore[operator]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"{name}: corrupt"):
        reader(path)  # type: ignore[operator]


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
