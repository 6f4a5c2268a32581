"""Model Tailor: a small patch of fine-tuned weights sewn into the model before, and the seam smoothed.

    score    (1-w) z(|Δ|) + w z(Δ² / [H⁻¹]_qq)      z standardises each row within a block of columns
    patch    the top share of every block stays fine-tuned, the rest goes back to its value before
    decorate when entry q goes back, what the layer's output loses by it is taken over by the columns after q:
             δ_{>q} = - (w_q - before_q) / [H⁻¹]_qq · [H⁻¹]_{q,>q}

H = Σ x xᵀ over calibration inputs x of the layer, so δ minimises ‖(W - W′) x‖² over the columns after q: an Optimal Brain
Surgeon step that drives an entry to its value before instead of to 0. Columns are taken from left to right as in
SparseGPT, with H⁻¹ that of the columns from q on; an entry that will itself go back passes on what it took over.
At the end an entry is either its value before, exactly, or its fine-tuned value plus compensation.

Paper:   Zhu et al., Model Tailor, ICML 2024, arXiv:2402.12048, as released. SparseGPT: Frantar and Alistarh, ICML 2023,
    arXiv:2301.00774, §3. OBS: Hassibi and Stork, NeurIPS 1992.
Differs: read from the released code, with the sign and the sensitivity that OBS has: the code adds the compensation
    instead of subtracting it, and measures W² where Δ² goes back (`compat_reference` does both, and keeps the entries
    strictly above its threshold). Rows that do not vary score 0 instead of NaN. Which layers are patched is for the
    caller; the authors take the LLM's from the 20th on and put the connector back.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from graftlm.core.errors import MergeError
from graftlm.merging.vectors import check_same, count, largest

__all__ = ["hessian", "inverse_factor", "revert", "sensitivity", "tailor"]


def hessian(inputs: Tensor | Iterable[Tensor]) -> Tensor:
    """H = Σ x xᵀ, in float32.

    Args:
        inputs: activations (..., in) that enter the layer, or several such batches.

    Returns:
        (in, in). Its scale does not matter to `tailor`.

    Raises:
        MergeError: there is no input.
    """
    result: Tensor | None = None
    for batch in [inputs] if isinstance(inputs, Tensor) else inputs:
        rows = batch.detach().reshape(-1, batch.shape[-1]).float()
        result = rows.T @ rows if result is None else result.addmm_(rows.T, rows)
    if result is None:
        raise MergeError("hessian: no calibration inputs; the paper takes 128 samples.")
    return result


def inverse_factor(hessian: Tensor, damping: float = 0.01) -> Tensor:
    """The upper Cholesky factor U of H⁻¹ = Uᵀ U, in float64.

    U_qq² is [H⁻¹]_qq of the columns from q on, and U_q,> / U_qq their [H⁻¹]_{q,>} / [H⁻¹]_qq.

    Args:
        hessian: (in, in); an input that is always 0 counts as one of square 1.
        damping: added to the diagonal, as a share of its mean.

    Raises:
        MergeError: H is not positive definite even so.
    """
    matrix = hessian.double().clone()
    diagonal = matrix.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    lower, failed = torch.linalg.cholesky_ex(matrix)
    upper, failed_again = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed or failed_again:
        raise MergeError(
            f"tailor: the Hessian of {matrix.shape[0]} inputs is not positive definite with damping {damping}. "
            "Give more calibration samples, or a larger damping."
        )
    return torch.as_tensor(upper)


def sensitivity(delta: Tensor, factor: Tensor) -> Tensor:
    """Δ_q² / [H⁻¹]_qq: twice what reverting entry q alone costs once the columns after it have compensated.

    Args:
        delta: (out, in).
        factor: of `inverse_factor`, (in, in).
    """
    return (delta / factor.diagonal()) ** 2


def revert(before: Tensor, after: Tensor, keep: Tensor, hessian: Tensor, damping: float = 0.01) -> Tensor:
    """Put entries back to before, and let later columns compensate.

    Args:
        before: (out, in).
        after: (out, in), the fine-tuned weights.
        keep: bool (out, in), the patch.
        hessian: (in, in).

    Returns:
        float64 (out, in); exactly before where keep is False.
    """
    factor = inverse_factor(hessian, damping)
    weights = after.double().clone()
    _revert_columns(before.double(), weights, keep, factor, -1)
    return weights


def _revert_columns(before: Tensor, weights: Tensor, keep: Tensor, factor: Tensor, sign: int) -> Tensor:
    """Revert in place, column by column; what the columns after these have to take over, per unit of their factor."""
    columns = keep.shape[1]
    errors = torch.zeros_like(weights[:, :columns])
    for q in range(columns):
        kept = weights[:, q]
        reverted = torch.where(keep[:, q], kept, before[:, q])
        errors[:, q] = (kept - reverted) / factor[q, q]
        weights[:, q + 1 : columns] += sign * errors[:, q : q + 1] * factor[q, q + 1 : columns]
        weights[:, q] = reverted
    return errors


def _standard(values: Tensor) -> Tensor:
    """Mean 0 and deviation 1 within every row; 0 for a row that does not vary."""
    deviation = values.std(1, keepdim=True, correction=0)
    return (values - values.mean(1, keepdim=True)) / torch.where(deviation == 0, 1.0, deviation)


def tailor(
    before: Tensor,
    after: Tensor,
    *,
    hessian: Tensor | None = None,
    share: float = 0.1,
    weight: float = 0.2,
    damping: float = 0.01,
    block: int = 128,
    compat_reference: bool = False,
) -> Tensor:
    """The model before with a patch of the model after.

    Args:
        before: (out, rest); more dimensions count as rest.
        after: the fine-tuned weights.
        hessian: (rest, rest), of `hessian`; None for one of independent inputs of one size, which compensates nothing.
        share: of entries in the patch, in every block of columns.
        weight: of the sensitivity in the score; the rest is for the magnitude.
        damping: see `inverse_factor`.
        block: columns that are scored together.
        compat_reference: the released code's sign and sensitivity.

    Returns:
        before's dtype; outside the patch exactly before.

    Raises:
        MergeError: shapes differ or have no columns, a setting is out of range, or H cannot be inverted.
    """
    check_same("tailor", [before, after])
    if before.dim() < 2:
        raise MergeError(
            f"tailor: weights of shape {tuple(before.shape)}; at least 2 dimensions are expected. "
            "Keep a bias or a norm as it was before."
        )
    _check(share, weight, damping, block)
    old = before.reshape(before.shape[0], -1).double()
    weights = after.reshape(before.shape[0], -1).double().clone()
    size = old.shape[1]
    if hessian is not None and hessian.shape != (size, size):
        raise MergeError(
            f"tailor: a Hessian of shape {tuple(hessian.shape)} for weights of shape {tuple(before.shape)}; "
            f"({size}, {size}) is expected. Collect it at the input of this layer."
        )
    factor = torch.eye(size, dtype=torch.float64) if hessian is None else inverse_factor(hessian, damping)
    factor = factor.to(weights.device)
    sign = 1 if compat_reference else -1
    moved = (weights - old).abs()
    for start in range(0, size, block):
        part = slice(start, min(start + block, size))
        now = weights[:, part] if compat_reference else weights[:, part] - old[:, part]
        score = (1 - weight) * _standard(moved[:, part])
        score += weight * _standard(sensitivity(now, factor[part, part]))
        keep = _above(score, share) if compat_reference else largest(score, share)
        errors = _revert_columns(old[:, part], weights[:, part], keep, factor[part, part], sign)
        weights[:, part.stop :] += sign * errors @ factor[part, part.stop :]
    return weights.reshape(before.shape).to(before.dtype)


def _above(score: Tensor, share: float) -> Tensor:
    """The released threshold: the value of rank floor((1-share) n), itself not kept."""
    rank = min(int(score.numel() * (1 - share)), score.numel() - 1)
    return score > score.flatten().kthvalue(rank + 1).values


def _check(share: float, weight: float, damping: float, block: int) -> None:
    count(1, share)
    if not 0 <= weight <= 1:
        raise MergeError(f"tailor: weight {weight} is not a share; a number from 0 to 1 is expected.")
    if not damping >= 0:
        raise MergeError(f"tailor: damping {damping} is negative; a share of the mean diagonal is expected (0.01).")
    if block < 1:
        raise MergeError(f"tailor: blocks of {block} columns; at least 1 is expected.")
