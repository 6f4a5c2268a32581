"""Gains: the paper's own tables recomputed, the standard vectors, and what must hold for any table."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftlm.core.errors import DataError
from graftlm.evaluation import gains

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden_mera.json").read_text())
METHODS = list(GOLDEN["table2"])
ORDERS = ["sequential", "reverse"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", ORDERS)
def test_the_raw_scores_give_table_2(order: str, method: str) -> None:
    mean, spread = gains.summary(gains.backward_gains(GOLDEN[order][method], GOLDEN["experts"]))
    assert [round(mean, 2), round(spread, 2)] == GOLDEN["table2"][method][ORDERS.index(order)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", ORDERS)
def test_backward_gain_per_stage(order: str, method: str) -> None:
    values = gains.backward_gains(GOLDEN[order][method], GOLDEN["experts"])
    assert values == pytest.approx(GOLDEN["backward"][order][method], abs=0.006)


@pytest.mark.parametrize("method", METHODS)
def test_backward_gain_averaged_over_both_orders(method: str) -> None:
    """The curves of the paper's Figure 3."""
    both = [gains.backward_gains(GOLDEN[order][method], GOLDEN["experts"]) for order in ORDERS]
    averages = [sum(pair) / 2 for pair in zip(*both, strict=True)]
    assert averages == pytest.approx(GOLDEN["average"][method], abs=0.011)  # of values that were rounded before


def test_mera_ends_at_99_84_averaged_over_both_orders() -> None:
    last = [gains.backward_gains(GOLDEN[order]["mera10"], GOLDEN["experts"])[-1] for order in ORDERS]
    assert round(sum(last) / 2, 2) == 99.84


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", ORDERS)
def test_forward_gain_where_the_paper_has_it(order: str, method: str) -> None:
    values = gains.forward_gains(GOLDEN[order][method][:3], GOLDEN["experts"])[1:]
    assert values == pytest.approx(GOLDEN["forward"][order][method], abs=0.006)


def test_a_missing_score_of_the_newest_modality_matters_to_the_forward_gain_only() -> None:
    scores = GOLDEN["sequential"]["finetune"]
    bare = [*scores[:3], {name: x for name, x in scores[3].items() if name != "point"}]
    assert gains.backward_gains(bare, GOLDEN["experts"]) == gains.backward_gains(scores, GOLDEN["experts"])
    with pytest.raises(DataError, match=r"no score of \['cap3d_qa'\]"):
        gains.forward_gains(scores, GOLDEN["experts"])
    with pytest.raises(DataError, match="stage 4 has scores of"):
        gains.forward_gains(bare, GOLDEN["experts"])


