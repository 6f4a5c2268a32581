"""Experts that are composed, in a world of seconds: what is measured, what is chosen, and how a killed run goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from graftlm.core.errors import ConfigError
from graftlm.core.files import read_json
from graftlm.data.miniworld.combinations import COMBINATIONS
from graftlm.experiment import composing
from graftlm.experiment.cells import open_stream
from graftlm.experiment.originals import expand_originals
from graftlm.experiment.plan import plan
from graftlm.experiment.spec import ExperimentSpec, load
from graftlm.model import checkpoint
from graftlm.model.routing import RoutedLinear

NAME = "mmer-miniworld"
ORDER = ["image", "video", "audio", "point"]
QUICK = [
    "data.size=tiny",
    "phases={schedule: miniworld, pretrain: {epochs: 1}, finetune: {epochs: 1, lr: {connectors: 1e-3, llm: 1e-3}}}",
    "composers={ties: {rule: ties, tune: {scale: [0.5, 1.0]}}, "
    "mmer: {rule: mmer, density: 0.8, tune: {significance: [0.6, 1.2]}}, "
    "damc: {rule: damc, experts: {methods: [{damc: {rank: 4}}], phase: {epochs: 1, lr: {connectors: 1e-3, llm: 5e-3}}}}, "
    "originals: {rule: originals}}",
    "study.tuning.limit=2",
    "study.sweep={density: [0.8], significance: [0.6, 1.2]}",
    "study.counts={composers: [mmer], sets: [[audio, point]], limit: 2}",
    "study.forgetting={scenarios: {twice: [okvqa_2, coco_2]}, share: [0.1, 0.4], calibration: 4}",
    "evaluate.limit=3",
    "jobs=1",
]
"""Seconds instead of minutes; every kind of cell is there."""


def run(out: Path, **environment: str) -> int:
    command = [sys.executable, "-m", "graftlm", "run", NAME, *QUICK, "--out", str(out)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed while it composed, and went on."""
    out = tmp_path_factory.mktemp("composing") / "run"
    assert run(out, GRAFTLM_KILL_AT="candidate.tried:2") == -signal.SIGKILL
    assert not (out / "summary.json").exists()
    assert run(out) == 0
    return out


@pytest.fixture(scope="module")
def composed(finished: Path) -> dict[str, dict]:
    return json.loads((finished / "summary.json").read_text())["composing"]


def test_every_composer_is_measured(composed: dict[str, dict]) -> None:
    assert list(composed["composers"]) == ["ties", "mmer", "damc", "originals"]
    for row in composed["composers"].values():
        assert list(row["retention"]) == list(row["expanded_retention"]) == ORDER
        assert list(row["expansion"]) == list(COMBINATIONS)
        assert set(row["probes"]) == {"instructions"} and row["bytes"] > 0
    assert set(composed["composers"]["mmer"]["mask_share"]) == set(ORDER)
    assert all(0 < share < 1 for share in composed["composers"]["mmer"]["mask_share"].values())
    assert composed["composers"]["ties"]["retention"] == composed["composers"]["ties"]["expanded_retention"]
    assert set(composed["composers"]["mmer"]["blind"]) == set(COMBINATIONS)


def test_settings_are_chosen_on_validation_data(finished: Path, composed: dict[str, dict]) -> None:
    tuned = read_json(finished / "composers/ties/tuning.json")
    means = [sum(row["retention"].values()) / 4 for row in tuned["tried"]]
    assert [row["settings"] for row in tuned["tried"]] == [{"scale": 0.5}, {"scale": 1.0}]
    assert composed["composers"]["ties"]["settings"] == tuned["tried"][means.index(max(means))]["settings"]
    tuned, row = read_json(finished / "composers/mmer/tuning.json"), composed["composers"]["mmer"]
    for name in ORDER:
        kept = [each["retention"][name] for each in tuned["tried"]]
        best = tuned["tried"][kept.index(max(kept))]["settings"]["significance"]
        assert row["per_model"][name] == {"significance": best}


def test_every_study_is_there(composed: dict[str, dict]) -> None:
    assert set(composed["ablation"]) == set(composing.ABLATIONS)
    assert composed["ablation"]["no-calibration"]["settings"]["significance"] == 1.0
    assert [row["significance"] for row in composed["sweep"]] == [0.6, 1.2]
    assert set(composed["counts"]["audio+point"]["mmer"]["retention"]) == {"audio", "point"}
    twice = composed["forgetting"]["twice"]
    assert set(twice["composed"]["new"]) == set(twice["untouched"]) == {"okvqa_2", "coco_2"}
    assert set(twice["tailor"]) == set(twice["finetune"]) == {"image"}
    assert set(twice["composed"]["previous"]) == {"image"}
    others = [kept for name, kept in twice["composed"]["retention"].items() if name != "image"]
    assert twice["composed"]["others_mean"] == pytest.approx(sum(others) / 3)
    assert set(composed["storage"]["bits"]) == {"originals", "plain", "mmer", "damc"}


