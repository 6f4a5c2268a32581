"""SAC: an update's large singular values are damped, its small ones kept.

ModelMix multiplies every singular value of an update Δ = U Σ Vᵀ by α. SAC replaces σ by its moving average

    g_i = (1/k) (σ_i + … + σ_{i+k-1})        σ_j = σ_r for j > r
    k   = argmin (g_1 - α σ_1)²              over 1 … r, the smallest of equals

so that the direction in which a stage moved most is damped by about α and the weak ones hardly at all.

Paper:   Liu et al., LLaVA-c, arXiv:2506.08666, §4.1, Eq. 5-7, Algorithm 1.
Differs: the window has k terms. Eq. 6 sums k + 1 and divides by k, which may amplify (window "eq6"); Algorithm 1 cuts
    the sum off instead of padding it, which damps small values most (window "alg1"); the paper's text fits neither
    but the padded one. r is the numerical rank: σ_i > max(M, N) eps σ_1 in float32. Where mean(σ) > α σ_1, no window
    reaches α σ_1; then k = r, and `Report.reached` is above α. A tensor of one dimension has no spectrum: ModelMix.
    Equal singular values have no vectors of their own; there the method, in any reading, depends on the basis chosen.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graftlm.core.errors import MergeError, did_you_mean

__all__ = [
    "WINDOWS",
    "Report",
    "Spectrum",
    "check_alpha",
    "consolidate",
    "decompose",
    "rank",
    "right_factor",
    "spectrum",
]

WINDOWS = ("alg1", "eq6", "mean")
"""The readings of the window: Algorithm 1, Eq. 6 literally, and a moving average of k terms."""

DENSE = 512
"""Matrices whose smaller side is longer go by the eigenvectors of the Gram matrix: several times faster than an SVD."""

EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Report:
    """What became of one update.

    Attributes:
        window: k, the number of singular values averaged.
        rank: r, the numerical rank.
        reached: g_1 / σ_1, what the largest singular value was multiplied by; above alpha where alpha is out of reach.
            0 for an update of 0.
    """

    window: int
    rank: int
    reached: float


def check_alpha(rule: str, alpha: float) -> None:
    """A share of the update.

    Raises:
        MergeError: it is not in [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise MergeError(f"{rule}: alpha {alpha} is not a share; a number from 0 to 1 is expected.")


def spectrum(sigma: Tensor, alpha: float, window: str = "mean") -> tuple[int, Tensor]:
    """The length k of the window, and the averaged singular values.

    Args:
        sigma: (r,), falling, all above 0.
        window: see `WINDOWS`.

    Returns:
        k, and g (r,) in float64.

    Raises:
        MergeError: alpha is no share, or the window is unknown.
    """
    check_alpha("sac", alpha)
    if window not in WINDOWS:
        raise MergeError(f"sac: window '{window}' is unknown; {did_you_mean(window, WINDOWS)}")
    values = sigma.detach().double().cpu().numpy()
    r = len(values)
    if r == 0:
        return 0, torch.zeros(0, dtype=torch.float64)
    padding = np.zeros(r) if window == "alg1" else np.full(r, values[-1])
    more = 0 if window == "mean" else 1  # terms beyond k
    # tails[i] = σ_i + σ_{i+1} + … to the end of the padding: summed from the small end, differences stay accurate
    tails = np.append(np.cumsum(np.append(values, padding)[::-1])[::-1], 0.0)
    lengths = np.arange(1, r + 1)
    distances = np.abs((tails[0] - tails[lengths + more]) / lengths - alpha * values[0])
    # equal but for rounding counts as equal: the smallest k
    k = int(np.flatnonzero(distances <= distances.min() + 1e-12 * values[0])[0]) + 1
    ends = np.minimum(np.arange(r) + k + more, 2 * r)
    return k, torch.from_numpy((tails[:r] - tails[ends]) / k)


def rank(sigma: Tensor, rows: int, columns: int) -> int:
    """The numerical rank in float32 of a matrix with these (falling) singular values."""
    if sigma.numel() == 0 or sigma[0] == 0:
        return 0
    return int((sigma > max(rows, columns) * EPS * sigma[0]).sum())


@dataclass(frozen=True)
class Spectrum:
    """A low-rank update U diag(σ) Vᵀ, ready to be consolidated with many alphas.

    Attributes:
        u: (out, r), orthonormal columns, float64.
        sigma: (r,), falling, r the numerical rank.
        v: (r, in), orthonormal rows.
    """

    u: Tensor
    sigma: Tensor
    v: Tensor

    def report(self, alpha: float, window: str = "mean") -> Report:
        """What `update` will do."""
        k, g = spectrum(self.sigma, alpha, window)
        return Report(k, len(self.sigma), float(g[0] / self.sigma[0].cpu()) if k else 0.0)

    def update(self, alpha: float, window: str = "mean") -> tuple[Tensor, Tensor, float]:
        """The consolidated update as A (r, in), B (out, r) and a scale of 1, in float32; rank 1 for an update of 0."""
        _, g = spectrum(self.sigma, alpha, window)
        if not len(g):
            return self.v.new_zeros(1, self.v.shape[1]).float(), self.u.new_zeros(self.u.shape[0], 1).float(), 1.0
        # √g on both sides: neither factor leaves the range of a short format
        root = g.sqrt().to(self.u.device)
        return (root[:, None] * self.v).float(), (self.u * root).float(), 1.0


def decompose(a: Tensor, b: Tensor, scale: float) -> Spectrum:
    """The spectrum of scale · B A from its factors: QR of B and of Aᵀ, then the SVD of an R x R core.

    Args:
        a: (R, in).
        b: (out, R).
    """
    q_b, r_b = torch.linalg.qr(b.detach().double())
    q_a, r_a = torch.linalg.qr(a.detach().double().T)
    u, sigma, v = torch.linalg.svd(scale * r_b @ r_a.T, full_matrices=False)
    r = rank(sigma, b.shape[0], a.shape[1])
    return Spectrum(q_b @ u[:, :r], sigma[:r], v[:r] @ q_a.T)


def consolidate(update: Tensor, alpha: float, window: str = "mean") -> tuple[Tensor, Report]:
    """SAC of a dense update.

    Args:
        update: at least 2 dimensions; those after the first count as one.

    Returns:
        the new update in float32, and what was done.

    Raises:
        MergeError: alpha is no share, the window is unknown, or the update has less than 2 dimensions.
    """
    if update.dim() < 2:
        raise MergeError(
            f"sac: an update of shape {tuple(update.shape)} has no spectrum; at least 2 dimensions are expected. "
            "Use 'model_mix'."
        )
    matrix = update.reshape(update.shape[0], -1).double()
    if min(matrix.shape) <= DENSE:
        result, report = _by_svd(matrix, alpha, window)
    else:
        result, report = _by_gram(matrix, alpha, window)
    return result.reshape(update.shape).float(), report


def _by_svd(matrix: Tensor, alpha: float, window: str) -> tuple[Tensor, Report]:
    u, sigma, v = torch.linalg.svd(matrix, full_matrices=False)
    r = rank(sigma, *matrix.shape)
    part = Spectrum(u[:, :r], sigma[:r], v[:r])
    _, g = spectrum(part.sigma, alpha, window)
    return (part.u * g.to(part.u.device)) @ part.v, part.report(alpha, window)


def right_factor(gram: Tensor, rows: int, alpha: float = 0.2, window: str = "mean") -> Tensor:
    """What an update must be multiplied with, from the right, to be consolidated: V diag(g/σ) Vᵀ.

    Args:
        gram: ΔᵀΔ, float64.
        rows: of Δ.
    """
    squares, vectors = torch.linalg.eigh(gram)
    sigma = squares.flip(0).clamp(min=0).sqrt()
    r = rank(sigma, rows, gram.shape[0])
    sigma, v = sigma[:r], vectors.flip(1)[:, :r]
    _, g = spectrum(sigma, alpha, window)
    factor: Tensor = (v * (g.to(sigma.device) / sigma)) @ v.T
    return factor


def _by_gram(matrix: Tensor, alpha: float, window: str) -> tuple[Tensor, Report]:
    """Δ V diag(g/σ) Vᵀ, with V and σ² of ΔᵀΔ (or the same on the left, if that side is the smaller)."""
    if matrix.shape[0] < matrix.shape[1]:
        result, report = _by_gram(matrix.T, alpha, window)
        return result.T, report
    squares, vectors = torch.linalg.eigh(matrix.T @ matrix)
    sigma = squares.flip(0).clamp(min=0).sqrt()
    r = rank(sigma, *matrix.shape)
    sigma, v = sigma[:r], vectors.flip(1)[:, :r]
    k, g = spectrum(sigma, alpha, window)
    result = (matrix @ v * (g.to(sigma.device) / sigma)) @ v.T
    return result, Report(k, r, float(g[0] / sigma[0].cpu()) if k else 0.0)
