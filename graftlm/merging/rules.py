"""Merging rules: (before, [after ...]) -> one tensor, one tensor at a time.

A rule is pure, computes in float32 and returns before's dtype. Its low-rank form acts on an update scale · B A and must
equal the dense form.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from graftlm.core.errors import MergeError
from graftlm.model.adapters import Rule, keep_new

__all__ = ["Rule", "average", "keep_new"]


def _average(before: Tensor, after: Sequence[Tensor], *, weight: float) -> Tensor:
    """The sum before + weight · (mean(after) - before); weights 0 and 1 return their operand bit by bit."""
    _check(weight)
    if not after:
        raise MergeError("average: no tensor after; at least 1 is expected. Name the models to merge.")
    # float64: the sum of a few float32 numbers is then exact, hence independent of their order
    total = after[0].double()
    for tensor in after[1:]:
        total = total + tensor.double()
    return torch.lerp(before.float(), (total / len(after)).float(), weight).to(before.dtype)


def _average_factored(a: Tensor, b: Tensor, scale: float, *, weight: float) -> tuple[Tensor, Tensor, float]:
    """W + weight · s · B A: scaling the update averages the products, which averaging A and B apart does not."""
    _check(weight)
    return a, b, scale * weight


def _check(weight: float) -> None:
    if not 0 <= weight <= 1:
        raise MergeError(
            f"average: weight {weight} is not a share; a number from 0 to 1 is expected (1/i for stage i)."
        )


average = Rule(
    "average", _average, _average_factored, "Zhang et al., Merge then Realign, EMNLP 2025, arXiv:2503.07663, §4.1"
)
"""Share ``weight`` of the new weights, the rest of the old: θ_i ← (1-w) θ_{i-1} + w θ_i.

With w = 1/i at every stage i, θ_i is the plain mean of what every stage made of the LLM.

Paper:   Zhang et al., Merge then Realign, EMNLP 2025, arXiv:2503.07663, §4.1.
Differs: nothing. Effective weights are averaged, not LoRA factors (the paper leaves it open).
"""
