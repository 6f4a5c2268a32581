"""The run folder: one experiment, one process at a time, everything written once."""

import subprocess
import sys
from pathlib import Path

import pytest

from graftlm.core.errors import RunError
from graftlm.core.files import read_json, write_json, write_text
from graftlm.experiment import store as store_module
from graftlm.experiment.spec import load
from graftlm.experiment.store import RunStore

NAME = "mera-miniworld"


def test_open_writes_settings_and_environment(tmp_path: Path) -> None:
    store = RunStore.open(tmp_path / "run", load(NAME))
    assert RunStore(tmp_path / "run").spec == load(NAME) == store.spec
    assert read_json(tmp_path / "run" / "environment.json")["torch"]


def test_same_experiment_goes_on_and_speed_may_change(tmp_path: Path) -> None:
    RunStore.open(tmp_path, load(NAME))
    before = (tmp_path / "experiment.yaml").read_bytes()
    RunStore.open(tmp_path, load(NAME, ["jobs=1"]))
    assert (tmp_path / "experiment.yaml").read_bytes() == before


def test_another_experiment_is_refused_and_differences_named(tmp_path: Path) -> None:
    RunStore.open(tmp_path, load(NAME))
    with pytest.raises(RunError) as caught:
        RunStore.open(tmp_path, load(NAME, ["seed=1", "model.lora.rank=8", "methods.more=[merge]"]))
    message = str(caught.value)
    assert "another experiment is in this folder. Choose another --out" in message
    assert "seed: 0 there, 1 here" in message
    assert "model.lora.rank: 32 there, 8 here" in message
    assert 'methods.more: nothing there, ["merge"] here' in message
    with pytest.raises(RunError, match="another experiment"):
        RunStore.finished(tmp_path, load(NAME, ["seed=1"]))


def test_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match=r"not empty \(thesis.tex\) and no run"):
        RunStore.open(tmp_path, load(NAME))
    with pytest.raises(RunError, match="a file, where a folder is expected"):
        RunStore.open(tmp_path / "thesis.tex", load(NAME))
    with pytest.raises(RunError, match="no run is here"):
        RunStore(tmp_path)


def test_changed_environment_is_journaled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = RunStore.open(tmp_path, load(NAME))
    assert first.events() == []
    now = store_module.environment() | {"torch": "9.9"}
    monkeypatch.setattr(store_module, "environment", lambda: now)
    RunStore.open(tmp_path, load(NAME))
    (event,) = RunStore.open(tmp_path, load(NAME)).events()
    assert event["event"] == "environment"
    assert event["changed"]["torch"][1] == "9.9"


def test_journal_lines_are_milestones(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from graftlm.experiment.store import RunStore\n"
        "store = RunStore(Path(sys.argv[1])); store.journal('learned', cell='a'); store.journal('learned', cell='b')"
    )
    store = RunStore.open(tmp_path, load(NAME))
    dead = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env={"GRAFTLM_KILL_AT": "journal.learned"})
    assert dead.returncode == -9
    assert [event["cell"] for event in store.events()] == ["a"]
    assert store.events()[0]["time"].endswith("+00:00")


def test_one_process_at_a_time(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from graftlm.core.errors import RunError\n"
        "from graftlm.experiment.store import RunStore\n"
        "try:\n    RunStore(Path(sys.argv[1])).lock().__enter__()\n"
        "except RunError as error:\n    sys.exit(str(error))"
    )
    store = RunStore.open(tmp_path, load(NAME))
    command = [sys.executable, "-c", code, str(tmp_path)]
    with store.lock():
        busy = subprocess.run(command, capture_output=True, text=True)
    assert "another process is working on this run folder" in busy.stderr
    assert subprocess.run(command).returncode == 0


def test_layout_and_cells(tmp_path: Path) -> None:
    store = RunStore.open(tmp_path, load(NAME))
    for index, stage in [(9, "late"), (0, "image"), (1, "video")]:
        store.stage("mera", index, stage).mkdir(parents=True)
    assert [cell.stage for cell in store.stages("mera")] == ["image", "video", "late"]
    assert store.stage("mera", 0, "image") == tmp_path / "methods" / "mera" / "1-image"
    assert store.expert("image") == tmp_path / "experts" / "image"
    assert store.blind("image") == tmp_path / "blind" / "image"
    assert store.base() == tmp_path / "base"

    cell = next(store.stages("mera"))
    assert not cell.learned and not cell.measured and cell.scores() == {} and cell.fit() == [] and cell.tasks() == []
    write_json(cell.folder / "scores.json", {"coco": {"metric": "cider", "value": 1.0, "n": 2, "stderr": 0.1}})
    write_json(cell.folder / "fit.json", [{"phase": "pretrain"}])
    write_text(cell.folder / "predictions" / "coco.jsonl", '{"output": "a"}\n{"output": "torn')
    write_text(cell.folder / "done", "")
    assert cell.learned and cell.measured
    assert cell.scores()["coco"]["n"] == 2
    assert cell.fit() == [{"phase": "pretrain"}]
    assert cell.tasks() == ["coco"]
    assert cell.predictions("coco") == [{"output": "a"}]
    store.expert("image").mkdir(parents=True)
    (tmp_path / "experts" / ".image.tmp").mkdir()
    assert [cell.stage for cell in store.experts()] == ["image"]


def test_finished_means_summary_and_report(tmp_path: Path) -> None:
    spec = load(NAME)
    assert not RunStore.finished(tmp_path, spec)
    store = RunStore.open(tmp_path, spec)
    with pytest.raises(RunError, match="not finished"):
        store.summary()
    write_json(store.summary_path, {"name": NAME})
    assert not RunStore.finished(tmp_path, spec)
    write_text(store.report, "<html>")
    assert RunStore.finished(tmp_path, spec)
    assert store.summary() == {"name": NAME}
