"""Task vectors: what a model moved by, τ_i = θ_i - θ_pre, and how several become one.

    trim      keep the entries of largest magnitude
    drop      keep random entries, scaled so that the expectation stays
    elect     the sign of the summed entry
    disjoint  merge the entries of the elected sign

Every function is pure, computes in float32 and does not depend on the order of the models. Sums run in float64, where
the sum of a few float32 numbers is exact unless they differ by more than a factor of 2^29.

Paper:   Yadav et al., TIES-Merging, NeurIPS 2023, arXiv:2306.01708, §4.2 (trim, elect, disjoint merge); Yu et al.,
    Language Models are Super Mario (DARE), ICML 2024, arXiv:2311.03099, §3.1 (drop and rescale).
Differs: exactly floor(K n + 1/2) entries survive a trim, of equal magnitudes the first; a sum of exactly 0 elects
    nothing (`compat_reference` is the released code of TIES in both). DARE's coins are a hash of what they decide on.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from graftlm.core.errors import MergeError, did_you_mean
from graftlm.merging.coins import key

__all__ = [
    "DISJOINT",
    "check_density",
    "check_same",
    "count",
    "disjoint",
    "drop",
    "elect",
    "kept",
    "key",
    "largest",
    "task_vectors",
    "ties",
    "total",
    "trim",
]

DISJOINT = ("max", "mean", "sum")
"""What `disjoint` can make of the entries of the elected sign."""

BLOCK = 1 << 16
"""Coins are tossed this many at a time, so that the intermediate numbers stay in the processor's cache."""


def task_vectors(before: Tensor, after: Sequence[Tensor]) -> list[Tensor]:
    """The float32 differences θ_i - θ_pre."""
    return [tensor.float() - before.float() for tensor in after]


def total(tensors: Sequence[Tensor]) -> Tensor:
    """The float64 sum, which a few float32 tensors reach in any order alike."""
    result = tensors[0].double()
    for tensor in tensors[1:]:
        result = result + tensor.double()
    return result


def check_same(rule: str, tensors: Sequence[Tensor]) -> None:
    """All tensors are of one shape.

    Raises:
        MergeError: they are not, or there is none.
    """
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if not shapes:
        raise MergeError(f"{rule}: no tensor; at least 1 is expected. Name the models to merge.")
    if len(set(shapes)) > 1:
        raise MergeError(
            f"{rule}: tensors of shapes {', '.join(map(str, shapes))}; one shape is expected. "
            "Merge models of one base, with one vocabulary."
        )


def check_density(density: float) -> None:
    """A share of entries to keep.

    Raises:
        MergeError: it is not in (0, 1].
    """
    if not 0 < density <= 1:
        raise MergeError(
            f"density {density} is not a share to keep; a number above 0, up to 1, is expected (0.2 keeps 20 %)."
        )


def count(entries: int, density: float) -> int:
    """How many of the entries a density keeps: K n, rounded half up."""
    check_density(density)
    return int(density * entries + 0.5)


def largest(values: Tensor, density: float) -> Tensor:
    """Where the largest entries are; exactly `count` of them.

    Equal values at the edge: those of lowest flat index. One selection in linear time, no sort.

    Args:
        values: any shape; magnitudes, or a score.

    Returns:
        bool, of the same shape.

    Raises:
        MergeError: the density is no share, or a value is not a number.
    """
    n, flat = values.numel(), values.flatten()
    keep = count(n, density)
    if n and bool(torch.isnan(flat.max())):
        raise MergeError("a tensor holds NaN; finite weights are expected. Look for the model that broke in training.")
    if keep in (0, n):
        return torch.full(values.shape, keep > 0, dtype=torch.bool, device=values.device)
    edge = flat.kthvalue(n - keep + 1).values
    mask = flat > edge
    missing = keep - int(mask.sum())
    mask[(flat == edge).nonzero().flatten()[:missing]] = True
    return mask.reshape(values.shape)


def trim(tau: Tensor, density: float, compat_reference: bool = False) -> Tensor:
    """The task vector with all but its largest magnitudes set to 0.

    Args:
        compat_reference: as released, which keeps what is at least the (n - floor(K n))-th smallest magnitude: one
            entry more than K n, and every one that equals it.
    """
    tau = tau.float()
    if not compat_reference:
        return torch.where(largest(tau.abs(), density), tau, 0.0)
    check_density(density)
    smallest = tau.numel() - int(density * tau.numel())
    if smallest == 0:
        return tau.clone()
    magnitudes = tau.abs()
    return torch.where(magnitudes >= magnitudes.flatten().kthvalue(smallest).values, tau, 0.0)


