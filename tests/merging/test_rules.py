"""Merging rules on small numbers."""

import math
import subprocess
import sys

import pytest
import torch

from graftlm.core.errors import ConfigError, MergeError
from graftlm.merging import RULES, vectors
from graftlm.merging.rules import Rule, arithmetic, average, consensus, dare, ewf, keep_new, model_mix, sac, ties
from graftlm.model import adapters


def test_the_running_average_of_4_10_1_9() -> None:
    theta, seen = torch.tensor(0.0), []
    for stage, vanilla in enumerate([4.0, 10.0, 1.0, 9.0], start=1):
        theta = average(theta, [torch.tensor(vanilla)], weight=1 / stage)
        seen.append(theta.item())
    assert seen == pytest.approx([4, 7, 5, 6])


def test_scaling_the_update_is_averaging() -> None:
    a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [2.0]])
    assert average.factored is not None
    new_a, new_b, scale = average.factored(a, b, 2.0, weight=0.25)
    before = torch.ones(2, 2)
    torch.testing.assert_close(before + scale * new_b @ new_a, average(before, [before + 2.0 * b @ a], weight=0.25))


def test_the_ends_are_bit_exact() -> None:
    before, after = torch.randn(50), torch.randn(50) * 1e3
    assert torch.equal(average(before, [after], weight=0), before)
    assert torch.equal(average(before, [after], weight=1), after)
    assert torch.equal(keep_new(before, [after]), after)


def test_results_are_new_tensors_of_the_dtype_before() -> None:
    before, after = torch.zeros(3, dtype=torch.bfloat16), torch.ones(3)
    for result in (average(before, [after], weight=1.0), keep_new(before, [after])):
        assert result.dtype == torch.bfloat16 and torch.equal(result.float(), after)
    assert keep_new(after, [after]) is not after
    assert keep_new(after, [after]).data_ptr() != after.data_ptr()


def test_several_models() -> None:
    models = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), torch.tensor([8.0, 0.0])]
    torch.testing.assert_close(average(torch.zeros(2), models, weight=1.0), torch.tensor([4.0, 2.0]))
    torch.testing.assert_close(average(torch.zeros(2), models, weight=0.5), torch.tensor([2.0, 1.0]))


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_a_weight_is_a_share(weight: float) -> None:
    with pytest.raises(MergeError, match=f"average: weight {weight} is not a share; a number from 0 to 1"):
        average(torch.zeros(1), [torch.zeros(1)], weight=weight)
    assert average.factored is not None
    with pytest.raises(MergeError, match="is not a share"):
        average.factored(torch.zeros(1, 1), torch.zeros(1, 1), 1.0, weight=weight)


TAUS = [torch.tensor([4, -1, 0.5, 2, -3]), torch.tensor([1, 3, -2, -0.5, -1])]
NOTHING = torch.zeros(5)


def test_average_defaults_to_the_plain_mean() -> None:
    assert average(NOTHING, TAUS).tolist() == [2.5, 1, -0.75, 0.75, -2]


def test_task_arithmetic() -> None:
    assert arithmetic(NOTHING, TAUS, scale=0.5).tolist() == [2.5, 1, -0.75, 0.75, -2]
    torch.testing.assert_close(arithmetic(torch.ones(5), [tau + 1 for tau in TAUS]), 1 + 0.3 * (TAUS[0] + TAUS[1]))
    with pytest.raises(MergeError, match="arithmetic: scale inf is not finite"):
        arithmetic(NOTHING, TAUS, scale=math.inf)


def test_ties() -> None:
    assert ties(NOTHING, TAUS, density=0.8).tolist() == [2.5, 3, -2, 2, -2]
    assert ties(NOTHING, TAUS, density=0.8, merge="sum", scale=0.5).tolist() == [2.5, 1.5, -1, 1, -2]
    assert ties(NOTHING, TAUS, density=0.4, merge="max").tolist() == [4, 3, -2, 0, -3]
    assert ties(NOTHING, TAUS, density=0.4, compat_reference=True).tolist() == [2.5, 3, -2, 2, -2]
    assert ties(NOTHING, TAUS).tolist() == [4, 3, 0, 0, 0]
    for density in (0, 1.5):
        with pytest.raises(MergeError, match=f"density {density} is not a share to keep"):
            ties(NOTHING, TAUS, density=density)


def test_dare_without_dropping_is_what_follows() -> None:
    for then, rule, settings in (
        ("average", average, {"weight": 0.5}),
        ("arithmetic", arithmetic, {"scale": 0.5}),
        ("ties", ties, {"density": 0.4, "merge": "sum"}),
    ):
        assert torch.equal(dare(NOTHING, TAUS, drop=0, then=then, **settings), rule(NOTHING, TAUS, **settings))


