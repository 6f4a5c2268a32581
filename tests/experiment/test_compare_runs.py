"""Comparisons as real processes: one pool for all runs, failures that stop nothing, kills, and growth."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from graftlm.core.errors import ConfigError, RunError
from graftlm.core.files import read_json, read_jsonl
from graftlm.experiment.compare import compare, preview
from graftlm.experiment.grid import Grid, make_grid
from graftlm.experiment.spec import load
from graftlm.experiment.store import RunStore
from graftlm.experiment.tuning import Tuning

QUICK = [
    "data.size=tiny",
    "evaluate.limit=4",
    "phases={schedule: miniworld, pretrain: {epochs: 1}, finetune: {epochs: 1}}",
]
ORDER = "image>audio"


def grid(*methods: str, orders: tuple[str, ...] = (ORDER,), seeds: tuple[int, ...] = (0,)) -> Grid:
    return make_grid(load("mera-miniworld", QUICK), methods, orders, seeds)


def events(out: Path, event: str) -> list[tuple[str, str]]:
    """Run and name of the cells that the journal says this of."""
    return [(line["run"], line["name"]) for line in read_jsonl(out / "journal.jsonl") if line["event"] == event]


def content(out: Path) -> dict[str, bytes]:
    files = [path for name in ("scores.json", "items.json") for path in out.rglob(name)]
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(files)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Two orders, one method that works and one that refuses its second stage."""
    out = tmp_path_factory.mktemp("compare") / "out"
    found = compare(grid("finetune", "damc", orders=(ORDER, "audio>image")), out, jobs=2)
    return out, found


def test_a_failed_cell_stops_nothing(finished: tuple[Path, dict[str, Any]]) -> None:
    out, found = finished
    assert [(each["run"], each["kind"], each["name"]) for each in found["failed"]] == [
        ("image-audio-seed0", "method", "damc"),
        ("audio-image-seed0", "method", "damc"),
    ]
    assert "DAMC learns one modality" in found["failed"][0]["message"]
    assert read_json(out / "comparison.json") == found
    row = found["table"]["all"]
    assert row["finetune"]["runs"] == 2 and row["damc"]["runs"] == 0 and row["damc"]["acc"] is None
    markdown = (out / "comparison.md").read_text()
    assert "2 cells failed" in markdown and "0 of 2 runs, the rest failed" in markdown
    assert "DAMC learns one modality" in (out / "comparison.html").read_text()


def test_runs_are_ordinary_run_folders(finished: tuple[Path, dict[str, Any]]) -> None:
    folder = finished[0] / "runs" / "audio-image-seed0"
    store = RunStore(folder)
    assert store.spec.order == ["audio", "image"] and list(store.spec.mixes()) == ["finetune", "damc"]
    assert [cell.stage for cell in store.stages("finetune")] == ["audio", "image"]
    assert store.report.is_file() and not store.summary_path.exists()  # damc is not finished


def test_orders_share_what_they_learn_alike(finished: tuple[Path, dict[str, Any]]) -> None:
    first, second = (finished[0] / "runs" / f"{order}-seed0" for order in ("image-audio", "audio-image"))
    for stage in ("image", "audio"):
        keys = {read_json(folder / "experts" / stage / "key.json")["key"] for folder in (first, second)}
        assert len(keys) == 1
    assert read_json(first / "methods/finetune/2-audio/key.json") != read_json(
        second / "methods/finetune/1-audio/key.json"
    )


def test_the_same_command_tries_again_and_does_no_more(finished: tuple[Path, dict[str, Any]]) -> None:
    out, before = finished
    times = {path: path.stat().st_mtime_ns for path in out.rglob("scores.json")}
    again = compare(grid("finetune", "damc", orders=(ORDER, "audio>image")), out, jobs=2)
    assert events(out, "failed").count(("image-audio-seed0", "damc")) == 2
    assert {path: path.stat().st_mtime_ns for path in out.rglob("scores.json")} == times
    assert again["table"] == before["table"]


