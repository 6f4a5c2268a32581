"""What an encoder is: a file becomes a raw input, raw inputs become tokens, and nothing is ever trained."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from graftlm.core.errors import CheckpointError
from graftlm.model.encoders import ENCODERS
from graftlm.model.specs import EncoderSpec

__all__ = ["Encoder", "build_encoder"]


class Encoder(nn.Module, ABC):
    """A frozen encoder. Subclass it for a new modality: name the widths, read a file, encode a batch.

    Attributes:
        width: E.
        tokens: L, tokens per item.
    """

    width: int
    tokens: int
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

    def train(self, mode: bool = True) -> "Encoder":
        """Frozen means frozen: batch statistics and dropout stay in evaluation mode."""
        return super().train(False)

    def fingerprint(self) -> str:
        """A hash of the encoder's kind and weights: what a cached feature depends on beside the file."""
        digest = hashlib.sha256(f"{type(self).__module__}.{type(self).__qualname__} {self.extra_repr()}".encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def build_encoder(spec: EncoderSpec) -> Encoder:
    """The encoder of a spec, with its weights, frozen.

    Raises:
        ConfigError: no encoder of that kind.
        CheckpointError: the weights are missing or do not fit.
    """
    encoder: Encoder = ENCODERS.get(spec.kind)(**spec.settings)
    if spec.weights is not None:
        _load(encoder, spec)
    return encoder.requires_grad_(False).train(False)


def _load(encoder: Encoder, spec: EncoderSpec) -> None:
    path = Path(spec.weights or "")
    if spec.weights == "miniworld":
        path = Path(str(resources.files("graftlm.data.miniworld"))) / "base" / "encoders" / f"{encoder.packaged}.safetensors"
    if not path.is_file():
        raise CheckpointError(
            f"encoder {spec.kind}: no weights at {path}; a safetensors file is expected. "
            f"{'Run `graftlm build-base`.' if spec.weights == 'miniworld' else 'Correct model.modalities.*.encoder.weights.'}"
        )
    weights: Mapping[str, Any] = load_file(path)
    try:
        encoder.load_state_dict({name: _float(tensor) for name, tensor in weights.items()})
    except RuntimeError as error:
        raise CheckpointError(f"encoder {spec.kind}: {path} does not fit ({error}). Use the weights of this kind.") from None


def _float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
