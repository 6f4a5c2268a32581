"""The large effects of the paper, in the mini world: what every run must show, and nothing finer.

One seed of the default world in full conflict, where there is most to forget; validation scenes. Differences of a few
points are noise here and are not asserted; `benchmarks/results/` has several seeds, both orders and more methods.
"""

import statistics
from typing import Any

import pytest

from graftlm.evaluation import gains
from graftlm.experiment.run import run
from graftlm.experiment.spec import load

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    spec = load("mera-miniworld", ["seed=11", "data.conflict=1", "evaluate.split=val", "jobs=1"])
    return run(spec, tmp_path_factory.mktemp("effects") / "run")


def test_experts_see(summary: dict[str, Any]) -> None:
    """Experts are far above the blind floor, on captions and on questions."""
    for stage, expert in summary["experts"].items():
        assert gains.relative_gain(summary["blind"][stage], expert) < 75, stage


def test_fine_tuning_forgets(summary: dict[str, Any]) -> None:
    finetune = summary["methods"]["finetune"]
    assert finetune["backward"][0] == pytest.approx(100)
    assert min(finetune["backward"][1:]) < 80


def test_mera_keeps_more(summary: dict[str, Any]) -> None:
    finetune, mera = summary["methods"]["finetune"], summary["methods"]["mera"]
    assert mera["backward_mean"] > 85
    assert statistics.fmean(mera["backward"][1:]) > statistics.fmean(finetune["backward"][1:]) + 5


def test_mera_still_learns(summary: dict[str, Any]) -> None:
    assert min(summary["methods"]["mera"]["forward"]) > 60


def test_the_base_keeps_its_manners_better_under_mera(summary: dict[str, Any]) -> None:
    """Text-only instructions after the last stage: the LLM that was averaged moved less."""
    after = {name: method["probes"][-1]["instructions"] for name, method in summary["methods"].items()}
    assert after["mera"] > after["finetune"]
