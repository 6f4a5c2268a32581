"""The mini world's encoders: small, imperfect on purpose, trained on training scenes by `experiment.base`."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core.errors import DataError
from graftlm.data import media
from graftlm.model.encoders.base import Encoder, split_net

__all__ = ["AudioEncoder", "ImageEncoder", "PointEncoder", "VideoEncoder", "group_points", "log_mel"]

WIDTH = 128
SIDE, FRAMES = 48, 4
RATE, MELS, MEL_FRAMES = 8000, 32, 64
SLABS = 8


def _conv2d(inputs: int, outputs: int, size: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, size, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU()]


def _conv1d(inputs: int, outputs: int, size: int, stride: int) -> list[nn.Module]:
    return [nn.Conv1d(inputs, outputs, size, stride, size // 2), nn.BatchNorm1d(outputs), nn.ReLU()]


class ImageEncoder(Encoder):
    """Five convolutions: a picture of 48 x 48 becomes 4 x 4 tokens."""

    packaged = "image"
    frames = 1
    pool = 1

    def __init__(self) -> None:
        super().__init__()
        self.width, self.tokens = WIDTH, 16
        self.net = nn.Sequential(
            *_conv2d(3, 32, 5, 3),
            *_conv2d(32, 64, 3, 2),
            *_conv2d(64, 96, 3, 2),
            *_conv2d(96, WIDTH, 3, 1),
            nn.Conv2d(WIDTH, WIDTH, 1),
        )

    def read(self, source: Path) -> Tensor:
        """Float (3, 48, 48) in [0, 1]."""
        return media.load_image(source, SIDE)

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, 3, 48, 48) -> (N, 16, 128)."""
        tokens: Tensor = self.net(inputs).flatten(2).transpose(1, 2)
        return tokens

    def split(self, layers: int) -> nn.Module:
        """Up to four convolutions, and the pooling of frames behind them."""
        self.net, tail = split_net(self.net, layers)
        with torch.no_grad():
            _, width, side, _ = self.net(torch.zeros(1, 3, SIDE, SIDE)).shape
        taken = MapTail(tail, self.frames, side, self.pool)
        self.width, self.tokens, self.pool = width, self.frames * side**2, 1
        return taken


class VideoEncoder(ImageEncoder):
    """The image encoder on four frames, each pooled to 2 x 2 tokens."""

    frames = FRAMES
    pool = 2

    def read(self, source: Path) -> Tensor:
        """Float (4, 3, 48, 48), frames sampled uniformly."""
        return media.load_frames(source, FRAMES, SIDE)

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, 4, 3, 48, 48) -> (N, 16, 128)."""
        maps = self.net(inputs.flatten(0, 1))
        pooled: Tensor = F.avg_pool2d(maps, self.pool).flatten(2).transpose(1, 2)
        return pooled.reshape(len(inputs), self.tokens, self.width)


class AudioEncoder(Encoder):
    """Four convolutions over a log-mel spectrogram: a second of sound becomes 16 tokens."""

    packaged = "audio"

    def __init__(self) -> None:
        super().__init__()
        self.width, self.tokens = WIDTH, 16
        self.net = nn.Sequential(
            *_conv1d(MELS, 96, 5, 2),
            *_conv1d(96, WIDTH, 5, 2),
            *_conv1d(WIDTH, WIDTH, 3, 1),
            nn.Conv1d(WIDTH, WIDTH, 5, 1, 2),
        )

    def read(self, source: Path) -> Tensor:
        """Float (32, 64), the log-mel spectrogram of the first second."""
        wave = media.load_audio(source, RATE)
        return log_mel(F.pad(wave, (0, max(0, RATE - len(wave))))[None, :RATE])[0]

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, 32, 64) -> (N, 16, 128)."""
        tokens: Tensor = self.net(inputs).transpose(1, 2)
        return tokens

    def split(self, layers: int) -> nn.Module:
        """Up to three convolutions."""
        self.net, tail = split_net(self.net, layers)
        with torch.no_grad():
            _, self.width, self.tokens = self.net(torch.zeros(1, MELS, MEL_FRAMES)).shape
        return TimeTail(tail)


