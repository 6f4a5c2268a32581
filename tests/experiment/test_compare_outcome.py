"""Means, differences, ranks and costs of a comparison, from run folders written by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from graftlm.core.errors import DataError
from graftlm.data.types import Stage, Stream, Task
from graftlm.evaluation import gains
from graftlm.evaluation.bootstrap import Pair, paired_over_runs
from graftlm.experiment import outcome
from graftlm.experiment.grid import Grid, Order, make_grid
from graftlm.experiment.spec import load

STAGES = ("a", "b", "c")
R = [[80.0, 10.0, 5.0], [60.0, 70.0, 20.0], [50.0, 65.0, 90.0]]
START = [5.0, 8.0, 12.0]
ORDER = Order("given", "miniworld-sequential", "given")


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def evaluated(folder: Path, scores: dict[str, float]) -> None:
    """Scores of four items each: half are above, half below."""
    write(folder / "scores.json", {task: {"metric": "exact", "value": value, "n": 4} for task, value in scores.items()})
    items = {task: {f"i{k}": value + (k % 2 * 2 - 1) for k in range(4)} for task, value in scores.items()}
    write(folder / "items.json", items)


def log(seconds: float) -> dict[str, float | str]:
    return {"phase": "finetune", "seconds": seconds, "cpu_seconds": seconds / 2, "tokens": 10, "peak_memory_bytes": 100,
            "parameters": 7}  # fmt: skip


def run(folder: Path, shifts: dict[str, float], *, start: bool = True, probe: float = 0.4) -> None:
    """Experts score 100 on one task per stage, so that a score is a percentage."""
    for stage in STAGES:
        evaluated(folder / "experts" / stage, {f"task_{stage}": 100.0})
        evaluated(folder / "blind" / stage, {f"task_{stage}": 3.0})
    tasks = {f"task_{stage}": value for stage, value in zip(STAGES, START, strict=True)} if start else {}
    evaluated(folder / "base", {**tasks, "probe": 0.5})
    for name, shift in shifts.items():
        for t, stage in enumerate(STAGES):
            seen = {f"task_{s}": R[t][j] + shift for j, s in enumerate(STAGES) if start or j <= t}
            evaluated(folder / "methods" / name / f"{t + 1}-{stage}", {**seen, "probe": probe})
            write(
                folder / "methods" / name / f"{t + 1}-{stage}" / "fit.json", [log(2.0 if name == "finetune" else 3.0)]
            )


def stream() -> Stream:
    def task(name: str) -> Task:
        return Task(name, "qa", "exact", ("image",), (), (), ())

    return Stream("by hand", tuple(Stage(s, (task(f"task_{s}"),)) for s in STAGES), (task("probe"),))


def comparison(tmp_path: Path, *seeds: dict[str, float], **how: Any) -> dict[str, Any]:
    for seed, shifts in enumerate(seeds):
        run(tmp_path / f"given-seed{seed}", shifts, **how)
    names = list(dict.fromkeys(name for shifts in seeds for name in shifts))
    grid: Grid = make_grid(load("mera-miniworld"), names, [], range(len(seeds)))
    read = [
        outcome.read_outcome(tmp_path / f"given-seed{seed}", ORDER, seed, stream(), names) for seed in range(len(seeds))
    ]
    return outcome.collect(grid, read, [])


def test_the_columns_are_the_literature(tmp_path: Path) -> None:
    row = comparison(tmp_path, {"finetune": 0.0})["table"]["given"]["finetune"]
    found = {key: row[key]["mean"] for key in outcome.METRICS}
    assert found["acc"] == pytest.approx(68.3333, abs=1e-4)
    assert found["bwt"] == pytest.approx(-17.5)
    assert found["fwt"] == pytest.approx(5.0)
    assert found["fm"] == pytest.approx(17.5)
    assert found["incremental"] == pytest.approx(71.1111, abs=1e-4)
    assert found["backward"] == pytest.approx((80 + 60 + 57.5) / 3)
    assert found["forward"] == pytest.approx((80 + 70 + 90) / 3)
    assert found["ability"] == pytest.approx(80.0)


def test_without_a_start_nothing_is_known_of_later_stages(tmp_path: Path) -> None:
    made = comparison(tmp_path, {"finetune": 0.0}, start=False)
    row = made["table"]["given"]["finetune"]
    assert row["fwt"] is None and made["fm"] == "best since its own learning"
    assert row["acc"]["mean"] == pytest.approx(68.3333, abs=1e-4)
    assert made["runs"][0]["methods"]["finetune"]["matrix"][0] == [80.0, None, None]


def test_spread_is_over_seeds(tmp_path: Path) -> None:
    made = comparison(tmp_path, {"finetune": 0.0}, {"finetune": 6.0})
    row = made["table"]["given"]["finetune"]["acc"]
    assert row["n"] == 2 and row["std"] == pytest.approx(6 / 2**0.5)
    assert row["high"] - row["low"] == pytest.approx(6.0)
    assert made["curves"]["given"]["forward"]["finetune"][2]["mean"] == pytest.approx(93.0)


def test_a_difference_is_paired_and_may_be_none(tmp_path: Path) -> None:
    made = comparison(
        tmp_path, {"finetune": 0.0, "merge": 9.0, "replay": -4.0}, {"finetune": 0.0, "merge": 9.0, "replay": 4.0}
    )
    merge, replay = made["differences"]["given"]["merge"], made["differences"]["given"]["replay"]
    assert merge["value"] == pytest.approx(9.0) and merge["told_apart"]
    table = made["table"]["given"]
    assert merge["value"] == pytest.approx(table["merge"]["acc"]["mean"] - table["finetune"]["acc"]["mean"])
    assert replay["value"] == pytest.approx(0.0) and not replay["told_apart"]
    assert replay["low"] == pytest.approx(-4.0) and replay["high"] == pytest.approx(4.0)  # the seeds disagree
    assert "finetune" not in made["differences"]["given"]


def test_ranks_are_over_runs_that_all_finished(tmp_path: Path) -> None:
    made = comparison(tmp_path, {"finetune": 0.0, "merge": 9.0}, {"finetune": 10.0, "merge": 9.0}, {"finetune": 0.0})
    assert made["ranks"] == {"finetune": {"mean": 1.5, "blocks": 2}, "merge": {"mean": 1.5, "blocks": 2}}
    assert made["table"]["given"]["merge"]["runs"] == 2 and made["table"]["given"]["merge"]["of"] == 3


def test_cost_is_relative_to_fine_tuning(tmp_path: Path) -> None:
    cost = comparison(tmp_path, {"finetune": 0.0, "merge": 9.0})["cost"]
    assert cost["merge"]["seconds"] == 9.0 and cost["merge"]["cpu_seconds"] == 4.5
    assert cost["merge"]["relative"] == pytest.approx(1.5)
    assert cost["merge"]["parameters"] == 7
    assert cost["merge"]["checkpoint_bytes"] is None  # there is none


def test_an_expert_that_knows_nothing_gives_no_number(tmp_path: Path) -> None:
    comparison(tmp_path, {"finetune": 0.0, "merge": 9.0})
    evaluated(tmp_path / "given-seed0" / "experts" / "b", {"task_b": 0.0})
    names = ["finetune", "merge"]
    grid = make_grid(load("mera-miniworld"), names, [], [0])
    made = outcome.collect(grid, [outcome.read_outcome(tmp_path / "given-seed0", ORDER, 0, stream(), names)], [])
    assert made["differences"]["given"] == {} and made["ranks"] == {}
    assert made["table"]["given"]["finetune"]["acc"] is None
    assert made["table"]["given"]["finetune"]["ability"]["mean"] == pytest.approx(80.0)
    json.dumps(made, allow_nan=False)


def test_a_method_that_learns_all_at_once_has_only_an_end(tmp_path: Path) -> None:
    run(tmp_path / "given-seed0", {"finetune": 0.0})
    evaluated(tmp_path / "given-seed0/methods/joint/3-joint", {f"task_{s}": 100.0 for s in STAGES} | {"probe": 0.5})
    grid = make_grid(load("mera-miniworld"), ["finetune", "joint"], [], [0])
    read = outcome.read_outcome(tmp_path / "given-seed0", ORDER, 0, stream(), ["finetune", "joint"])
    made = outcome.collect(grid, [read], [])
    row = made["table"]["given"]["joint"]
    assert row["acc"]["mean"] == pytest.approx(100.0) and row["backward"] is None and row["bwt"] is None
    assert made["differences"]["given"]["joint"]["value"] == pytest.approx(100 - 205 / 3)


def test_raw_scores_have_floors_and_ceilings(tmp_path: Path) -> None:
    raw = comparison(tmp_path, {"finetune": 0.0})["raw"]["given"]
    assert raw["bounds"]["start"]["task_b"]["mean"] == 8.0
    assert raw["bounds"]["blind"]["task_b"]["mean"] == 3.0
    assert raw["bounds"]["expert"]["task_b"]["mean"] == 100.0
    assert raw["methods"]["finetune"]["task_b"]["mean"] == 65.0
    assert raw["methods"]["finetune"]["probe"]["mean"] == 0.4


def test_relative_matrix_never_mixes_scales() -> None:
    experts = {"a": {"cider": 100.0, "accuracy": 0.4}, "b": {"accuracy_b": 0.5}}
    scores = [
        {"a": {"cider": 80.0, "accuracy": 0.3}},
        {"a": {"cider": 50.0, "accuracy": 0.4}, "b": {"accuracy_b": 0.25}},
    ]
    matrix = gains.relative_matrix(scores, experts)
    assert matrix[0][0] == pytest.approx(77.5) and matrix[1] == [pytest.approx(75.0), pytest.approx(50.0)]
    assert matrix[0][1] != matrix[0][1]


def test_ranks_share_places() -> None:
    assert gains.ranks([3.0, 1.0, 3.0, 2.0]) == [1.5, 4.0, 1.5, 3.0]


def test_items_of_one_seed_are_drawn_once_for_all_orders() -> None:
    """Two orders of one seed say the same thing twice; that must not narrow the interval."""
    first = {"t": {f"i{k}": float(k % 5) for k in range(50)}}
    second = {"t": {f"i{k}": float((k * 7) % 5) for k in range(50)}}
    pair = Pair(first, second, {"t": 1.0})
    once, twice = paired_over_runs([[pair]]), paired_over_runs([[pair, pair]])
    assert (twice.low, twice.high) == (pytest.approx(once.low), pytest.approx(once.high))
    apart = paired_over_runs([[pair], [pair]])
    assert apart.high - apart.low < 0.9 * (once.high - once.low)


def test_other_items_are_refused() -> None:
    with pytest.raises(DataError, match="on t: 1 and 1 items"):
        paired_over_runs([[Pair({"t": {"a": 1.0}}, {"t": {"b": 1.0}}, {"t": 1.0})]])
    with pytest.raises(DataError, match="no runs"):
        paired_over_runs([])
