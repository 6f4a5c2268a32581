"""MMER's masks on small numbers, and what a composition takes on disk."""

import itertools

import pytest
import torch
from torch import Tensor

from graftlm.core.errors import MergeError
from graftlm.merging import mmer, vectors

TAUS = [torch.tensor([4, -1, 0.5, 2, -3]), torch.tensor([1, 3, -2, -0.5, -1])]
TRIMMED = [vectors.trim(tau, 0.8) for tau in TAUS]
MERGED = vectors.ties(TAUS, 0.8)


def bits(masks: list[Tensor]) -> list[list[int]]:
    assert all(mask.dtype == torch.bool for mask in masks)
    return [mask.int().tolist() for mask in masks]


@pytest.mark.parametrize(
    ("how", "significance", "expected"),
    [
        ("mean", 1.0, [[1, 0, 0, 1, 1], [0, 1, 1, 0, 1]]),
        ("mean", 1.5, [[1, 0, 0, 1, 1], [0, 1, 1, 0, 0]]),
        ("mean", 0.6, [[1, 0, 0, 1, 1], [1, 1, 1, 0, 1]]),
        ("mean", [1.0, 1.5], [[1, 0, 0, 1, 1], [0, 1, 1, 0, 0]]),
        ("sum", 1, [[1, 0, 0, 1, 1], [0, 1, 1, 0, 0]]),
    ],
)
def test_masks(how: str, significance: float | list[float], expected: list[list[int]]) -> None:
    assert bits(mmer.masks(vectors.ties(TAUS, 0.8, how), TRIMMED, significance)) == expected


def test_masks_are_optimal() -> None:
    """Residuals 3.5 and 2.0, the least of all 2^5 masks."""
    residuals = [
        (mask * MERGED - tau).abs().sum().item() for mask, tau in zip(mmer.masks(MERGED, TRIMMED), TRIMMED, strict=True)
    ]
    assert residuals == [3.5, 2.0]
    every = [torch.tensor(choice) for choice in itertools.product([False, True], repeat=5)]
    assert residuals == [min((mask * MERGED - tau).abs().sum().item() for mask in every) for tau in TRIMMED]


def test_the_sign_comes_before_the_magnitude() -> None:
    assert bits(mmer.masks(torch.tensor([1.0, 1.0, 0.0, 1.0]), [torch.tensor([-9.0, 9.0, 9.0, 0.0])], 0)) == [
        [0, 1, 0, 0]
    ]


def test_text_takes_the_mean_mask() -> None:
    masks = mmer.masks(MERGED, TRIMMED)
    mean = mmer.mean_mask(masks)
    assert mean.dtype == torch.float32 and mean.tolist() == [0.5, 0.5, 0.5, 0.5, 1]
    assert mmer.restore(torch.zeros(5), MERGED, mean).tolist() == [1.25, 1.5, -1, 1, -2]


def test_every_token_has_its_weight() -> None:
    before, merged = torch.eye(2), torch.tensor([[2.0, -1.0], [0.0, 1.0]])
    masks = [torch.tensor([[1, 0], [0, 1]]).bool(), torch.tensor([[0, 1], [0, 1]]).bool()]
    token = torch.ones(2)
    weights = [mmer.restore(before, merged, mask) for mask in (*masks, mmer.mean_mask(masks))]
    assert [(token @ weight).tolist() for weight in weights] == [[3, 2], [1, 1], [2, 1.5]]


def test_one_model_is_restored() -> None:
    before, after = torch.randn(40).bfloat16(), torch.randn(40).bfloat16()
    tau = vectors.task_vectors(before, [after])
    merged = vectors.ties(tau, 1.0)
    [mask] = mmer.masks(merged, tau)
    assert torch.equal(mask * merged, tau[0])
    restored = mmer.restore(before, merged, mask)
    assert restored.dtype == torch.bfloat16 and torch.equal(restored, after)


def test_rescaling() -> None:
    """One number per model: 15.25 / 14.25 for m τ* = [2.5, 0, 0, 2, -2] and τ = [4, -1, .5, 2, -3]."""
    masks = mmer.masks(MERGED, TRIMMED)
    scales = mmer.rescale(MERGED, masks, TAUS)
    assert scales.dtype == torch.float32
    assert scales.tolist() == pytest.approx([20 / 14.25, 15 / 17])
    assert mmer.rescale(MERGED, [torch.zeros(5, dtype=torch.bool)], TAUS[:1]).tolist() == [0]
    restored = mmer.restore(torch.zeros(5), MERGED, masks[1], scale=2.0)
    assert restored.tolist() == [0, 6, -4, 0, -4]


def test_packing() -> None:
    mask = torch.tensor([[True, False, False], [False, False, False], [False, True, True]])
    assert mmer.pack(mask).tolist() == [0b10000001, 0b1]
    assert torch.equal(mmer.unpack(mmer.pack(mask), (3, 3)), mask)
    for shape in ((), (0,), (8,), (2, 4, 3), (65,)):
        random = torch.rand(shape) < 0.5
        assert mmer.pack(random).dtype == torch.uint8 and mmer.pack(random).shape == ((random.numel() + 7) // 8,)
        assert torch.equal(mmer.unpack(mmer.pack(random), shape), random)


def test_errors() -> None:
    with pytest.raises(MergeError, match=r"mmer: tensors of shapes \(5,\), \(4,\); one shape is expected"):
        mmer.masks(MERGED, [TAUS[0][:4]])
    with pytest.raises(MergeError, match="3 values of significance for 2 models; 1 for all or 1 each"):
        mmer.masks(MERGED, TAUS, [1, 1, 1])
    with pytest.raises(MergeError, match=r"significance -1\.0 is out of range; a number from 0"):
        mmer.masks(MERGED, TAUS, -1)
    with pytest.raises(MergeError, match=r"uint8 and shape \(2,\); \(3,\) of uint8 are expected .* \(4, 5\)"):
        mmer.unpack(torch.zeros(2, dtype=torch.uint8), (4, 5))


def test_storage() -> None:
    sizes = {"models": 4, "parameters": 7e9, "specific": 0.3e9, "adapters": 0.32e9}
    gigabytes = {m: mmer.storage_bits(m, **sizes) / 8e9 for m in ("originals", "plain", "damc", "mmer")}
    assert gigabytes == pytest.approx({"originals": 116.8, "plain": 32.8, "damc": 43.04, "mmer": 64.3})
    tiny = {m: mmer.storage_bits(m, 2, 10, 1, 2) for m in ("originals", "plain", "damc", "mmer")}
    assert tiny == {"originals": 704, "plain": 384, "damc": 640, "mmer": 724}
    assert mmer.storage_bits("mmer", 2, 10, 1 / 2) == 692 and mmer.storage_bits("model_tailor", 2, 10, 1) == 352
    assert mmer.storage_bits("mmer", 2, 10, 1, dtype_bits=16) == 16 * 22 + 20
    with pytest.raises(MergeError, match="no storage formula for 'mner'; did you mean 'mmer'"):
        mmer.storage_bits("mner", 2, 10, 1)


def test_masks_pay_off_from_three_models_on() -> None:
    for models in (2, 3, 4):
        smaller = mmer.storage_bits("mmer", models, 1000, 10) < mmer.storage_bits("originals", models, 1000, 10)
        assert smaller == (models >= 3)