class PointEncoder(Encoder):
    """A PointNet per slab of the cloud, beside the whole: 512 coloured points become 8 tokens."""

    packaged = "point"

    def __init__(self) -> None:
        super().__init__()
        self.width, self.tokens = WIDTH, SLABS
        self.local = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 96))
        self.joint = nn.Sequential(nn.Linear(192, 160), nn.ReLU(), nn.Linear(160, WIDTH))

    def read(self, source: Path) -> Tensor:
        """Float (8, P / 8, 6): xyz and rgb in slabs; the last points that fill no slab are left out."""
        points = media.load_points(source)
        if len(points) < SLABS:
            raise DataError(
                f"{source}: {len(points)} points; at least {SLABS} are expected. Restore it, or use skip_bad=true."
            )
        return group_points(points[None, : len(points) // SLABS * SLABS])[0]

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, 8, P / 8, 6) -> (N, 8, 128)."""
        slabs = self.local(inputs).amax(2)
        whole = slabs.amax(1, keepdim=True).expand_as(slabs)
        tokens: Tensor = self.joint(torch.cat([slabs, whole], dim=-1))
        return tokens

    def split(self, layers: int) -> nn.Module:
        """Up to both layers of what sees slab and whole."""
        self.joint, tail = split_net(self.joint, layers, keep=0)
        self.width = tail[0].get_parameter("weight").shape[1]
        return tail


class MapTail(nn.Module):
    """Convolutions over the square maps of frames, then pooling."""

    def __init__(self, net: nn.Sequential, frames: int, side: int, pool: int) -> None:
        super().__init__()
        self.net, self.frames, self.side, self.pool = net, frames, side, pool

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, F s², E) -> (N, F (s' / pool)², E')."""
        maps = tokens.reshape(len(tokens) * self.frames, self.side**2, tokens.shape[2]).transpose(1, 2).contiguous()
        out: Tensor = F.avg_pool2d(self.net(maps.view(*maps.shape[:2], self.side, self.side)), self.pool)
        return out.flatten(2).transpose(1, 2).reshape(len(tokens), self.frames * out.shape[2] * out.shape[3], -1)


class TimeTail(nn.Module):
    """Convolutions over time."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, L, E) -> (N, L', E')."""
        out: Tensor = self.net(tokens.transpose(1, 2).contiguous()).transpose(1, 2)
        return out


def log_mel(waves: Tensor) -> Tensor:
    """Waves (N, T) at 8 kHz as log-mel spectrograms (N, 32, 64), about 125 samples a frame."""
    size = 256
    frequencies = torch.linspace(0, RATE / 2, size // 2 + 1)
    mels = 2595 * torch.log10(1 + frequencies / 700)
    edges = torch.linspace(0, float(mels[-1]), MELS + 2)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    filters = torch.minimum((mels - low) / (middle - low), (high - mels) / (high - middle)).clamp_min(0)
    power = torch.stft(waves, size, 125, window=torch.hann_window(size), return_complex=True).abs() ** 2
    return ((filters @ power).clamp_min(1e-5).log()[..., :MEL_FRAMES] + 4) / 4


def group_points(clouds: Tensor) -> Tensor:
    """Clouds (N, P, 6) in 8 slabs (N, 8, P / 8, 6): four in height, each cut in two across x."""
    count = len(clouds)
    by_height = clouds.gather(1, clouds[..., 2].argsort(1)[..., None].expand_as(clouds))
    quarters = by_height.view(count * 4, -1, 6)
    halves = quarters.gather(1, quarters[..., 0].argsort(1)[..., None].expand_as(quarters))
    return halves.reshape(count, SLABS, -1, 6)
