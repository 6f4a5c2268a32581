"""The packaged streams of the other papers, walked whole on worlds that are too small to learn."""

from pathlib import Path
from typing import Any

import pytest

from graftlm.core.errors import ConfigError
from graftlm.core.files import read_json
from graftlm.experiment.plan import plan
from graftlm.experiment.run import run
from graftlm.experiment.spec import load

QUICK = ("data.size=tiny", "evaluate.limit=2", "jobs=1")


def walk(name: str, out: Path, *settings: str) -> dict[str, Any]:
    spec = load(name, [*QUICK, *settings])
    short = [phase.name for phase in spec.schedule().phases]
    tree = spec.to_dict()
    for phase in tree["phases"]:
        assert phase["name"] in short
        phase["epochs"] = 1
    return run(type(spec).from_dict(tree), out)


def test_micl_has_no_probes_and_still_ends(tmp_path: Path) -> None:
    summary = walk("micl-order1", tmp_path / "run", "order=[audio-caption, audio-qa]", "methods={moincl: [moincl]}")
    assert summary["order"] == ["audio-caption", "audio-qa"] and summary["base"] == {}
    assert read_json(tmp_path / "run/methods/moincl/2-audio-qa/notes.json")["ptgm"] == {"clotho_aqa": 16}


def test_a_start_is_measured_before_and_after(tmp_path: Path) -> None:
    methods = "methods={prompts: [l2p], llava-c: [llava-c], joint: [joint]}"
    summary = walk("llavac-finetune", tmp_path / "run", "order=[iconqa, super_clevr]", methods)
    assert {"iconqa", "super_clevr", "instructions", "pope_random"} <= summary["base"].keys()
    assert summary["methods"]["joint"]["joint"]["scores"].keys() == {"iconqa", "super_clevr"}
    folders = [
        tmp_path / "run/methods" / name for name in ("prompts/1-iconqa", "prompts/2-super_clevr", "llava-c/1-iconqa")
    ]
    shifts = [read_json(folder / "shift.json") for folder in folders]
    assert all(shift["l2"] > 0 and shift["inquiries"] for shift in shifts)
    spectra = read_json(tmp_path / "run/methods/llava-c/1-iconqa/notes.json")["spectra"]
    assert all(each["after"][0] <= each["before"][0] for each in spectra)


@pytest.mark.parametrize("name", ["llavac-finetune", "llavac-pretrain", "micl-order2"])
def test_they_can_be_planned(name: str) -> None:
    planned = plan(load(name, QUICK))
    assert planned.steps > 0
    assert ("start" in {stage.cell for stage in planned.stages}) == name.startswith("llavac")


def test_an_order_with_an_unknown_stage() -> None:
    with pytest.raises(ConfigError, match=r"order\[1\]: no stage 'audio-q' in micl-order1; did you mean 'audio-qa'\?"):
        plan(load("micl-order1", [*QUICK, "order=[audio-caption, audio-q]"]))
