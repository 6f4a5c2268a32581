"""Task vectors on small numbers."""

import hashlib
import itertools

import pytest
import torch
from torch import Tensor

from graftlm.core.errors import MergeError
from graftlm.merging import vectors

TAUS = [torch.tensor([4, -1, 0.5, 2, -3]), torch.tensor([1, 3, -2, -0.5, -1])]


def numbers(*values: float) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("density", "trimmed", "signs", "merged"),
    [
        (
            0.8,
            [[4, -1, 0, 2, -3], [1, 3, -2, 0, -1]],
            [1, 1, -1, 1, -1],
            {"mean": [2.5, 3, -2, 2, -2], "sum": [5, 3, -2, 2, -4], "max": [4, 3, -2, 2, -3]},
        ),
        (
            0.4,
            [[4, 0, 0, 0, -3], [0, 3, -2, 0, 0]],
            [1, 1, -1, 0, -1],
            {how: [4, 3, -2, 0, -3] for how in ("mean", "sum", "max")},
        ),
    ],
)
def test_ties_step_by_step(
    density: float, trimmed: list[list[float]], signs: list[float], merged: dict[str, list[float]]
) -> None:
    sparse = [vectors.trim(tau, density) for tau in TAUS]
    assert [tau.tolist() for tau in sparse] == trimmed
    elected = vectors.elect(sparse)
    assert elected.tolist() == signs
    for how, result in merged.items():
        assert vectors.disjoint(sparse, elected, how).tolist() == result
        assert vectors.ties(TAUS, density, how).tolist() == result


def test_the_reference_keeps_one_entry_more() -> None:
    assert vectors.ties(TAUS, 0.4, compat_reference=True).tolist() == [2.5, 3, -2, 2, -2]
    assert vectors.trim(TAUS[0], 1.0, compat_reference=True).tolist() == TAUS[0].tolist()


def test_the_reference_gives_an_undecided_entry_to_the_majority() -> None:
    taus = [numbers(2, 5, 1), numbers(-2, 1, 1)]
    assert vectors.elect(taus).tolist() == [0, 1, 1]
    assert vectors.elect(taus, compat_reference=True).tolist() == [1, 1, 1]
    assert vectors.disjoint(taus, vectors.elect(taus, compat_reference=True)).tolist() == [2, 3, 1]


@pytest.mark.parametrize(
    ("density", "kept"), [(0.75, [1, 0, 1, 1]), (0.5, [1, 0, 0, 1]), (0.25, [0, 0, 0, 1]), (0.1, [0, 0, 0, 0])]
)
def test_of_equal_magnitudes_the_first_are_kept(density: float, kept: list[int]) -> None:
    values = numbers(2, 1, 2, 3)
    assert vectors.largest(values, density).int().tolist() == kept
    assert vectors.largest(values.reshape(2, 2), density).flatten().int().tolist() == kept


def test_counts_are_rounded_half_up() -> None:
    assert [vectors.count(5, density) for density in (0.1, 0.3, 0.5, 0.7, 1.0)] == [1, 2, 3, 4, 5]
    assert vectors.largest(torch.zeros(10), 0.35).int().tolist() == [1] * 4 + [0] * 6
    assert vectors.largest(torch.zeros(2, 0), 0.5).shape == (2, 0)


@pytest.mark.parametrize("density", [0.0, -0.2, 1.01, float("nan")])
def test_a_density_is_a_share(density: float) -> None:
    with pytest.raises(MergeError, match=f"density {density} is not a share to keep; a number above 0"):
        vectors.trim(TAUS[0], density)
    with pytest.raises(MergeError, match="is not a share to keep"):
        vectors.trim(TAUS[0], density, compat_reference=True)


def test_what_is_not_a_number_is_refused() -> None:
    with pytest.raises(MergeError, match="a tensor holds NaN; finite weights are expected"):
        vectors.trim(numbers(1, float("nan"), 2), 0.5)