ONE, HALF = {"t": 1.0}, {"t": 0.5}


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([{}], r"stage 1 has scores of \[\]"),
        ([{"a": {}}], r"no score of \['t'\]"),
        ([{"a": {"t": None}}], r"no score of \['t'\]"),
        ([{"z": ONE}], "no expert of 'z'"),
        ([{"a": ONE}, {"b": HALF}], "stage 1 has scores of"),  # the old one was not measured
        ([{"a": ONE}, {"b": HALF, "a": ONE}], "stage 1 has scores of"),
        ([{"a": ONE, "b": ONE}], "stage 1 has scores of"),
        ([{"a": ONE}, {"a": ONE, "b": ONE}, {"a": ONE, "c": ONE}], "stage 2 has scores of"),
    ],
)
def test_a_table_with_gaps_is_refused(scores: list[dict[str, dict[str, float | None]]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        gains.backward_gains(scores, dict.fromkeys("abc", ONE))


def test_summary() -> None:
    assert gains.summary([1.0, 3.0]) == pytest.approx((2, 2**0.5))
    assert gains.summary([7.0]) == (7, 0)
    assert all(map(math.isnan, gains.summary([100.0, math.nan, 50.0])))
    with pytest.raises(DataError, match="0 values"):
        gains.summary([])


def test_relative_gain() -> None:
    assert gains.relative_gain({"a": 80, "b": 0.3}, {"a": 100, "b": 0.4}) == pytest.approx(77.5)
    assert gains.relative_gain({"a": 80, "b": 0.3}, {"a": 0, "b": 0.4}) == pytest.approx(75)
    assert math.isnan(gains.relative_gain({"a": 1}, {"a": 0}))
    with pytest.raises(DataError, match=r"no score of \['b'\]"):
        gains.relative_gain({"a": 1}, {"a": 1, "b": 1})


MATRIX = [[80, 10, 5], [60, 70, 20], [50, 65, 90]]
LLAVA_C = [
    [66.0, 32.3, 21.0, 17.9, 56.8],
    [66.3, 49.2, 20.6, 18.1, 57.6],
    [66.3, 47.5, 48.4, 18.9, 57.9],
    [66.2, 45.9, 46.5, 43.2, 58.5],
    [65.1, 46.0, 45.9, 44.1, 90.4],
]


def test_standard_metrics() -> None:
    assert gains.accuracy(MATRIX) == pytest.approx(68.3333, abs=1e-4)
    assert gains.backward_transfer(MATRIX) == pytest.approx(-17.5)
    assert gains.forward_transfer(MATRIX, [5, 8, 12]) == pytest.approx(5.0)
    assert gains.forgetting(MATRIX) == pytest.approx(17.5)
    assert gains.incremental_accuracy(MATRIX) == pytest.approx(71.1111, abs=1e-4)
    assert gains.learning_accuracy(MATRIX) == pytest.approx(80)


def test_standard_metrics_on_table_5_of_llava_c() -> None:
    """arXiv:2506.08666, Table 5, with its zero-shot row as the start."""
    assert gains.accuracy(LLAVA_C) == pytest.approx(58.3)
    assert gains.backward_transfer(LLAVA_C) == pytest.approx(-1.425)
    assert gains.forward_transfer(LLAVA_C, [17.5, 17.9, 19.3, 17.0, 52.8]) == pytest.approx(5.825)
    assert gains.forgetting(LLAVA_C) == pytest.approx(1.5)
    assert gains.incremental_accuracy(LLAVA_C) == pytest.approx(57.3133, abs=1e-4)
    assert gains.learning_accuracy(LLAVA_C) == pytest.approx(59.44)


def test_a_matrix_that_is_not_square_is_refused() -> None:
    with pytest.raises(DataError, match="score matrix of 2 stages"):
        gains.backward_transfer([[1, 2], [3]])
    with pytest.raises(DataError, match="at least 2"):
        gains.forgetting([[1]])
    with pytest.raises(DataError, match="1 initial scores; one per task, 3"):
        gains.forward_transfer(MATRIX, [5])


@pytest.mark.parametrize(
    ("scores", "originals", "expected"),
    [
        ([59.73, 45.83, 42.29, 47.87, 68.52, 79.41, 24.28], [78.11, 61.52, 55.89, 51.51, 71.12, 86.17, 31.33], 83.65),
        ([48.12, 30.43], [48.40, 31.18], 98.51),
        ([34.14, 42.88], [22.23, 27.19], 155.64),
    ],
)
def test_retention_of_mmer(scores: list[float], originals: list[float], expected: float) -> None:
    """arXiv:2505.17110, Tables 2 and 8-10."""
    named = [{str(i): x for i, x in enumerate(values)} for values in (scores, originals)]
    assert gains.retention(*named) == pytest.approx(expected, abs=0.006)


positive = st.floats(0.01, 1000)


@given(st.lists(st.tuples(positive, positive), min_size=2, max_size=5), st.floats(0.1, 10))
def test_a_scale_that_scores_and_experts_share_changes_nothing(pairs: list[tuple[float, float]], scale: float) -> None:
    names = [f"m{i}" for i in range(len(pairs))]
    scores = [{name: {"t": pairs[j][0]} for j, name in enumerate(names[: i + 1])} for i in range(len(names))]
    experts = {name: {"t": pairs[j][1]} for j, name in enumerate(names)}
    scaled = [{name: {"t": scale * x["t"]} for name, x in stage.items()} for stage in scores]
    upper = {name: {"t": scale * x["t"]} for name, x in experts.items()}
    assert gains.backward_gains(scaled, upper) == pytest.approx(gains.backward_gains(scores, experts))
    assert gains.forward_gains(scaled, upper) == pytest.approx(gains.forward_gains(scores, experts))


@given(st.lists(positive, min_size=1, max_size=6))
def test_the_experts_themselves_gain_100(values: list[float]) -> None:
    experts = {f"m{i}": {"t": x} for i, x in enumerate(values)}
    scores = [dict(list(experts.items())[: i + 1]) for i in range(len(values))]
    assert gains.backward_gains(scores, experts) == pytest.approx([100] * len(values))
    assert gains.summary(gains.forward_gains(scores, experts))[1] == pytest.approx(0, abs=1e-9)


@given(st.lists(positive, min_size=2, max_size=5), st.floats(0.1, 10))
def test_gains_are_linear_in_the_scores(values: list[float], scale: float) -> None:
    names = [f"m{i}" for i in range(len(values))]
    experts = {name: {"t": 1.0} for name in names}
    scores = [{name: {"t": values[j]} for j, name in enumerate(names[: i + 1])} for i in range(len(names))]
    scaled = [{name: {"t": scale * x["t"]} for name, x in stage.items()} for stage in scores]
    expected = [scale * gain for gain in gains.backward_gains(scores, experts)]
    assert gains.backward_gains(scaled, experts) == pytest.approx(expected)
