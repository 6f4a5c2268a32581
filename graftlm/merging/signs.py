"""Task vectors of one bit per weight: a sign, and one length per row.

    τ ≈ s (2 b - 1)        b = [τ > 0],  s = mean |τ| over the row

The mean magnitude is the scale of least squared error for given signs.

Paper:   Liu et al., BitDelta: Your Fine-Tune May Only Be Worth One Bit, NeurIPS 2024, arXiv:2402.10193, §3.1.
Differs: one scale per row instead of one per matrix, and no distillation of the scales afterwards (§3.2).
"""

import torch
from torch import Tensor

from graftlm.core.errors import MergeError

__all__ = ["sign_delta", "signs"]


def signs(tau: Tensor) -> tuple[Tensor, Tensor]:
    """A task vector as bits and scales.

    Returns:
        bool of tau's shape, True where τ > 0; and float32, one per slice of the first dimension, (1,) for a tensor of
        less than 2 dimensions.
    """
    rows = tau.reshape(tau.shape[0], -1) if tau.dim() > 1 else tau.reshape(1, -1)
    return tau > 0, rows.abs().mean(1, dtype=torch.float64).float()


def sign_delta(bits: Tensor, scales: Tensor) -> Tensor:
    """The task vector that bits and scales stand for: s (2 b - 1), in float32.

    Raises:
        MergeError: not one scale per row.
    """
    rows = bits.shape[0] if bits.dim() > 1 else 1
    if scales.shape != (rows,):
        raise MergeError(
            f"scales of shape {tuple(scales.shape)} for signs of shape {tuple(bits.shape)}; ({rows},) is expected."
        )
    return torch.where(bits, 1.0, -1.0) * scales.float().reshape([-1, *[1] * (bits.dim() - 1)] if bits.dim() else [])