def test_unknown_merges_and_shapes() -> None:
    with pytest.raises(MergeError, match="merge 'meen' is unknown; did you mean 'mean'"):
        vectors.disjoint(TAUS, vectors.elect(TAUS), "meen")
    with pytest.raises(MergeError, match=r"ties: tensors of shapes \(5,\), \(4,\); one shape is expected"):
        vectors.ties([TAUS[0], TAUS[1][:4]], 0.5)
    with pytest.raises(MergeError, match="ties: no tensor; at least 1"):
        vectors.ties([], 0.5)


def splitmix(key: int, j: int) -> int:
    """The definition, in Python's own integers."""
    modulus = 1 << 64
    z = (key + (j + 1) * 0x9E3779B97F4A7C15) % modulus
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % modulus
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % modulus
    return z ^ (z >> 31)


def test_splitmix_of_zero() -> None:
    """The published first outputs of splitmix64 for the seed 0."""
    assert [splitmix(0, j) for j in range(3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.5, 0.9])
def test_coins_are_as_defined(drop: float) -> None:
    key = vectors.key(7, "image", "model.norm.weight")
    assert key == int.from_bytes(hashlib.sha256(b"7:image:model.norm.weight").digest()[:8], "little")
    edge = int(drop * 2**24 + 0.5)
    places = [0, 1, 2, 3, 1000, (1 << 40) + 5]
    for place in places:
        assert vectors.kept(1, drop, key, place).item() == ((splitmix(key, place) >> 40) >= edge)
    assert vectors.kept(50, 0.0, key).all() and vectors.kept(0, 0.5, key).shape == (0,)


def test_coins_do_not_depend_on_where_the_tensor_is_cut() -> None:
    key, n = vectors.key(0, "audio", "w"), 2 * vectors.BLOCK + 17
    whole = vectors.kept(n, 0.7, key)
    cuts = [0, 1, 1000, vectors.BLOCK - 1, vectors.BLOCK, vectors.BLOCK + 9, n]
    pieces = [vectors.kept(end - start, 0.7, key, start) for start, end in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(pieces), whole)
    tau = torch.randn(n)
    pieces = [vectors.drop(tau[start:end], 0.7, key, start) for start, end in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(pieces), vectors.drop(tau, 0.7, key))


@pytest.mark.parametrize("drop", [0.3, 0.9])
def test_coins_are_fair(drop: float) -> None:
    """Within five deviations: the share of one tensor, of one entry over tensors, and of pairs."""
    n = 200_000
    coins = vectors.kept(n, drop, vectors.key(1, "video", "w")).double()
    deviation = (drop * (1 - drop) / n) ** 0.5
    assert abs(coins.mean() - (1 - drop)) < 5 * deviation
    assert abs(((coins[1:] - 1 + drop) * (coins[:-1] - 1 + drop)).mean()) < 5 * drop * (1 - drop) / n**0.5
    first = torch.cat([vectors.kept(1, drop, vectors.key(1, "video", f"w{i}")) for i in range(2000)]).double()
    assert abs(first.mean() - (1 - drop)) < 5 * (drop * (1 - drop) / 2000) ** 0.5
    assert not torch.equal(coins, vectors.kept(n, drop, vectors.key(2, "video", "w")).double())


def test_dropping_and_rescaling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "kept", lambda *_: torch.tensor([True, False, True, False]))
    assert vectors.drop(numbers(1, 2, 3, 4), 0.5, key=0).tolist() == [2, 0, 6, 0]


def test_the_expectation_of_dropping_is_the_task_vector() -> None:
    tau = numbers(1, -2, 3, 0.5)
    mean = torch.stack([vectors.drop(tau, 0.75, vectors.key(s, "m", "w")) for s in range(4000)]).mean(0)
    # one draw deviates by sqrt(p / (1-p)) |tau|
    assert ((mean - tau).abs() < 5 * 3**0.5 * tau.abs() / 4000**0.5).all()


@pytest.mark.parametrize("drop", [1.0, -0.1, float("nan")])
def test_something_must_be_left(drop: float) -> None:
    with pytest.raises(MergeError, match=f"drop {drop} is not a share to drop; a number from 0, below 1"):
        vectors.kept(3, drop, 0)
