"""What a merging rule is. The rules themselves are in `graftlm.merging`; only the one that merges nothing is here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from graftlm.core.errors import MergeError

__all__ = ["Rule", "keep_new"]


@dataclass(frozen=True)
class Rule:
    """How the weights before and after become one, tensor by tensor.

    Attributes:
        dense: (before, [after ...], **settings) -> tensor; pure, float32 inside, result in before's dtype.
        factored: the same on an update scale · B A: (A, B, scale, **settings) -> (A, B, scale); None if the rule's
            result is not of low rank.
        paper: where the rule comes from.
    """

    name: str
    dense: Callable[..., Tensor]
    factored: Callable[..., tuple[Tensor, Tensor, float]] | None = None
    paper: str = ""

    def __call__(self, before: Tensor, after: Sequence[Tensor], **settings: Any) -> Tensor:
        """The dense form."""
        return self.dense(before, after, **settings)


def _keep_new(before: Tensor, after: Sequence[Tensor]) -> Tensor:
    if len(after) != 1:
        raise MergeError(f"keep_new: {len(after)} tensors after; exactly 1 is expected. Use 'average' for several.")
    return after[0].to(before.dtype, copy=True)


def _keep_new_factored(a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor, float]:
    return a, b, scale


keep_new = Rule("keep_new", _keep_new, _keep_new_factored)
"""θ_i as training left it: plain fine-tuning.

Paper:   none.
Differs: nothing.
"""
