"""Encoders: frozen, told apart by their fingerprint, and loaded or refused."""

import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graftlm.core.errors import CheckpointError, ConfigError, DataError
from graftlm.model.encoders import ENCODERS
from graftlm.model.encoders.base import Encoder, build_encoder
from graftlm.model.encoders.mini import PointEncoder, VideoEncoder, group_points, log_mel
from graftlm.model.specs import EncoderSpec

MINI = {"mini-image": (3, 48, 48), "mini-video": (4, 3, 48, 48), "mini-audio": (32, 64), "mini-point": (8, 64, 6)}


class Strided(Encoder):
    """Its setting changes no weight."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.width, self.tokens, self.stride = 2, 1, stride
        self.net = nn.Linear(3, 2)

    def read(self, source: Path) -> Tensor:
        return torch.zeros(3)

    def forward(self, inputs: Tensor) -> Tensor:
        tokens: Tensor = self.net(inputs)[:, None]
        return tokens


@pytest.fixture(autouse=True)
def strided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ENCODERS, "_table", ENCODERS._table | {"strided": f"{__name__}:Strided"})


@pytest.mark.parametrize("kind", sorted(MINI))
def test_the_mini_encoders(kind: str) -> None:
    """Of the promised shape, and an item does not see its neighbours."""
    encoder = build_encoder(EncoderSpec(kind, "miniworld"))
    x = torch.rand(3, *MINI[kind])
    out = encoder(x)
    assert out.shape == (3, encoder.tokens, encoder.width)
    torch.testing.assert_close(out[1:2], encoder(x[1:2]), atol=1e-4, rtol=1e-4)
    assert not out.requires_grad


@pytest.mark.parametrize("kind", sorted(MINI))
def test_frozen_means_frozen(kind: str) -> None:
    encoder = build_encoder(EncoderSpec(kind))
    nn.ModuleDict({"x": encoder}).train()
    before = {name: x.clone() for name, x in encoder.state_dict().items()}
    encoder(torch.rand(3, *MINI[kind]))
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    assert all(torch.equal(before[name], x) for name, x in encoder.state_dict().items())


def test_random_weights_are_the_same_everywhere() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = build_encoder(EncoderSpec("mini-image"))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert build_encoder(EncoderSpec("mini-image")).fingerprint() == one.fingerprint()


def test_a_fingerprint_is_kind_settings_and_weights(tmp_path: Path) -> None:
    encoder = build_encoder(EncoderSpec("strided"))
    seen = [encoder.fingerprint(), build_encoder(EncoderSpec("strided", None, {"stride": 2})).fingerprint()]
    with torch.no_grad():
        encoder.net.bias += 1
    seen.append(encoder.fingerprint())
    save_file(encoder.state_dict(), tmp_path / "e.safetensors")
    assert build_encoder(EncoderSpec("strided", str(tmp_path / "e.safetensors"))).fingerprint() == seen[-1]
    seen += [build_encoder(EncoderSpec(kind)).fingerprint() for kind in ("mini-image", "mini-video")]
    assert len(set(seen)) == len(seen)
    assert seen[-1] == build_encoder(EncoderSpec("mini-video")).to(torch.device("cpu")).fingerprint()


def test_half_precision_files_are_read_as_float32(tmp_path: Path) -> None:
    encoder = build_encoder(EncoderSpec("mini-image"))
    halves = {k: x.half() if x.is_floating_point() else x for k, x in encoder.state_dict().items()}
    save_file(halves, tmp_path / "e.safetensors")
    loaded = build_encoder(EncoderSpec("mini-image", str(tmp_path / "e.safetensors"))).state_dict()
    assert loaded["net.0.weight"].dtype == torch.float32 and loaded["net.1.num_batches_tracked"].dtype == torch.int64
    assert torch.equal(loaded["net.0.weight"], halves["net.0.weight"].float())


def without_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path)


def of_another_shape(path: Path) -> None:
    save_file({k: x.repeat(2) for k, x in load_file(path).items() if x.dim() == 1}, path)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def no_safetensors(path: Path) -> None:
    path.write_bytes(b"weights")


@pytest.mark.parametrize("damage", [without_a_tensor, of_another_shape, truncated, no_safetensors])
def test_weights_that_do_not_fit(damage: Any, tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    save_file(build_encoder(EncoderSpec("mini-point")).state_dict(), path)
    damage(path)
    with pytest.raises(
        CheckpointError, match=rf"encoder mini-point: {path} does not fit \((?s:.*)\)\. Use the weights of"
    ):
        build_encoder(EncoderSpec("mini-point", str(path)))


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no weights at .*none\.safetensors; .* Correct model\.modalities"):
        build_encoder(EncoderSpec("mini-image", str(tmp_path / "none.safetensors")))
    with pytest.raises(CheckpointError, match=r"encoder strided: no weights at .*\. Run `graftlm build-base`"):
        build_encoder(EncoderSpec("strided", "miniworld"))


def test_unknown_kinds_and_settings() -> None:
    with pytest.raises(ConfigError, match="no encoder 'mini-imag'; did you mean 'mini-image'"):
        build_encoder(EncoderSpec("mini-imag"))
    with pytest.raises(ConfigError, match=r"encoder strided: .*'strid'.*\. Correct model\.modalities\.\*\.encoder"):
        build_encoder(EncoderSpec("strided", None, {"strid": 2}))


# --- reading ----------------------------------------------------------------------------------------------------------


def write_tone(path: Path, seconds: float) -> None:
    samples = (np.sin(np.arange(round(8000 * seconds)) * 0.3) * 20000).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(samples.tobytes())


def test_reading_gives_what_forward_takes(tmp_path: Path) -> None:
    Image.new("RGB", (64, 20), (10, 200, 30)).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((515, 6), dtype=np.float32))
    for name, seconds in (("short", 0.3), ("long", 1.7)):
        write_tone(tmp_path / f"{name}.wav", seconds)
    for kind, file in (
        ("mini-image", "a.png"),
        ("mini-point", "a.npy"),
        ("mini-audio", "short.wav"),
        ("mini-audio", "long.wav"),
    ):
        encoder = build_encoder(EncoderSpec(kind))
        x = encoder.read(tmp_path / file)
        assert x.shape == MINI[kind] and x.dtype == torch.float32 and encoder(x[None]).isfinite().all()


def test_a_cloud_of_too_few_points(tmp_path: Path) -> None:
    np.save(tmp_path / "few.npy", np.zeros((7, 6), dtype=np.float32))
    with pytest.raises(DataError, match=r"few\.npy: 7 points; at least 8 are expected"):
        PointEncoder().read(tmp_path / "few.npy")


@pytest.mark.parametrize(("kind", "name"), [("mini-image", "x.png"), ("mini-video", "x.mp4"), ("mini-audio", "x.wav")])
def test_a_corrupt_file_is_named(kind: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"no media at all" * 9)
    with pytest.raises(DataError, match=name):
        build_encoder(EncoderSpec(kind)).read(tmp_path / name)


def test_slabs_are_a_partition_ordered_in_height() -> None:
    clouds = torch.rand(2, 64, 6)
    slabs = group_points(clouds)
    assert slabs.shape == (2, 8, 8, 6)
    for cloud, parts in zip(clouds, slabs, strict=True):
        assert sorted(map(tuple, cloud.tolist())) == sorted(map(tuple, parts.flatten(0, 1).tolist()))
        heights = parts[..., 2].unflatten(0, (4, 2)).flatten(1)
        assert bool((heights.amax(1)[:-1] <= heights.amin(1)[1:]).all())
        assert bool((parts[0::2, :, 0].amax(1) <= parts[1::2, :, 0].amin(1)).all())
    torch.testing.assert_close(group_points(clouds[:, torch.randperm(64)]).sort(2).values, slabs.sort(2).values)


def test_a_tone_is_loudest_in_its_band() -> None:
    time = torch.arange(8000) / 8000
    low, high = (log_mel(torch.sin(2 * torch.pi * f * time)[None])[0].mean(1).argmax() for f in (300, 3000))
    assert low < high


def test_a_still_video_is_its_image_four_times() -> None:
    encoder = build_encoder(EncoderSpec("mini-video", "miniworld"))
    assert isinstance(encoder, VideoEncoder)
    tokens = encoder(torch.rand(1, 1, 3, 48, 48).expand(1, 4, -1, -1, -1)).unflatten(1, (4, 4))
    torch.testing.assert_close(tokens, tokens[:, :1].expand_as(tokens))
