"""Kill real runs, start them again, and compare with one that nobody disturbed: scores and predictions byte by byte."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SETTINGS = [
    "data.size=tiny",
    "methods={mera: [{mera: {fraction: 0.5, epochs: 1}}]}",
    "phases={schedule: miniworld, pretrain: {epochs: 1}, finetune: {epochs: 1}}",
    "evaluate.batch_size=3",
]


def command(out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "graftlm", "run", "mera-miniworld", *SETTINGS, *more, "--out", str(out)]


def environment(cache: Path, **more: str) -> dict[str, str]:
    return os.environ | {"GRAFTLM_CACHE": str(cache), "OMP_NUM_THREADS": "1"} | more


def finish(out: Path, cache: Path, *more: str) -> None:
    done = subprocess.run(command(out, *more), env=environment(cache), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def content(out: Path) -> dict[str, bytes]:
    """Scores and predictions of a finished run, by relative path."""
    files = [*out.rglob("scores.json"), *out.rglob("items.json"), *out.rglob("predictions/*.jsonl")]
    assert len(files) > 30
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One world for all runs: media are named by their path in predictions."""
    return tmp_path_factory.mktemp("worlds")


def fresh_cache(tmp_path: Path, worlds: Path) -> Path:
    """A cache of its own, but for the world."""
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "worlds").symlink_to(worlds)
    return cache


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, worlds: Path) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(folder / "run", fresh_cache(folder, worlds), "jobs=1")
    return content(folder / "run")


@pytest.mark.parametrize(
    "point",
    [
        "stage.learned",
        "folder.written:3",
        "folder.renamed:6",
        "stage.saved:5",
        "batch.predicted:40",
        "journal.measured:7",
    ],
)
def test_killed_at_a_named_point(point: str, tmp_path: Path, worlds: Path, undisturbed: dict[str, bytes]) -> None:
    out, cache = tmp_path / "run", fresh_cache(tmp_path, worlds)
    killed = subprocess.run(
        command(out, "jobs=1"), env=environment(cache, GRAFTLM_KILL_AT=point), capture_output=True, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (out / "summary.json").exists()
    finish(out, cache, "jobs=1")
    assert content(out) == undisturbed


def test_killed_at_random_times(tmp_path: Path, worlds: Path, undisturbed: dict[str, bytes]) -> None:
    """Side by side this time: the workers must die with their parent, and two processes give what one gave."""
    out, cache = tmp_path / "run", fresh_cache(tmp_path, worlds)
    clock = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(
            command(out, "jobs=2"), env=environment(cache), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(clock.uniform(5, 14))
        process.kill()
        process.wait()
    finish(out, cache, "jobs=2")
    assert content(out) == undisturbed


def limit_files(size: int) -> Callable[[], None]:
    """No file of the process may grow beyond ``size`` bytes: writing fails as on a full disk."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return limit


@pytest.mark.parametrize("size", [100_000, 1_000_000])
def test_a_full_disk_is_named_and_nothing_is_lost(
    size: int, tmp_path: Path, worlds: Path, undisturbed: dict[str, bytes]
) -> None:
    out, cache = tmp_path / "run", fresh_cache(tmp_path, worlds)
    full = subprocess.run(
        command(out, "jobs=1"),
        env=environment(cache),
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=limit_files(size),
    )
    assert full.returncode == 2
    assert "space" in full.stderr.partition("error:")[2]
    finish(out, cache, "jobs=1")
    assert content(out) == undisturbed


def test_a_second_process_is_refused(tmp_path: Path, worlds: Path) -> None:
    out, cache = tmp_path / "run", fresh_cache(tmp_path, worlds)
    first = subprocess.Popen(command(out, "jobs=1"), env=environment(cache), stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (out / "experts").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        second = subprocess.run(
            command(out, "jobs=1"), env=environment(cache), capture_output=True, text=True, timeout=120
        )
        assert second.returncode == 2
        assert "another process is working on this run folder" in " ".join(second.stderr.split())
    finally:
        first.kill()
        first.wait()


def test_a_flipped_byte_is_named_and_the_rest_kept(tmp_path: Path, worlds: Path) -> None:
    """The checkpoint of stage 2 is damaged after a crash in stage 3: the run stops and says which file."""
    out, cache = tmp_path / "run", fresh_cache(tmp_path, worlds)
    killed = subprocess.run(
        command(out, "jobs=1"),
        env=environment(cache, GRAFTLM_KILL_AT="stage.start:6"),
        capture_output=True,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL
    victim = out / "methods/mera/2-video/checkpoint/connectors.video.safetensors"
    intact = victim.read_bytes()
    victim.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    again = subprocess.run(command(out, "jobs=1"), env=environment(cache), capture_output=True, text=True, timeout=300)
    assert again.returncode == 2
    message = "".join(again.stderr.split())
    assert "connectors.video.safetensors:damaged" in message
    victim.write_bytes(intact)
    finish(out, cache, "jobs=1")