def kept(n: int, drop: float, key: int, offset: int = 0) -> Tensor:
    """Which of the entries offset … offset + n - 1 of a flattened tensor survive dropping.

    Entry j has its own coin, so a tensor may be cut anywhere: the top 24 bits of splitmix64(key, j) against
    floor(p 2^24 + 1/2), where splitmix64 is

        z = key + (j + 1) 0x9E3779B97F4A7C15;  z ^= z >> 30;  z *= 0xBF58476D1CE4E5B9
        z ^= z >> 27;  z *= 0x94D049BB133111EB;  z ^= z >> 31        modulo 2^64

    Returns:
        (n,) bool; a share 1 - p of True, to within 2^-25.

    Raises:
        MergeError: drop is not in [0, 1).
    """
    if not 0 <= drop < 1:
        raise MergeError(f"drop {drop} is not a share to drop; a number from 0, below 1, is expected (DARE's p).")
    edge = np.uint64(int(drop * (1 << 24) + 0.5))
    result = np.empty(n, dtype=np.bool_)
    steps = np.arange(1, min(n, BLOCK) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for start in range(0, n, BLOCK):
        size = min(BLOCK, n - start)
        base = (key + (offset + start) * 0x9E3779B97F4A7C15) % (1 << 64)
        z = steps[:size] + np.uint64(base)
        z ^= z >> np.uint64(30)
        z *= np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(27)
        z *= np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        np.greater_equal(z >> np.uint64(40), edge, out=result[start : start + size])
    return torch.from_numpy(result)


def drop(tau: Tensor, drop: float, key: int, offset: int = 0) -> Tensor:
    """The task vector with a random share of entries set to 0 and the rest divided by 1 - p.

    Its expectation over keys is the task vector.

    Args:
        drop: p, the share that becomes 0.
        key: see `key`.
        offset: where this piece starts in the flattened tensor.
    """
    coins = kept(tau.numel(), drop, key, offset).to(tau.device).reshape(tau.shape)
    return torch.where(coins, tau.float() / (1 - drop), 0.0)


def elect(taus: Sequence[Tensor], compat_reference: bool = False) -> Tensor:
    """The sign of every summed entry: -1, 0 or 1, in float32.

    Args:
        compat_reference: a sum of 0 takes the sign of the majority of all entries, as released.
    """
    signs = total(taus).sign().float()
    if compat_reference:
        signs = torch.where(signs == 0, signs.double().sum().sign().float(), signs)
    return signs


def disjoint(taus: Sequence[Tensor], signs: Tensor, how: str = "mean") -> Tensor:
    """One task vector from the entries that have the elected sign.

    Args:
        how: their "mean", their "sum" or the largest of them, "max".

    Returns:
        float32; 0 where no sign is elected or nobody has it.

    Raises:
        MergeError: another how.
    """
    if how not in DISJOINT:
        raise MergeError(f"merge '{how}' is unknown; {did_you_mean(how, DISJOINT)}")
    agreeing = [torch.where(tau.sign() == signs, tau.float(), 0.0) for tau in taus]
    if how == "max":
        magnitudes = agreeing[0].abs()
        for tau in agreeing[1:]:
            magnitudes = torch.maximum(magnitudes, tau.abs())
        return magnitudes * signs
    merged = total(agreeing)
    if how == "mean":
        voters = torch.zeros_like(signs)
        for tau in agreeing:
            voters += tau != 0
        merged = merged / voters.clamp(min=1)
    return merged.float()


def ties(taus: Sequence[Tensor], density: float, merge: str = "mean", compat_reference: bool = False) -> Tensor:
    """Trim, elect, merge: the task vector of TIES, not yet scaled.

    Raises:
        MergeError: the density is no share, merge is unknown, or the shapes differ.
    """
    check_same("ties", taus)
    trimmed = [trim(tau, density, compat_reference) for tau in taus]
    return disjoint(trimmed, elect(trimmed, compat_reference), merge)
