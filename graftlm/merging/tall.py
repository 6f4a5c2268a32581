"""TALL masks: which weights of a merged task vector serve which task.

    m_i = [|τ_i| ≥ λ |τ_MTL - τ_i|]

Paper:   Wang et al., Localizing Task Information for Improved Model Merging and Compression, ICML 2024,
    arXiv:2405.07813, §4 (TALL masks, Eq. 3-5; consensus merging).
Differs: an exact tie is kept; the released code drops it. λ is searched per task in {0.2, …, 0.6} by the
    authors; here it is a setting.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from graftlm.core.errors import MergeError
from graftlm.merging.mmer import per_model
from graftlm.merging.vectors import check_same

__all__ = ["consensus_mask", "tall_masks"]


def tall_masks(merged: Tensor, taus: Sequence[Tensor], significance: float | Sequence[float] = 0.4) -> list[Tensor]:
    """One bool tensor per task.

    Unlike MMER's, a mask with λ < 1 may keep an entry whose sign is the opposite; at λ = 1 the two agree wherever
    both vectors are not 0.

    Args:
        merged: τ_MTL, the sum of the task vectors or what TIES made of them, not scaled.
        significance: λ; one for all tasks, or one each. Smaller keeps more.

    Raises:
        MergeError: shapes differ, or a significance is negative or missing.
    """
    check_same("tall_masks", [merged, *taus])
    lambdas = per_model("significance", significance, len(taus))
    merged = merged.float()
    return [tau.float().abs() >= value * (merged - tau.float()).abs() for tau, value in zip(taus, lambdas, strict=True)]


def consensus_mask(masks: Sequence[Tensor], uses: int = 2) -> Tensor:
    """Where at least ``uses`` tasks keep the entry: without weights of no use to anyone, or selfish ones.

    Raises:
        MergeError: shapes differ, or uses is not a number of tasks.
    """
    check_same("consensus", masks)
    if not 0 <= uses <= len(masks):
        raise MergeError(
            f"consensus: an entry of use to {uses} of {len(masks)} tasks; a number from 0 to {len(masks)} is expected. "
            "Lower uses, or merge more models."
        )
    counts = torch.zeros(masks[0].shape, dtype=torch.int32, device=masks[0].device)
    for mask in masks:
        counts += mask
    return counts >= uses
