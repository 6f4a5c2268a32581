"""The algebra of merging: what must hold for any weights, any number of models, any settings."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graftlm.merging import mmer, spectral, vectors
from graftlm.merging.rules import Rule, arithmetic, average, consensus, dare, ewf, model_mix, sac, ties
from graftlm.merging.signs import sign_delta, signs
from graftlm.merging.tall import tall_masks

few = settings(max_examples=30, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32)
densities = st.floats(0.05, 1)
alphas = st.floats(0, 1)
ways = st.sampled_from(vectors.DISJOINT)
windows = st.sampled_from(spectral.WINDOWS)
# quarters: sums are exact, and equal magnitudes and zero sums are common
quarters = st.integers(-8, 8).map(lambda n: n / 4)
rows = (
    st.integers(1, 8)
    .flatmap(lambda n: st.lists(st.lists(quarters, min_size=n, max_size=n), min_size=1, max_size=4))
    .map(lambda lists: [torch.tensor(row) for row in lists])
)

SYMMETRIC: list[tuple[Rule, dict[str, Any]]] = [
    (average, {}),
    (average, {"weight": 0.3}),
    (arithmetic, {"scale": 0.7}),
    (ties, {"density": 0.6}),
    (ties, {"density": 0.6, "merge": "max", "scale": 0.3}),
    (ties, {"density": 0.6, "compat_reference": True}),
    (consensus, {"uses": 1}),
    (consensus, {"uses": 1, "merge": "ties", "density": 0.6}),
]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@few
@given(taus=rows, which=st.sampled_from(SYMMETRIC))
def test_the_order_of_the_models_does_not_matter(taus: list[Tensor], which: tuple[Rule, dict[str, Any]]) -> None:
    rule, given_settings = which
    results = [rule(torch.ones(len(taus[0])), order, **given_settings) for order in itertools.permutations(taus)]
    assert all(torch.equal(result, results[0]) for result in results)


@few
@given(taus=rows, then=st.sampled_from(["average", "arithmetic", "ties"]), seed=seeds)
def test_the_coins_go_with_the_name(taus: list[Tensor], then: str, seed: int) -> None:
    named = [(f"m{i}", tau) for i, tau in enumerate(taus)]
    results = [
        dare(
            torch.ones(len(taus[0])), [t for _, t in order], names=[n for n, _ in order], then=then, seed=seed, drop=0.5
        )
        for order in itertools.permutations(named)
    ]
    assert all(torch.equal(result, results[0]) for result in results)


@few
@given(seed=seeds, copies=st.integers(1, 5), merge=ways)
def test_copies_of_one_model_are_that_model(seed: int, copies: int, merge: str) -> None:
    before, after = draw(seed, 6, 7), draw(seed + 1, 6, 7)
    assert torch.equal(average(before, [after] * copies), after)
    if merge != "sum":
        torch.testing.assert_close(ties(before, [after] * copies, density=1.0, merge=merge), after)
    torch.testing.assert_close(arithmetic(before, [after] * copies, scale=1 / copies), after)
    torch.testing.assert_close(dare(before, [after] * copies, drop=0), after)


@few
@given(seed=seeds, density=densities, merge=ways)
def test_unmoved_models_merge_to_the_base(seed: int, density: float, merge: str) -> None:
    before = draw(seed, 5, 6)
    for rule, given_settings in SYMMETRIC:
        assert torch.equal(rule(before, [before, before], **given_settings), before)
    assert torch.equal(ties(before, [before], density=density, merge=merge), before)
    assert torch.equal(sac(before, [before]), before)


@few
@given(taus=rows, density=densities, merge=ways, factor=st.sampled_from([0.25, 2.0, 64.0]))
def test_larger_updates_merge_to_a_larger_update(taus: list[Tensor], density: float, merge: str, factor: float) -> None:
    """Powers of two: exactly."""
    larger = [tau * factor for tau in taus]
    assert torch.equal(vectors.ties(larger, density, merge), vectors.ties(taus, density, merge) * factor)
    merged = vectors.ties(taus, density, merge)
    for mask, same in zip(mmer.masks(merged, taus), mmer.masks(merged * factor, larger), strict=True):
        assert torch.equal(mask, same)


@few
@given(taus=rows, density=densities)
def test_a_trim_keeps_the_largest(taus: list[Tensor], density: float) -> None:
    """As a stable sort would."""
    for tau in taus:
        order = sorted(range(len(tau)), key=lambda j: (-abs(tau[j].item()), j))
        keep = set(order[: int(density * len(tau) + 0.5)])
        expected = [value if j in keep else 0 for j, value in enumerate(tau.tolist())]
        assert vectors.trim(tau, density).tolist() == expected


@few
@given(taus=rows, density=densities)
def test_the_mean_lies_between_the_largest_and_the_sum(taus: list[Tensor], density: float) -> None:
    mean, largest, total = (vectors.ties(taus, density, how).abs() for how in ("mean", "max", "sum"))
    assert (mean <= largest).all() and (largest <= total).all()


@few
@given(taus=rows, density=densities, merge=ways)
def test_masks_are_the_best_of_all_masks(taus: list[Tensor], density: float, merge: str) -> None:
    trimmed = [vectors.trim(tau, density) for tau in taus]
    merged = vectors.ties(taus, density, merge)
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=len(merged))))
    for mask, tau in zip(mmer.masks(merged, trimmed), trimmed, strict=True):
        best = (every * merged - tau).abs().sum(1).min()
        torch.testing.assert_close((mask * merged - tau).abs().sum(), best)


@few
@given(taus=rows, density=densities, low=st.floats(0, 2), high=st.floats(0, 2))
def test_a_smaller_significance_keeps_more(taus: list[Tensor], density: float, low: float, high: float) -> None:
    low, high = sorted((low, high))
    merged = vectors.ties(taus, density)
    for make in (mmer.masks, tall_masks):
        for more, fewer in zip(make(merged, taus, low), make(merged, taus, high), strict=True):
            assert (more | ~fewer).all()


@few
@given(seed=seeds, significance=st.floats(0, 2))
def test_one_model_is_restored_from_its_mask(seed: int, significance: float) -> None:
    [tau] = vectors.task_vectors(draw(seed, 30), [draw(seed + 1, 30)])
    merged = vectors.ties([tau], 1.0)
    [mask] = mmer.masks(merged, [tau], significance)
    assert torch.equal(mmer.restore(torch.zeros(30), merged, mask), tau)
    assert mmer.rescale(merged, [mask], [tau]).item() == 1


@few
@given(taus=rows, density=densities, merge=ways, significance=st.floats(0, 2))
def test_rescaling_never_moves_away(taus: list[Tensor], density: float, merge: str, significance: float) -> None:
    merged = vectors.ties(taus, density, merge)
    masks = mmer.masks(merged, taus, significance)
    for scale, mask, tau in zip(mmer.rescale(merged, masks, taus), masks, taus, strict=True):
        error = (scale * mask * merged - tau).norm()
        assert error <= (mask * merged - tau).norm() + 1e-5
        assert error <= tau.norm() + 1e-5


@few
@given(bits=st.lists(st.booleans(), max_size=40), columns=st.integers(1, 3))
def test_packing_loses_nothing(bits: list[bool], columns: int) -> None:
    mask = torch.tensor(bits[: len(bits) // columns * columns], dtype=torch.bool).reshape(-1, columns)
    assert torch.equal(mmer.unpack(mmer.pack(mask), mask.shape), mask)


@few
@given(seed=seeds, n=st.integers(1, 300), share=st.floats(0, 0.99), cut=st.floats(0, 1))
def test_a_tensor_may_be_dropped_in_pieces(seed: int, n: int, share: float, cut: float) -> None:
    tau, key, at = draw(seed, n), vectors.key(seed, "image", "w"), int(cut * n)
    pieces = [vectors.drop(tau[:at], share, key), vectors.drop(tau[at:], share, key, at)]
    assert torch.equal(torch.cat(pieces), vectors.drop(tau, share, key))


@few
@given(seed=seeds, weight=alphas, cut=st.integers(0, 40))
def test_a_tensor_may_be_averaged_in_pieces(seed: int, weight: float, cut: int) -> None:
    before, after = draw(seed, 40), draw(seed + 1, 40)
    pieces = [average(before[:cut], [after[:cut]], weight=weight), average(before[cut:], [after[cut:]], weight=weight)]
    assert torch.equal(torch.cat(pieces), average(before, [after], weight=weight))


@few
@given(seed=seeds, window=windows, alpha=alphas)
def test_sac_turns_with_the_update(seed: int, window: str, alpha: float) -> None:
    update = draw(seed, 6, 5).double()
    left, right = (torch.linalg.qr(draw(seed + n, n, n).double()).Q for n in (6, 5))
    result, _ = spectral._by_svd(update, alpha, window)
    turned, _ = spectral._by_svd(left @ update @ right, alpha, window)
    torch.testing.assert_close(turned, left @ result @ right, rtol=1e-5, atol=1e-7)


@few
@given(seed=seeds, alpha=alphas)
def test_sac_only_damps_and_the_strong_most(seed: int, alpha: float) -> None:
    sigma = torch.linalg.svdvals(draw(seed, 8, 7))
    k, averaged = spectral.spectrum(sigma, alpha)
    factors = averaged / sigma.double()
    assert (factors <= 1 + 1e-9).all() and factors[-1] == pytest.approx(1)
    assert 1 <= k <= 7 and (averaged.diff() <= 1e-9).all()


@few
@given(seed=seeds)
def test_sac_of_alpha_one_is_the_new_model_bit_by_bit(seed: int) -> None:
    before, after, bias = draw(seed, 6, 5), draw(seed + 1, 6, 5), draw(seed, 4)
    assert torch.equal(sac(before, [after], alpha=1.0), after)
    assert torch.equal(model_mix(before, [after], alpha=1.0), after)
    assert torch.equal(sac(bias, [bias + 1], alpha=1.0), bias + 1)
    result, _ = spectral.consolidate(after - before, 1.0)
    torch.testing.assert_close(result, after - before)


@few
@given(seed=seeds, window=windows, alpha=alphas, rank=st.integers(1, 4))
def test_sac_of_factors_is_sac(seed: int, window: str, alpha: float, rank: int) -> None:
    a, b = draw(seed, rank, 9), draw(seed + 1, 7, rank)
    new_a, new_b, scale = spectral.decompose(a, b, 0.5).update(alpha, window)
    dense, report = spectral.consolidate(0.5 * b @ a, alpha, window)
    assert report.rank == rank
    torch.testing.assert_close(scale * new_b @ new_a, dense, rtol=1e-3, atol=1e-4)


@few
@given(
    seed=seeds,
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    which=st.sampled_from([*SYMMETRIC, (dare, {"drop": 0.5}), (ewf, {"new": 1, "old": 2})]),
)
def test_short_numbers_are_merged_in_float32(seed: int, dtype: torch.dtype, which: tuple[Rule, dict[str, Any]]) -> None:
    rule, given_settings = which
    before, *after = (draw(seed + i, 6, 5).to(dtype) for i in range(4))
    result = rule(before, after, **given_settings)
    assert result.dtype == dtype
    assert torch.equal(result, rule(before.float(), [t.float() for t in after], **given_settings).to(dtype))


@few
@given(seed=seeds, dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_stages_in_short_numbers_are_merged_in_float32(seed: int, dtype: torch.dtype) -> None:
    before, after = draw(seed, 6, 5).to(dtype), draw(seed + 1, 6, 5).to(dtype)
    for rule in (model_mix, sac):
        result = rule(before, [after], alpha=0.4)
        assert result.dtype == dtype
        assert torch.equal(result, rule(before.float(), [after.float()], alpha=0.4).to(dtype))


@few
@given(seed=seeds, rows=st.integers(1, 5), columns=st.integers(1, 9))
def test_signs_are_closer_than_nothing(seed: int, rows: int, columns: int) -> None:
    tau = draw(seed, rows, columns)
    assert (sign_delta(*signs(tau)) - tau).norm() <= tau.norm()