def test_dare_drops_by_model_and_tensor() -> None:
    before, after = torch.zeros(1000), [torch.ones(1000), torch.ones(1000)]
    result = dare(before, after, drop=0.5, names=["image", "audio"], tensor="w")
    assert sorted(set(result.tolist())) == [0, 1, 2]
    coins = [vectors.kept(1000, 0.5, vectors.key(0, name, "w")) for name in ("image", "audio")]
    assert torch.equal(result, coins[0].float() + coins[1].float())
    assert not torch.equal(result, dare(before, after, drop=0.5, names=["image", "audio"], tensor="v"))
    assert not torch.equal(result, dare(before, after, drop=0.5, names=["image", "audio"], tensor="w", seed=1))
    assert torch.equal(dare(before, after, drop=0.5), dare(before, after, drop=0.5, names=["0", "1"]))


def test_dare_checks_its_settings() -> None:
    with pytest.raises(MergeError, match="dare: no rule 'tie' to follow; did you mean 'ties'"):
        dare(NOTHING, TAUS, then="tie")
    with pytest.raises(MergeError, match="dare: no setting 'densty' of 'ties'; did you mean 'density'"):
        dare(NOTHING, TAUS, then="ties", densty=0.5)
    with pytest.raises(MergeError, match="drop 1 is not a share to drop"):
        dare(NOTHING, TAUS, drop=1)
    for names in (["a"], ["a", "a"]):
        with pytest.raises(MergeError, match="for 2 models; a name of its own for each is expected"):
            dare(NOTHING, TAUS, names=names)


def test_moincl_fusion() -> None:
    """α = .1 of the current weights; an epoch that adds 1 before each fusion goes towards 1/9."""
    old, current = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])
    torch.testing.assert_close(average(old, [current], weight=0.1), torch.tensor([1.2, 1.6]))
    theta, seen = torch.zeros(1), []
    for _ in range(3):
        theta = average(torch.zeros(1), [theta + 1], weight=0.1)
        seen.append(theta.item())
    assert seen == pytest.approx([0.1, 0.11, 0.111])


def test_ewf() -> None:
    assert ewf(torch.zeros(1), [torch.ones(1)], new=1, old=3) == 0.5
    assert ewf(torch.zeros(1), [torch.ones(1)], new=5, old=0) == 1
    for new, old in ((0, 3), (1, -1), (math.inf, 1)):
        with pytest.raises(MergeError, match=f"ewf: {new} new and {old} old; at least one"):
            ewf(torch.zeros(1), [torch.ones(1)], new=new, old=old)


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        (average, {"weight": 0.3}),
        (arithmetic, {"scale": 0.3}),
        (model_mix, {"alpha": 0.3}),
        (sac, {"alpha": 0.3}),
        (ewf, {"new": 1, "old": 3}),
    ],
)
def test_the_low_rank_form_is_the_dense_form(rule: Rule, settings: dict[str, float]) -> None:
    a, b, before = torch.randn(3, 10), torch.randn(8, 3), torch.randn(8, 10)
    assert rule.factored is not None
    new_a, new_b, scale = rule.factored(a, b, 0.5, **settings)
    dense = rule(before, [before + 0.5 * b @ a], **settings)
    torch.testing.assert_close(before + scale * new_b @ new_a, dense, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rule", [arithmetic, ties, dare, consensus, average])
def test_shapes_must_agree(rule: Rule) -> None:
    with pytest.raises(MergeError, match=rf"{rule.name}: tensors of shapes \(5,\), \(5,\), \(4,\); one shape is exp"):
        rule(NOTHING, [TAUS[0], TAUS[1][:4]])
    with pytest.raises(MergeError, match=f"{rule.name}: no tensor after; at least 1"):
        rule(NOTHING, [])


def test_something_must_be_merged() -> None:
    with pytest.raises(MergeError, match="average: no tensor after; at least 1"):
        average(torch.zeros(1), [], weight=1.0)


def test_the_table() -> None:
    for name in RULES.table():
        rule = RULES.get(name)
        assert isinstance(rule, Rule) and rule.name == name
    assert keep_new is adapters.keep_new
    with pytest.raises(ConfigError, match="no merging rule 'averag'; did you mean 'average'"):
        RULES.get("averag")


def test_the_table_is_read_without_torch() -> None:
    code = "import sys; from graftlm.merging import RULES; RULES.table(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
