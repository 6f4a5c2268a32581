"""Task vectors of one bit per weight."""

import pytest
import torch

from graftlm.core.errors import MergeError
from graftlm.merging.signs import sign_delta, signs


def test_signs() -> None:
    tau = torch.tensor([[1.0, -3.0], [0.0, 4.0]])
    bits, scales = signs(tau)
    assert bits.int().tolist() == [[1, 0], [0, 1]] and scales.tolist() == [2, 2]
    assert sign_delta(bits, scales).tolist() == [[2, -2], [-2, 2]]


@pytest.mark.parametrize(("shape", "rows"), [((3, 5), 3), ((5,), 1), ((), 1), ((4, 2, 3), 4)])
def test_shapes(shape: tuple[int, ...], rows: int) -> None:
    tau = torch.randn(shape).bfloat16()
    bits, scales = signs(tau)
    delta = sign_delta(bits, scales)
    assert bits.shape == delta.shape == shape and scales.shape == (rows,)
    assert scales.dtype == delta.dtype == torch.float32
    flat = tau.float().reshape(rows, -1)
    torch.testing.assert_close(delta.reshape(rows, -1).abs(), flat.abs().mean(1, keepdim=True).expand_as(flat))
    assert torch.equal(delta > 0, tau > 0)


def test_no_other_length_is_closer() -> None:
    tau = torch.randn(6, 50)
    bits, scales = signs(tau)
    best = (sign_delta(bits, scales) - tau).norm()
    for factor in (0.5, 0.98, 1.02, 2.0):
        assert (sign_delta(bits, scales * factor) - tau).norm() > best


def test_one_scale_per_row() -> None:
    with pytest.raises(MergeError, match=r"scales of shape \(1,\) for signs of shape \(2, 3\); \(2,\) is expected"):
        sign_delta(torch.ones(2, 3, dtype=torch.bool), torch.ones(1))
