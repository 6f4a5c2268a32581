"""Merging rules on small numbers."""

import subprocess
import sys

import pytest
import torch

from graftlm.core.errors import ConfigError, MergeError
from graftlm.merging import RULES
from graftlm.merging.rules import Rule, average, keep_new
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
