"""What an encoder is: a file becomes a raw input, raw inputs become tokens, and nothing is ever trained."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from graftlm.core.errors import CheckpointError, ConfigError
from graftlm.core.files import hash_json
from graftlm.core.seeds import derive
from graftlm.model.encoders import ENCODERS
from graftlm.model.specs import EncoderSpec

__all__ = ["Encoder", "build_encoder", "split_net"]


class Encoder(nn.Module, ABC):
    """A frozen encoder. Subclass it for a new modality: name the widths, read a file, encode a batch.

    Attributes:
        width: E.
        tokens: L, tokens per item.
        settings: what it was built with; set by `build_encoder`.
        cut: layers that a connector took, see `split`.
    """

    width: int
    tokens: int
    settings: Mapping[str, Any] = {}
    cut: int = 0
    packaged: ClassVar[str] = ""
    """File of this encoder in the packaged base, for ``weights: miniworld``."""

    @abstractmethod
    def read(self, source: Path) -> Tensor:
        """A file as one raw input, without a batch dimension.

        Raises:
            DataError: the file is missing, corrupt or of another kind.
        """

    @abstractmethod
    def forward(self, inputs: Tensor) -> Tensor:
        """Raw inputs (N, ...) as tokens, Float (N, L, E)."""

    def split(self, layers: int) -> nn.Module:
        """Give the last layers away. From then on `forward` ends before them, `width` and `tokens` are of what enters them.

        Returns:
            Those layers with their weights: of tokens Float (N, L, E) they make what `forward` gave before.

        Raises:
            ConfigError: the encoder cannot be split, or not there.
        """
        raise ConfigError(
            f"encoder {type(self).__name__}: its last layers cannot be taken for a connector; an encoder that has `split` is "
            f"expected. Use another kind of connector."
        )

    def train(self, mode: bool = True) -> "Encoder":
        """Frozen means frozen: batch statistics and dropout stay in evaluation mode."""
        return super().train(False)

    def fingerprint(self) -> str:
        """A hash of the encoder's kind, settings and weights: which encoder a connector was trained on."""
        digest = hashlib.sha256(f"{type(self).__module__}.{type(self).__qualname__} {self.extra_repr()}".encode())
        if self.settings:  # frames or size change features, but no weight
            digest.update(hash_json(dict(self.settings)).encode())
        if self.cut:
            digest.update(f"without the last {self.cut}".encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def build_encoder(spec: EncoderSpec) -> Encoder:
    """The encoder of a spec, with its weights, frozen. Random weights are the same ones in every process.

    Raises:
        ConfigError: no encoder of that kind, or a setting that it does not have.
        CheckpointError: the weights are missing, damaged or do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(0, "encoder", spec.kind))
        try:
            encoder: Encoder = ENCODERS.get(spec.kind)(**spec.settings)
        except TypeError as error:
            raise ConfigError(f"encoder {spec.kind}: {error}. Correct model.modalities.*.encoder.") from None
    encoder.settings = dict(spec.settings)
    if spec.weights is not None:
        _load(encoder, spec.kind, spec.weights)
    return encoder.requires_grad_(False).train(False)


def split_net(net: nn.Sequential, layers: int, *, keep: int = 1) -> tuple[nn.Sequential, nn.Sequential]:
    """What comes before the last layers, and those. A layer is a linear map or convolution and what follows it.

    Args:
        keep: how many layers must be left.

    Raises:
        ConfigError: there are not so many layers.
    """
    modules = list(net)
    starts = [place for place, module in enumerate(modules) if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)]
    if not 1 <= layers <= len(starts) - keep:
        raise ConfigError(
            f"layers: {layers}, but 1 to {len(starts) - keep} layers of this encoder can be taken for a connector. Correct "
            f"model.modalities.*.connector.layers."
        )
    at = starts[-layers]
    return nn.Sequential(*modules[:at]), nn.Sequential(*modules[at:])


def _load(encoder: Encoder, kind: str, weights: str) -> None:
    packaged = weights == "miniworld"
    path = Path(weights)
    if packaged:
        base = Path(str(resources.files("graftlm.data.miniworld"))) / "base"
        path = base / "encoders" / f"{encoder.packaged}.safetensors"
    if not path.is_file():
        do = "Run `graftlm build-base`." if packaged else "Correct model.modalities.*.encoder.weights."
        raise CheckpointError(f"encoder {kind}: no weights at {path}; a safetensors file is expected. {do}")
    try:
        encoder.load_state_dict({name: _float(tensor) for name, tensor in load_file(path).items()})
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"encoder {kind}: {path} does not fit ({error}). Use the weights of this kind.") from None


def _float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
