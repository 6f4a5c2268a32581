"""``graftlm compare`` on the command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from graftlm.cli.compare import ManyValues
from graftlm.cli.main import app

QUICK = [
    "data.size=tiny",
    "evaluate.limit=4",
    "phases={schedule: miniworld, pretrain: {epochs: 1}, finetune: {epochs: 1}}",
]


def graftlm(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "graftlm", "compare", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("typed", "understood"),
    [
        (["X", "--seeds", "0", "1", "2"], ["X", "--seeds", "0", "--seeds", "1", "--seeds", "2"]),
        (["X", "--seeds=0", "1", "--plan"], ["X", "--seeds=0", "--seeds", "1", "--plan"]),
        (
            ["X", "--methods", "a", "ewc:strength=1e3+b", "data.size=tiny", "seed=1"],
            ["X", "--methods", "a", "--methods", "ewc:strength=1e3+b", "data.size=tiny", "seed=1"],
        ),
        (
            ["X", "--orders", "given", "a>b", "--jobs", "2", "seed=1"],
            ["X", "--orders", "given", "--orders", "a>b", "--jobs", "2", "seed=1"],
        ),
        (["X", "--grid", "ewc.strength=1,2", "seed=1"], ["X", "--grid", "ewc.strength=1,2", "seed=1"]),
    ],
)
def test_an_option_takes_several_values(
    typed: list[str], understood: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(ManyValues.__mro__[1], "parse_args", lambda self, ctx, args: seen.append(args))
    ManyValues("compare").parse_args(None, typed)
    assert seen == [understood]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "finetune", "mear"], "no method and no ingredient 'mear'; did you mean 'mera'?"),
        (
            ["--methods", "mera", "--orders", "audio>imge"],
            "no stage 'imge' in miniworld-sequential; did you mean 'image'?",
        ),
        (
            ["--orders", "revers"],
            "'revers' is no order, no stream, and no stages with > between them; did you mean 'reverse'?",
        ),
        (["--tune", "--grid", "ewc.strenth=1"], "ewc has no setting 'strenth'; did you mean 'strength'?"),
        (["--against", "eproj"], "no method 'eproj' in this comparison"),
    ],
)
def test_mistakes_are_named_before_any_work(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = graftlm("mera-miniworld", *arguments, "data.size=tiny", cwd=tmp_path)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "runs").exists()


def test_help_has_an_example() -> None:
    done = CliRunner().invoke(app, ["compare", "--help"])
    assert done.exit_code == 0
    assert "graftlm compare mera-miniworld" in " ".join(done.output.split())


def test_a_failure_is_the_exit_code_and_the_last_word(tmp_path: Path) -> None:
    arguments = ["mera-miniworld", "--methods", "finetune", "damc", "--orders", "image>audio", "--seeds", "0", *QUICK]
    planned = graftlm(*arguments, "--plan", "--out", "out", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "5 cells, 5 to do" in planned.stdout and not (tmp_path / "out").exists()
    done = graftlm(*arguments, "--jobs", "2", "--out", "out", cwd=tmp_path)
    assert done.returncode == 1
    said = " ".join(done.stderr.split())
    assert (
        "1 cell failed:" in said and "image-audio-seed0, method damc: stage audio: learns audio after 1 stages" in said
    )
    assert said.endswith("what was finished is kept.")
    assert "finetune" in done.stdout and "1/1" in done.stdout and "0/1" in done.stdout
    assert (tmp_path / "out" / "comparison.html").is_file()
    planned = graftlm(*arguments, "--plan", "--out", "out", cwd=tmp_path)
    assert "5 cells, 1 to do" in planned.stdout
