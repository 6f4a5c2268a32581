"""MMER's masks: one bit per weight and model, which restore every model from one merged task vector.

    m_i = [sign(τ_i) = sign(τ*)] ∧ [|τ_i| ≥ λ_i/2 |τ*|]

keeps an entry where the merged vector points as model i's own did, and is not much longer. λ_i = 1 is the exact minimiser
of Σ |m τ* - τ_i| over all bits m: with equal signs keeping costs |τ* - τ_i| and dropping costs |τ_i|, and with opposite
signs dropping is always the cheaper.

Paper:   Li et al., Multi-Modality Expansion and Retention for LLMs (MMER), ACL 2025, arXiv:2505.17110, §3.1-3.2; storage
    App. C and Table 4.
Differs: a zero entry of either side is never kept (the sign of 0 is left open); significance is λ itself, where
    the paper's figures print λ · 50 %. `rescale` is ours: one number per tensor and model, without which the disjoint
    mean is systematically shorter or longer than what it stands for.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from graftlm.core.errors import MergeError, did_you_mean
from graftlm.merging.vectors import check_same, total

__all__ = ["mask_one", "masks", "mean_mask", "pack", "per_model", "rescale", "restore", "storage_bits", "unpack"]


def masks(merged: Tensor, taus: Sequence[Tensor], significance: float | Sequence[float] = 1.0) -> list[Tensor]:
    """One bool tensor per model: where the merged task vector stands for the model's own.

    Args:
        merged: τ*, as scaled as it is used.
        taus: the models' own, trimmed as they were merged.
        significance: λ; one for all models, or one each. Smaller keeps more.

    Raises:
        MergeError: shapes differ, or a significance is negative or missing.
    """
    check_same("mmer", [merged, *taus])
    lambdas = per_model("significance", significance, len(taus))
    return [mask_one(merged, tau, value) for tau, value in zip(taus, lambdas, strict=True)]


def mask_one(merged: Tensor, tau: Tensor, significance: float) -> Tensor:
    """The mask of one model, in float32; see `masks`."""
    merged, tau = merged.float(), tau.float()
    congruent = (merged.sign() == tau.sign()) & (tau != 0)
    return congruent & (tau.abs() >= significance * 0.5 * merged.abs())


def per_model(name: str, value: float | Sequence[float], models: int) -> list[float]:
    """A setting that is one number for all models, or one each.

    Raises:
        MergeError: another number of numbers, or one that is negative or not finite.
    """
    values = [float(v) for v in value] if isinstance(value, Sequence) else [float(value)] * models
    if len(values) != models:
        raise MergeError(f"{len(values)} values of {name} for {models} models; 1 for all or 1 each is expected.")
    for number in values:
        if not 0 <= number < float("inf"):
            raise MergeError(f"{name} {number} is out of range; a number from 0 is expected (1 is the optimum of L1).")
    return values


def mean_mask(masks: Sequence[Tensor]) -> Tensor:
    """m̄, the share of models that keep each entry: float32, in {0, 1/n, …, 1}."""
    check_same("mmer", masks)
    return (total(masks) / len(masks)).float()


def restore(before: Tensor, merged: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
    """Weights of one route: θ_pre + s · m ∘ τ*, in before's dtype.

    Args:
        mask: bool of one model, or `mean_mask`.
        scale: of `rescale`; 1 is the paper's.
    """
    return (before.float() + scale * (mask * merged.float())).to(before.dtype)


def rescale(merged: Tensor, masks: Sequence[Tensor], taus: Sequence[Tensor]) -> Tensor:
    """The s_i that make ‖s_i · m_i ∘ τ* - τ_i‖² least: <m_i ∘ τ*, τ_i> / <m_i ∘ τ*, m_i ∘ τ*>.

    Args:
        taus: the models' own, untrimmed: what is to be restored.

    Returns:
        (n,) float32; 0 for a model whose masked vector is 0.
    """
    check_same("mmer", [merged, *masks, *taus])
    scales = torch.zeros(len(taus))
    for i, (mask, tau) in enumerate(zip(masks, taus, strict=True)):
        kept = (mask * merged.float()).double()
        square = (kept * kept).sum()
        if square > 0:
            scales[i] = (kept * tau.double()).sum() / square
    return scales


def pack(mask: Tensor) -> Tensor:
    """Bits as bytes: bit j of byte b (from the least significant) is entry 8 b + j of the flattened mask.

    Returns:
        uint8, (ceil(n / 8),), on the CPU; bits beyond the mask are 0.
    """
    bits = mask.detach().to("cpu", torch.bool).flatten().numpy()
    return torch.from_numpy(np.packbits(bits, bitorder="little"))


def unpack(data: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask of that shape, from `pack`'s bytes.

    Raises:
        MergeError: the bytes are not those of a mask of this shape.
    """
    n = int(np.prod(tuple(shape), dtype=np.int64))
    if data.dtype != torch.uint8 or data.shape != ((n + 7) // 8,):
        raise MergeError(
            f"a packed mask of dtype {data.dtype} and shape {tuple(data.shape)}; ({(n + 7) // 8},) of uint8 are "
            f"expected for weights of shape {tuple(shape)}. The file belongs to another model, or is damaged."
        )
    bits = np.unpackbits(data.cpu().numpy(), count=n, bitorder="little")
    return torch.from_numpy(bits.astype(np.bool_)).reshape(tuple(shape))


METHODS = ("damc", "mmer", "model_tailor", "originals", "plain")


def storage_bits(
    method: str, models: int, parameters: float, specific: float, adapters: float = 0, dtype_bits: int = 32
) -> float:
    """How many bits a composition takes.

    Args:
        method: "originals"; "plain", which is every merge into one LLM (average, task arithmetic, TIES, DARE);
            "damc"; "mmer"; or "model_tailor", which hosts tasks of one modality only.
        models: N.
        parameters: P, of the LLM.
        specific: P′, of encoder and connector, per model.
        adapters: P*, of LoRAs kept per model (DAMC).
        dtype_bits: per number; the paper counts 32.

    Returns:
        the paper's App. C. For N tasks of one modality its Table 4 counts P′ once: take `specific` / N.

    Raises:
        MergeError: the method is unknown.
    """
    if method not in METHODS:
        raise MergeError(f"no storage formula for '{method}'; {did_you_mean(method, METHODS)}")
    own = models * specific
    if method == "model_tailor":
        own = specific
    numbers = {
        "originals": models * parameters + own,
        "damc": parameters + own + 2 * models * adapters,
        "mmer": 2 * parameters + own,
    }.get(method, parameters + own)
    return dtype_bits * numbers + (models * parameters if method == "mmer" else 0)
