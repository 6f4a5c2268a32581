"""SAC: the window, and the dense and the low-rank form."""

import pytest
import torch
from torch import Tensor

from graftlm.core.errors import MergeError
from graftlm.merging import spectral
from graftlm.merging.rules import model_mix, sac


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def orthogonal(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(random(n, n, seed=seed).double()).Q.float()


@pytest.mark.parametrize(
    ("sigma", "alpha", "window", "k", "averaged"),
    [
        ([8, 4, 2, 1, 1], 0.5, "mean", 4, [3.75, 2, 1.25, 1, 1]),
        ([8, 4, 2, 1, 1], 0.5, "eq6", 4, [4, 2.25, 1.5, 1.25, 1.25]),
        ([8, 4, 2, 1, 1], 0.5, "alg1", 4, [4, 2, 1, 0.5, 0.25]),
        ([8, 4, 2, 1, 1], 0.2, "mean", 5, [3.2, 1.8, 1.2, 1, 1]),
        ([8, 4, 2, 1, 1], 0.2, "eq6", 5, [3.4, 2, 1.4, 1.2, 1.2]),
        ([8, 4, 2, 1, 1], 0.2, "alg1", 5, [3.2, 1.6, 0.8, 0.4, 0.2]),
        ([10, 5, 2, 1], 0.5, "mean", 4, [4.5, 2.25, 1.25, 1]),
        ([10, 5, 2, 1], 0.5, "eq6", 4, [4.75, 2.5, 1.5, 1.25]),
        ([10, 5, 2, 1], 0.5, "alg1", 4, [4.5, 2, 0.75, 0.25]),
        ([3, 1], 0.5, "mean", 2, [2, 1]),
        ([3, 1], 0.5, "eq6", 2, [2.5, 1.5]),
        ([3, 1], 0.5, "alg1", 2, [2, 0.5]),
        ([3], 0.5, "mean", 1, [3]),
        ([3], 0.5, "eq6", 1, [6]),
        ([3], 0.5, "alg1", 1, [3]),
    ],
)
def test_windows(sigma: list[float], alpha: float, window: str, k: int, averaged: list[float]) -> None:
    length, values = spectral.spectrum(torch.tensor(sigma, dtype=torch.float32), alpha, window)
    assert length == k
    assert values.tolist() == pytest.approx(averaged, rel=1e-12)
    result, report = spectral.consolidate(torch.diag(torch.tensor(sigma, dtype=torch.float32)), alpha, window)
    torch.testing.assert_close(torch.linalg.svdvals(result), torch.tensor(averaged, dtype=torch.float32))
    assert (report.window, report.rank) == (k, len(sigma))
    assert report.reached == pytest.approx(averaged[0] / sigma[0])


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_of_equal_windows_the_smallest(alpha: float) -> None:
    """Every window of equal values has the same mean, up to rounding."""
    assert spectral.spectrum(torch.full((3,), 0.1), alpha)[0] == 1
    assert spectral.spectrum(torch.tensor([5.0, 5.0, 1.0]), 1.0)[0] == 1


def test_no_spectrum() -> None:
    k, averaged = spectral.spectrum(torch.zeros(0), 0.5)
    assert k == 0 and averaged.shape == (0,)
    result, report = spectral.consolidate(torch.zeros(3, 4), 0.2)
    assert torch.equal(result, torch.zeros(3, 4)) and report == spectral.Report(0, 0, 0.0)


def test_a_model_mix_of_the_same_update() -> None:
    update = torch.diag(torch.tensor([3.0, 1.0]))
    assert torch.equal(model_mix(torch.zeros(2, 2), [update], alpha=0.5), update / 2)
    torch.testing.assert_close(sac(torch.zeros(2, 2), [update], alpha=0.5), torch.diag(torch.tensor([2.0, 1.0])))


@pytest.mark.parametrize("window", spectral.WINDOWS)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (30, 30)])
def test_the_gram_matrix_is_as_good_as_an_svd(window: str, shape: tuple[int, int]) -> None:
    update = (random(*shape) * torch.logspace(0, -3, shape[1])).double()
    for alpha in (0.2, 0.6):
        by_svd, one = spectral._by_svd(update, alpha, window)
        by_gram, other = spectral._by_gram(update, alpha, window)
        assert (by_svd - by_gram).norm() < 1e-5 * by_svd.norm()
        assert (one.window, one.rank) == (other.window, other.rank)
        assert one.reached == pytest.approx(other.reached)


def test_large_matrices_go_by_the_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral, "DENSE", 16)
    monkeypatch.setattr(spectral, "_by_svd", None)
    update = random(20, 30)
    large, _ = spectral.consolidate(update, 0.3)
    monkeypatch.undo()
    small, _ = spectral.consolidate(update, 0.3)
    torch.testing.assert_close(large, small)
    assert large.dtype == torch.float32


