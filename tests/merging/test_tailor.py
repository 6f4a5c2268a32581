"""Model Tailor: the score, the patch and its compensation."""

import pytest
import torch
from torch import Tensor

from graftlm.core.errors import MergeError
from graftlm.merging.tailor import hessian, inverse_factor, revert, sensitivity, tailor


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def layer() -> tuple[Tensor, Tensor, Tensor]:
    """Weights before and after, and correlated inputs."""
    before = random(12, 20)
    return before, before + 0.1 * random(12, 20, seed=1), random(400, 6, seed=2) @ random(6, 20, seed=3)


def loss(weights: Tensor, after: Tensor, inputs: Tensor) -> float:
    """What the layer's output differs by from the fine-tuned one's."""
    return float(((weights - after) @ inputs.T.to(weights.dtype)).norm())


def test_one_entry_goes_back() -> None:
    """H = [[2, 1], [1, 2]], w = [1, 1], w_0 → 0: w_1 becomes 1.5, which costs .75 (half of 1.5)."""
    h = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    after, keep = torch.ones(1, 2), torch.tensor([[False, True]])
    assert revert(torch.zeros(1, 2), after, keep, h, damping=0).tolist() == [[0, pytest.approx(1.5)]]
    assert sensitivity(after, inverse_factor(h, 0))[0, 0].item() == pytest.approx(1.5)
    left = torch.tensor([[0, 1.5]]) - after
    assert 0.5 * (left @ h @ left.T).item() == pytest.approx(0.75)


def test_it_goes_back_to_where_it_was() -> None:
    h = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    result = revert(torch.tensor([[3.0, 7.0]]), torch.ones(1, 2), torch.tensor([[False, True]]), h, damping=0)
    assert result.tolist() == [[3, pytest.approx(0)]]


def test_the_compensation_is_least_squares() -> None:
    """Entries 0 and 1 go back; what the others then are is the minimum over all their values."""
    before, after, inputs = random(3, 6), random(3, 6, seed=1), random(50, 6, seed=2)
    keep = torch.ones(3, 6, dtype=torch.bool)
    keep[:, :2] = False
    result = revert(before, after, keep, hessian(inputs), damping=0)
    rest = torch.linalg.lstsq(inputs[:, 2:], inputs[:, :2] @ (after - before)[:, :2].T).solution.T
    torch.testing.assert_close(
        result, torch.cat([before[:, :2], after[:, 2:] + rest], 1).double(), rtol=1e-4, atol=1e-4
    )


def test_the_hessian() -> None:
    inputs = random(2, 7, 4)
    torch.testing.assert_close(hessian(inputs), torch.einsum("bti,btj->ij", inputs, inputs))
    torch.testing.assert_close(hessian(iter(inputs)), hessian(inputs))
    torch.testing.assert_close(hessian(inputs.bfloat16()), hessian(inputs), rtol=0.02, atol=0.1)
    with pytest.raises(MergeError, match="hessian: no calibration inputs; the paper takes 128"):
        hessian([])


def test_the_factor() -> None:
    h = hessian(random(30, 5))
    factor = inverse_factor(h, 0)
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(h.double()))
    for q in range(5):
        assert factor[q, q] ** 2 == pytest.approx(torch.linalg.inv(h[q:, q:].double())[0, 0].item(), rel=1e-6)
    h[2], h[:, 2] = 0, 0
    assert torch.isfinite(inverse_factor(h, 0.01)).all()
    with pytest.raises(MergeError, match="the Hessian of 3 inputs is not positive definite with damping 0"):
        inverse_factor(-torch.eye(3), 0)


@pytest.mark.parametrize("block", [7, 128])
def test_a_share_stays_and_the_rest_is_as_before(layer: tuple[Tensor, Tensor, Tensor], block: int) -> None:
    before, after, inputs = layer
    for h in (None, hessian(inputs)):
        result = tailor(before, after, hessian=h, share=0.1, block=block)
        kept = result != before
        for start in range(0, 20, block):
            piece = kept[:, start : start + block]
            assert piece.sum() == int(0.1 * piece.numel() + 0.5)
        # independent inputs cannot take anything over
        assert torch.equal(result[kept], after[kept]) == (h is None)


