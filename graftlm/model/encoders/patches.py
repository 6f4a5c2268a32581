"""No encoder at all: a picture is cut into patches, and the connector behind them is the only embedding layer."""

from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from graftlm.core.errors import ConfigError
from graftlm.data import media
from graftlm.model.encoders.base import Encoder

__all__ = ["Patches"]


class Patches(Encoder):
    """Raw pixels of patches that do not overlap, row by row, in [-1, 1]; there are no weights.

    With connector ``linear`` or ``mlp`` the model is encoder-free: what aligns pixels with the LLM is that embedding layer.

    Paper:   Zhang et al., Merge then Realign, EMNLP 2025, arXiv:2503.07663, App. A.3, on models without encoders.
    Differs: nothing; the paper says which layer to tune, not how patches are cut.

    Args:
        side: pictures are resized to side x side.
        patch: side of a patch.
    """

    def __init__(self, side: int = 48, patch: int = 12) -> None:
        super().__init__()
        if not 1 <= patch <= side or side % patch:
            raise ConfigError(
                f"encoder patches: patches of {patch} x {patch} do not tile a picture of {side} x {side}; a patch that divides "
                f"side is expected. Correct model.modalities.*.encoder.settings."
            )
        self.side, self.patch = side, patch
        self.width, self.tokens = 3 * patch**2, (side // patch) ** 2

    def extra_repr(self) -> str:
        """What decides about features, for the fingerprint."""
        return f"side={self.side}, patch={self.patch}"

    def read(self, source: Path) -> Tensor:
        """Float (3, side, side) in [0, 1]."""
        return media.load_image(source, self.side)

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, 3, side, side) -> (N, (side / patch)², 3 patch²)."""
        return 2 * F.unfold(inputs, self.patch, stride=self.patch).transpose(1, 2) - 1