@pytest.mark.parametrize("window", spectral.WINDOWS)
def test_the_low_rank_form_is_the_dense_form(window: str) -> None:
    a, b, before = random(5, 30, seed=1), random(20, 5, seed=2), random(20, 30, seed=3)
    spectrum = spectral.decompose(a, b, 2.0)
    for alpha in (0.1, 0.25, 0.5, 0.9):
        new_a, new_b, scale = spectrum.update(alpha, window)
        assert new_a.shape == (5, 30) and new_b.shape == (20, 5) and new_a.dtype == torch.float32
        update, report = spectral.consolidate(2.0 * b @ a, alpha, window)
        torch.testing.assert_close(scale * new_b @ new_a, update, rtol=1e-4, atol=1e-4)
        low_rank = spectrum.report(alpha, window)
        assert (low_rank.window, low_rank.rank) == (report.window, report.rank) == (report.window, 5)
        assert low_rank.reached == pytest.approx(report.reached, rel=1e-5)
        assert sac.factored is not None
        new_a, new_b, scale = sac.factored(a, b, 2.0, alpha=alpha, window=window)
        dense = sac(before, [before + 2.0 * b @ a], alpha=alpha, window=window)
        torch.testing.assert_close(before + scale * new_b @ new_a, dense, rtol=1e-3, atol=1e-3)


def test_the_numerical_rank() -> None:
    """A LoRA whose rank is not used up, and one that never moved."""
    a, b = random(4, 12, seed=1), torch.cat([random(9, 2, seed=2), torch.zeros(9, 2)], 1)
    spectrum = spectral.decompose(a, b, 1.0)
    assert len(spectrum.sigma) == 2
    assert spectral.consolidate(b @ a, 0.5)[1].rank == 2
    new_a, new_b, scale = spectral.decompose(a, torch.zeros(9, 4), 1.0).update(0.5)
    assert torch.equal(scale * new_b @ new_a, torch.zeros(9, 12)) and len(new_a) == 1
    assert spectral.decompose(a, torch.zeros(9, 4), 1.0).report(0.5) == spectral.Report(0, 0, 0.0)


def test_an_alpha_out_of_reach_is_reported() -> None:
    report = spectral.consolidate(torch.diag(torch.tensor([4.0, 3.0, 2.0])), 0.2)[1]
    assert report == spectral.Report(3, 3, 0.75)


def test_other_dimensions() -> None:
    """A bias is mixed; a convolution is a matrix (out, rest)."""
    before, after = random(6), random(6, seed=1)
    assert torch.equal(sac(before, [after], alpha=0.3), model_mix(before, [after], alpha=0.3))
    assert sac(torch.tensor(1.0), [torch.tensor(3.0)], alpha=0.5) == 2
    kernel = random(4, 3, 2, 2)
    result = sac(torch.zeros_like(kernel), [kernel], alpha=0.3)
    assert torch.equal(result.reshape(4, 12), sac(torch.zeros(4, 12), [kernel.reshape(4, 12)], alpha=0.3))
    with pytest.raises(MergeError, match=r"sac: an update of shape \(6,\) has no spectrum; at least 2 dimensions"):
        spectral.consolidate(before, 0.3)


@pytest.mark.parametrize("window", spectral.WINDOWS)
def test_rotating_the_update_rotates_the_result(window: str) -> None:
    update, left, right = random(12, 9), orthogonal(12, 1), orthogonal(9, 2)
    result, _ = spectral.consolidate(update, 0.3, window)
    rotated, _ = spectral.consolidate(left @ update @ right, 0.3, window)
    torch.testing.assert_close(rotated, left @ result @ right, rtol=1e-4, atol=1e-5)


def test_settings_are_checked() -> None:
    with pytest.raises(MergeError, match=r"sac: alpha 1\.5 is not a share; a number from 0 to 1"):
        sac(torch.zeros(2, 2), [torch.ones(2, 2)], alpha=1.5)
    with pytest.raises(MergeError, match="sac: window 'meam' is unknown; did you mean 'mean'"):
        sac(torch.zeros(2, 2), [torch.ones(2, 2)], window="meam")
    with pytest.raises(MergeError, match="sac: 2 tensors after; exactly 1 is expected"):
        sac(torch.zeros(2, 2), [torch.ones(2, 2)] * 2)
    with pytest.raises(MergeError, match=r"model_mix: tensors of shapes \(2, 2\), \(2, 3\)"):
        model_mix(torch.zeros(2, 2), [torch.ones(2, 3)], alpha=0.5)
    assert sac.factored is not None and model_mix.factored is not None
    for rule in (sac, model_mix):
        assert rule.factored is not None
        with pytest.raises(MergeError, match=f"{rule.name}: alpha -1 is not a share"):
            rule.factored(torch.zeros(1, 2), torch.zeros(2, 1), 1.0, alpha=-1)
