"""A whole run in a world of seconds: what it leaves behind, what it shares, and how it fails."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from graftlm.core.cache import cache_folder
from graftlm.core.errors import DataError, RunError
from graftlm.core.files import read_json
from graftlm.experiment import cells, workers
from graftlm.experiment.cells import Cell
from graftlm.experiment.progress import Silent
from graftlm.experiment.run import run
from graftlm.experiment.spec import ExperimentSpec, load

QUICK = ["data.size=tiny", "phases={schedule: miniworld, pretrain: {epochs: 1}, finetune: {epochs: 1}}", "jobs=1"]
MIXES = "methods={finetune: [finetune], eproj: [eproj], mera: [{mera: {fraction: 0.5, epochs: 1}}]}"


class Counting(Silent):
    """Adds up what a run tells."""

    def __init__(self) -> None:
        self.total = self.done_units = 0.0

    def start(self, total_units: float) -> None:
        self.total = total_units

    def advance(self, units: float) -> None:
        self.done_units += units


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Counting]:
    out, progress = tmp_path_factory.mktemp("run") / "run", Counting()
    run(load("mera-miniworld", [*QUICK, MIXES]), out, progress=progress)
    return out, progress


def keys(out: Path) -> dict[str, str]:
    return {str(path.parent.relative_to(out)): read_json(path)["key"] for path in out.rglob("key.json")}


def test_the_summary_has_every_method(finished: tuple[Path, Counting]) -> None:
    summary = json.loads((finished[0] / "summary.json").read_text())
    assert summary["order"] == ["image", "video", "audio", "point"]
    assert set(summary["methods"]) == {"finetune", "eproj", "mera"}
    for method in summary["methods"].values():
        assert len(method["backward"]) == len(method["forward"]) == len(method["scores"]) == 4
        assert list(method["scores"][-1]) == summary["order"]
        assert set(method["probes"][-1]) == {"mcub", "instructions"} and set(method["probes"][0]) == {"instructions"}
    assert {cost["phase"] for cost in summary["methods"]["mera"]["cost"]} == {"pretrain", "finetune", "realign"}
    assert set(summary["experts"]) == set(summary["blind"]) == set(summary["order"])
    assert "<script" in (finished[0] / "report.html").read_text()


def test_what_is_learned_alike_is_learned_once(finished: tuple[Path, Counting]) -> None:
    found = keys(finished[0])
    assert found["experts/image"] == found["methods/finetune/1-image"] == found["methods/mera/1-image"]
    assert found["methods/eproj/1-image"] != found["experts/image"]
    assert found["methods/finetune/2-video"] != found["methods/mera/2-video"] != found["experts/video"]


def test_the_bar_ends_where_it_was_planned(finished: tuple[Path, Counting]) -> None:
    assert finished[1].done_units == pytest.approx(finished[1].total)


def test_another_run_finds_what_was_learned(finished: tuple[Path, Counting], tmp_path: Path) -> None:
    before = {path.name for path in (cache_folder() / "stages").iterdir()}
    run(load("mera-miniworld", [*QUICK, "methods={plain: [finetune]}"]), tmp_path / "run")
    assert set(keys(tmp_path / "run").values()) <= before  # other tests may learn meanwhile
    assert keys(tmp_path / "run")["methods/plain/4-point"] == keys(finished[0])["methods/finetune/4-point"]


def test_the_checkpoint_of_a_run_answers(finished: tuple[Path, Counting]) -> None:
    from graftlm.model import checkpoint

    folder = finished[0] / "methods/mera/4-point/checkpoint"
    model = checkpoint.load(folder)
    stream = cells.open_stream(load("mera-miniworld", QUICK))
    texts = model.generate(stream.probes[0].test[:2], max_new_tokens=4)
    assert len(texts) == 2 and all(isinstance(text, str) for text in texts)
    story = [(step["stage"], len(step["methods"])) for step in checkpoint.read_manifest(folder)["history"]]
    assert story == [("image", 0), ("video", 2), ("audio", 2), ("point", 2)]


def test_the_long_stream_comes_back_to_every_modality(tmp_path: Path) -> None:
    spec = load("mera-miniworld-long", [*QUICK, "evaluate.limit=2", "methods=[merge]"])
    summary = run(spec, tmp_path / "run")
    assert summary["order"] == ["image", "video", "audio", "point", "image2", "video2", "audio2", "point2"]
    assert len(summary["methods"]["merge"]["backward"]) == 8


def breaking(error: Exception) -> Callable[..., None]:
    def broken(*_: object) -> None:
        raise error

    return broken


def test_a_file_that_cannot_be_written_is_named(
    finished: tuple[Path, Counting], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = load("mera-miniworld", [*QUICK, "methods=[finetune]"])
    worker = cells.Worker(spec, tmp_path / "run")
    monkeypatch.setattr(worker, "_expert", breaking(OSError(28, "No space left on device")))
    with pytest.raises(RunError, match=r"No space left on device.* run the same command again"):
        worker.do(Cell("expert", "image"), Silent())


def test_an_error_of_a_worker_reaches_the_parent(tmp_path: Path) -> None:
    spec = load("mera-miniworld", [*QUICK, "methods=[finetune]", "seed=3"])
    stream = cells.open_stream(spec)
    victim = stream.stages[1].tasks[0].train[0].media[0].source
    intact = victim.read_bytes()
    victim.write_bytes(b"no video")
    try:
        out = tmp_path / "run"
        out.mkdir()
        with pytest.raises(DataError, match=rf"expert video: .*{victim.name}: corrupt video"):
            workers.work(_opened(spec, out), out, [Cell("expert", "video"), Cell("base", "")], 2, Silent())
    finally:
        victim.write_bytes(intact)


def _opened(spec: ExperimentSpec, out: Path) -> ExperimentSpec:
    from graftlm.experiment.store import RunStore

    RunStore.open(out, spec)
    return spec
