"""TALL masks and consensus."""

import pytest
import torch

from graftlm.core.errors import MergeError
from graftlm.merging import mmer
from graftlm.merging.rules import arithmetic, consensus, ties
from graftlm.merging.tall import consensus_mask, tall_masks

TAUS = [torch.tensor([4, -1, 0.5, 2, -3]), torch.tensor([1, 3, -2, -0.5, -1])]
SUM = TAUS[0] + TAUS[1]


def test_masks_of_the_sum() -> None:
    assert SUM.tolist() == [5, 2, -1.5, 1.5, -4]
    masks = tall_masks(SUM, TAUS, 1.0)
    assert [mask.int().tolist() for mask in masks] == [[1, 0, 0, 1, 1], [0, 1, 1, 0, 0]]
    assert all(torch.equal(a, b) for a, b in zip(masks, mmer.masks(SUM, TAUS), strict=True))


def test_below_one_the_opposite_sign_may_pass() -> None:
    """|-1| ≥ .2 |2 + 1|, where MMER never keeps it."""
    masks = tall_masks(SUM, TAUS, 0.2)
    assert masks[0][1] and not mmer.masks(SUM, TAUS, 0.2)[0][1]
    assert torch.equal(tall_masks(SUM, TAUS, [1.0, 0.2])[1], masks[1])


def test_consensus() -> None:
    masks = [torch.tensor(row).bool() for row in ([1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0])]
    assert [consensus_mask(masks, uses).int().tolist() for uses in range(4)] == [
        [1, 1, 1, 1],
        [1, 1, 1, 0],
        [1, 1, 0, 0],
        [1, 0, 0, 0],
    ]
    with pytest.raises(MergeError, match="consensus: an entry of use to 4 of 3 tasks; a number from 0 to 3"):
        consensus_mask(masks, 4)


def test_the_rule() -> None:
    """λ = .3: the first task uses all entries but 2, the second 1, 2 and 4."""
    before = torch.zeros(5)
    assert consensus(before, TAUS, scale=1.0, significance=0.3).tolist() == [0, 2, 0, 0, -4]
    assert torch.equal(consensus(before, TAUS, uses=0, scale=0.5), arithmetic(before, TAUS, scale=0.5))
    assert torch.equal(
        consensus(before, TAUS, uses=0, scale=0.5, merge="ties", density=0.8),
        ties(before, TAUS, scale=0.5, merge="sum", density=0.8),
    )
    with pytest.raises(MergeError, match="consensus: merge 'tie' is unknown; did you mean 'ties'"):
        consensus(before, TAUS, merge="tie")