def test_what_is_added_joins_what_is_there(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    before = content(out)
    found = compare(grid("eproj", seeds=(1,)), out, jobs=2)
    assert list(found["methods"]) == ["finetune", "damc", "eproj"] and found["seeds"] == [0, 1]
    assert found["table"]["image-audio"]["eproj"]["runs"] == 1
    assert found["table"]["image-audio"]["finetune"]["runs"] == 1
    assert {each["run"] for each in found["failed"]} == {"image-audio-seed0", "audio-image-seed0"}  # still
    after = content(out)
    assert {name: after[name] for name in before} == before
    done = (out / "journal.jsonl").read_text()
    found = compare(grid("eproj", seeds=(1,)), out, jobs=2)
    assert events(out, "finished") and (out / "journal.jsonl").read_text().count("finished") == done.count("finished")
    assert (out / "runs" / "image-audio-seed1" / "summary.json").is_file()


def test_what_another_version_learned_is_not_used(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """An expert of another key than now is named, and nothing is taken as percent of it."""
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    path = out / "runs" / "image-audio-seed0" / "experts" / "audio" / "key.json"
    path.unlink()  # it is a hard link
    path.write_text('{"key": "of another version"}')
    found = compare(grid("finetune", "damc"), out, jobs=2)
    failed = {each["name"]: each["message"] for each in found["failed"] if each["run"] == "image-audio-seed0"}
    assert set(failed) == {"audio", "damc"} and "by another version of the code" in failed["audio"]
    assert found["table"]["image-audio"]["finetune"]["acc"] is None
    assert found["raw"]["image-audio"]["methods"]["finetune"]


def test_a_method_of_that_name_must_stay_the_same(finished: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(RunError, match="another comparison is in this folder"):
        compare(grid("finetune: [replay]"), finished[0], jobs=1)


def test_an_unknown_stage_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"order\[1\]: no stage 'imge' in miniworld-sequential; did you mean 'image'"):
        compare(grid("finetune", orders=("audio>imge",)), tmp_path / "out", jobs=1)
    assert not (tmp_path / "out").exists()


def test_a_wrong_setting_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"replay.repaet: no such setting; did you mean 'repeat'"):
        compare(grid("finetune", "replay:repaet=2"), tmp_path / "out", jobs=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_workers_that_die_take_one_cell_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever learns a stage dies; the base only answers. Then nobody dies, and all is finished."""
    monkeypatch.setenv("GRAFTLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GRAFTLM_KILL_AT", "stage.learned")
    out = tmp_path / "out"
    found = compare(grid("finetune"), out, jobs=2)
    assert sorted(each["name"] for each in found["failed"]) == ["audio", "finetune", "image"]
    assert all("a worker process died (exit code -9)" in each["message"] for each in found["failed"])
    assert (out / "runs/image-audio-seed0/base/scores.json").is_file()
    monkeypatch.delenv("GRAFTLM_KILL_AT")
    again = compare(grid("finetune"), out, jobs=2)
    assert again["failed"] == [] and again["table"]["image-audio"]["finetune"]["runs"] == 1


@pytest.mark.slow
def test_a_killed_comparison_goes_on(tmp_path: Path) -> None:
    """Killed once at a named point and once at some time, it ends as an undisturbed one does."""
    cache = tmp_path / "cache"
    arguments = [*QUICK, "--methods", "finetune", "--orders", ORDER, "--seeds", "0", "1", "--jobs", "2"]

    def start(out: Path, **more: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "graftlm", "compare", "mera-miniworld", *arguments, "--out", str(out)]
        environment = os.environ | {"GRAFTLM_CACHE": str(cache)} | more
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    out = tmp_path / "out"
    process = start(out, GRAFTLM_KILL_AT="compare.finished:3")
    assert process.wait(300) == -signal.SIGKILL
    assert len(events(out, "finished")) == 3 and not (out / "comparison.json").exists()
    process = start(out)
    deadline = time.monotonic() + 200
    while len(events(out, "finished")) < 7 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert start(out).wait(300) == 0
    assert not read_json(out / "comparison.json")["failed"]
    assert start(tmp_path / "undisturbed").wait(300) == 0
    assert content(out) == content(tmp_path / "undisturbed")
    assert len(content(out)) > 20


@pytest.mark.slow
def test_settings_are_chosen_on_validation_data(tmp_path: Path) -> None:
    out = tmp_path / "out"
    tuning = Tuning(budget=2, seed=7, grid={"replay.repeat": [1, 3]})
    found = compare(grid("finetune", "replay"), out, jobs=2, tuning=tuning)
    told = read_json(out / "tuning" / "tuning.json")
    trials = told["methods"]["replay"]["trials"]
    assert [trial["settings"] for trial in trials] == [{"replay.repeat": 1}, {"replay.repeat": 3}]
    assert len(told["methods"]["finetune"]["trials"]) == 1
    assert (told["budget"], told["seed"], told["split"], told["order"]) == (2, 7, "val", "image-audio")
    chosen = trials[told["methods"]["replay"]["chosen"]]
    assert chosen["score"] == max(trial["score"] for trial in trials)
    assert chosen["score"] == pytest.approx((chosen["backward"] + chosen["forward"]) / 2)
    assert found["methods"]["replay"] == chosen["entries"] and found["tuning"] == told
    trial_run = RunStore(out / "tuning" / "image-audio-seed7").spec
    assert trial_run.evaluate.split == "val" and trial_run.seed == 7
    assert RunStore(out / "runs" / "image-audio-seed0").spec.evaluate.split == "test"
    assert "Chosen settings" in (out / "comparison.html").read_text()


def test_a_preview_counts_and_does_nothing(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    fresh = preview(grid("finetune", "eproj"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    by_name = {(cell.kind, cell.name): cell for cell in fresh}
    assert set(by_name) == {
        ("expert", "image"),
        ("expert", "audio"),
        ("method", "finetune"),
        ("method", "eproj"),
        ("base", ""),
    }
    assert not any(cell.finished for cell in fresh)
    assert (by_name["method", "finetune"].cached, by_name["method", "finetune"].stages) == (2, 2)  # another folder's
    assert by_name["method", "finetune"].units > by_name["expert", "image"].units
    there = {cell.name: cell.finished for cell in preview(grid("finetune", "damc"), finished[0])}
    assert there["finetune"] and not there["damc"]