def test_magnitude_alone() -> None:
    before, after = torch.zeros(2, 4), torch.tensor([[1.0, -4.0, 1.0, 2.0], [10.0, 20.0, 10.0, 80.0]])
    result = tailor(before, after, weight=0, share=0.25)
    # rows are standardised: the small row keeps its largest entry too
    assert result.tolist() == [[0, -4, 0, 0], [0, 0, 0, 80]]


def test_a_sensitive_input_is_kept() -> None:
    """All entries moved alike; only the last input is ever large."""
    h = torch.diag(torch.tensor([1.0, 1.0, 1.0, 100.0]))
    result = tailor(torch.zeros(3, 4), torch.ones(3, 4), hessian=h, share=0.25)
    assert result.tolist() == [[0, 0, 0, 1]] * 3


def test_compensation_helps_and_the_released_sign_hurts(layer: tuple[Tensor, Tensor, Tensor]) -> None:
    before, after, inputs = layer
    h, keep = hessian(inputs), random(12, 20, seed=5) > 0
    plain = loss(torch.where(keep, after, before), after, inputs)
    assert loss(revert(before, after, keep, h), after, inputs) < plain
    right = loss(tailor(before, after, hessian=h, share=0.5), after, inputs)
    wrong = loss(tailor(before, after, hessian=h, share=0.5, compat_reference=True), after, inputs)
    assert right < loss(before, after, inputs) and right < wrong


def test_blocks_are_compensated_across(layer: tuple[Tensor, Tensor, Tensor]) -> None:
    """One score over all columns, or none: then the width of a block does not matter."""
    before, after, inputs = layer
    h = hessian(inputs)
    for block in (1, 3, 20):
        torch.testing.assert_close(tailor(before, after, hessian=h, share=1.0, block=block), after)
    # the first block keeps all, so nothing changes; the second reverts one column by its score
    one = revert(before, after, torch.arange(20).expand(12, 20) > 0, h)
    assert torch.equal(one[:, 0], before[:, 0].double()) and not torch.allclose(one[:, 1:], after[:, 1:].double())


def test_as_released() -> None:
    """W² where Δ² goes back: the entry of large weight, though it hardly moved."""
    before = torch.tensor([[1.0, 1.0, 1.0, 50.0]])
    after = before + torch.tensor([[0.1, 0.3, 0.1, 0.1]])
    assert tailor(before, after, share=0.25, weight=1.0)[0].ne(before[0]).tolist() == [False, True, False, False]
    released = tailor(before, after, share=0.25, weight=1.0, compat_reference=True)
    # floor(.75 · 4) = 3 entries lie at or below the threshold of rank 3: nothing is strictly above it
    assert torch.equal(released, before)
    released = tailor(before, after, share=0.5, weight=1.0, compat_reference=True)
    assert released[0].ne(before[0]).tolist() == [False, False, False, True]


def test_dtypes_and_shapes(layer: tuple[Tensor, Tensor, Tensor]) -> None:
    before, after, inputs = layer
    h = hessian(inputs)
    result = tailor(before.bfloat16(), after.bfloat16(), hessian=h)
    assert result.dtype == torch.bfloat16
    folded = tailor(before.reshape(12, 5, 4), after.reshape(12, 5, 4), hessian=h)
    assert torch.equal(folded, tailor(before, after, hessian=h).reshape(12, 5, 4))


def test_errors(layer: tuple[Tensor, Tensor, Tensor]) -> None:
    before, after, _ = layer
    with pytest.raises(MergeError, match=r"tailor: weights of shape \(20,\); at least 2 dimensions are expected"):
        tailor(before[0], after[0])
    with pytest.raises(MergeError, match=r"a Hessian of shape \(3, 3\) for weights of shape \(12, 20\); \(20, 20\)"):
        tailor(before, after, hessian=torch.eye(3))
    with pytest.raises(MergeError, match=r"tailor: tensors of shapes \(12, 20\), \(11, 20\)"):
        tailor(before, after[1:])
    with pytest.raises(MergeError, match="density 0 is not a share to keep"):
        tailor(before, after, share=0)
    with pytest.raises(MergeError, match="tailor: weight 2 is not a share"):
        tailor(before, after, weight=2)
    with pytest.raises(MergeError, match="tailor: damping -1 is negative"):
        tailor(before, after, damping=-1)
    with pytest.raises(MergeError, match="tailor: blocks of 0 columns"):
        tailor(before, after, block=0)