def test_experts_of_a_composers_own(finished: Path, composed: dict[str, dict]) -> None:
    row = composed["composers"]["damc"]
    own = read_json(finished / "own/damc/audio/result.json")["scores"]
    assert row["own"]["scores"]["audio"] == row["scores"]["audio"] == own  # each answers as it did alone
    assert row["own"]["retention"]["audio"] == 100 and row["own"]["of_experts"] == row["retention"]
    manifest = read_json(finished / "composers/damc/composed/manifest.json")
    assert [route["name"] for route in manifest["routing"]["routes"]] == ORDER
    for stage, kind in (("experts/audio", None), ("own/damc/audio/stage", "damc")):
        routing = read_json(finished / stage / "checkpoint/manifest.json").get("routing")
        assert (routing and routing["kind"]) == kind


def test_originals_keep_their_exact_weights(finished: Path, composed: dict[str, dict], tmp_path: Path) -> None:
    assert composed["composers"]["originals"]["retention"] == dict.fromkeys(ORDER, 100.0)
    experts = {name: finished / "experts" / name / "checkpoint" for name in ORDER}
    model = expand_originals(experts, tmp_path / "parts", checkpoint.load)
    name = "model.layers.0.self_attn.q_proj"
    tuned = {each: checkpoint.load(folder).llm.get_parameter(f"{name}.weight") for each, folder in experts.items()}
    layer = model.llm.get_submodule(name)
    assert isinstance(layer, RoutedLinear)
    mean = torch.stack(list(tuned.values())).mean(0)
    torch.testing.assert_close(layer.weight, mean, rtol=0, atol=1e-6)
    for number, each in enumerate(ORDER):
        torch.testing.assert_close(layer.get_buffer(f"weight_{number}"), tuned[each], rtol=0, atol=1e-6)


def test_the_composed_checkpoint_recovers_its_originals(finished: Path) -> None:
    model = checkpoint.load(finished / "forgetting/twice/composed", mode="retain:coco_2")
    samples = open_stream(load(NAME, QUICK)).later[0].tasks[0].test[:2]
    assert len(model.generate(samples, max_new_tokens=3)) == 2


def test_a_new_task_moves_the_llm_alone(finished: Path) -> None:
    old, new = (
        read_json(finished / place / "checkpoint/manifest.json") for place in ("experts/image", "later/coco_2/stage")
    )
    connector = "connectors.image.safetensors"
    assert old["files"][connector] == new["files"][connector]
    assert old["ledger"] != new["ledger"]


def test_two_workers_find_the_same(finished: Path, tmp_path: Path) -> None:
    from graftlm.experiment.run import run as walk

    fewer = ["composers={mmer: {rule: mmer, density: 0.8, tune: {significance: [0.6, 1.2]}}}", "study.counts=null"]
    walk(load(NAME, [*QUICK[:-1], *fewer, "study.forgetting=null", "jobs=2"]), tmp_path / "run")
    for place in ("composers/mmer/expand", "ablation/no-congruence/retain-audio"):
        assert read_json(tmp_path / "run" / place / "scores.json") == read_json(finished / place / "scores.json")


def test_the_plan_counts_experts_and_new_tasks() -> None:
    made = plan(load(NAME, QUICK))
    assert [(stage.cell, stage.stage) for stage in made.stages] == [
        *(("expert", name) for name in ORDER),
        *(("later", name) for name in ("okvqa_2", "coco_2", "coco_2")),
        *(("expert of damc", name) for name in ORDER),
    ]
    assert any("an adapter of their own" in note for note in made.stages[-1].notes)
    assert any("mmer (mmer): 2 settings tried" in sentence for sentence in made.compositions)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("composers.mmer.rulee=x", "composers.mmer: settings.rulee: no such setting of mmer"),
        ("composers={a/b: average}", "'a/b' cannot be the name of a folder"),
        ("composers={}", "composers: {} does not fit;"),
        ("methods={finetune: [finetune]}", "composers: an experiment has methods or composers, and this one has both"),
        ("study.forgeting={}", "study.forgeting: no such setting; did you mean 'forgetting'?"),
        ("study.sweep.density=[2]", "study.sweep.density[0]: 2 does not fit;"),
        ("composers.mmer=mmmer", "composers.mmer: no rule 'mmmer'; did you mean 'mmer'?"),
        (
            "composers.mmer.densty=0.5",
            "composers.mmer: settings.densty: no such setting of mmer; did you mean 'density'?",
        ),
        ("composers.damc.experts=null", "composers.damc.experts: missing; rule damc composes experts"),
        ("composers.damc.experts=[dmac]", "composers.damc.experts.methods[0]: no method 'dmac'; did you mean 'damc'?"),
        ("composers.originals.scale=1", "composers.originals: rule originals routes the experts as they are"),
        ("study.ablation=mmr", "study.ablation: no composer 'mmr'; did you mean 'mmer'?"),
        (
            "study.ablation=average",
            "study.ablation: composer 'average' has rule average; one with rule mmer is expected.",
        ),
    ],
)
def test_wrong_settings_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(NAME, [override]).check()
    assert message in str(caught.value)


def test_yaml_round_trip() -> None:
    spec = load(NAME, QUICK)
    assert ExperimentSpec.from_yaml(spec.to_yaml()) == spec
    assert "composers" not in load("mera-miniworld").to_dict() and "methods" not in spec.to_dict()
