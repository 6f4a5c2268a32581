"""The command line, as real processes."""

import io
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from graftlm.cli.progress import Lines
from graftlm.cli.run import default_out
from graftlm.core.files import write_json, write_text
from graftlm.experiment.spec import library, load
from graftlm.experiment.store import RunStore
from graftlm.experiment.tables import TABLES, registry

COMMANDS = (
    *("run", "compare", "plan", "eval", "compose", "restore", "consolidate", "tailor", "doctor", "convert"),
    *("report", "list", "build-base", "version"),
)

SUMMARY = {
    "name": "mera-miniworld",
    "order": ["image", "video"],
    "methods": {
        "finetune": {
            "backward": [100.0, 55.55],
            "forward": [97.0],
            "backward_mean": 77.8,
            "backward_std": 31.4,
        },
        "mera": {"backward": [100.0, 99.0], "forward": [], "backward_mean": 99.5, "backward_std": None},
    },
}

WITHOUT_TORCH = (
    "import sys\n"
    "class Refuse:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        assert name.split('.')[0] not in ('torch', 'transformers', 'peft'), f'{name} was imported'\n"
    "sys.meta_path.insert(0, Refuse())\n"
    "from graftlm.cli.main import main\n"
    "sys.argv[0] = 'graftlm'\n"
    "sys.exit(main())"
)


def graftlm(
    *arguments: str, cwd: Path | None = None, code: str | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    start = ["-c", code] if code else ["-m", "graftlm"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | env
    return subprocess.run(
        [sys.executable, *start, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def finished_run(folder: Path, *overrides: str) -> Path:
    store = RunStore.open(folder, load("mera-miniworld", overrides))
    write_json(store.summary_path, SUMMARY)
    write_text(store.report, "<html>")
    return folder


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_is_quick_and_names_every_command() -> None:
    times = []
    for _ in range(3):
        begin = cpu_of_children()
        done = graftlm("--help", code=WITHOUT_TORCH)
        times.append(cpu_of_children() - begin)
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)
    assert min(times) < 0.8  # CPU seconds; it takes 0.3


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    done = graftlm(command, "--help", code=WITHOUT_TORCH)
    assert done.returncode == 0
    assert "Example" in done.stdout
    assert f"graftlm {command}" in done.stdout.split("Example")[1]


def test_list_names_everything_without_torch() -> None:
    done = graftlm("list", code=WITHOUT_TORCH)
    assert done.returncode == 0, done.stderr
    for section in TABLES:
        assert section in done.stdout
        for name, place in registry(section).table().items():
            assert any(line.split() == [name, place] for line in done.stdout.splitlines()), name
    assert all(name in done.stdout for name in library())


def test_list_of_one_section() -> None:
    done = graftlm("list", "methods", code=WITHOUT_TORCH)
    assert "graftlm.methods.mera:mera" in done.stdout
    assert "streams" not in done.stdout


@pytest.mark.parametrize("section", sorted(TABLES))
def test_every_listed_place_exists(section: str) -> None:
    table = registry(section)
    for name in table.table():
        assert table.get(name) is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("list", "method"), "no section 'method'; did you mean 'methods'?"),
        (("run", "mera-minworld"), "no file and no experiment 'mera-minworld'; did you mean 'mera-miniworld'?"),
        (("run", "mera-miniworld", "sed=1"), "sed: no such setting; did you mean 'seed'?"),
        (("plan", "mera-miniworld", "methods=[meera]"), "methods[0]: no method 'meera'; did you mean 'mera'?"),
        (("report", "nowhere"), "nowhere: no run is here (experiment.yaml is missing)."),
        (("eval", "nowhere"), "nowhere: no checkpoint here (manifest.json is missing)."),
    ],
)
def test_user_errors_are_one_message_and_exit_code_2(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = graftlm(*arguments, cwd=tmp_path, code=WITHOUT_TORCH)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_settings_are_checked_before_any_work(tmp_path: Path) -> None:
    done = graftlm("run", "mera-miniworld", "methods=[{mera: {fractoin: 1}}]", cwd=tmp_path)
    assert done.returncode == 2
    assert "methods[0].mera.fractoin: no such setting; did you mean 'fraction'?" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_broken_yaml_names_line_and_column(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("name: e\nmodel: [1\n")
    done = graftlm("run", "e.yaml", cwd=tmp_path, code=WITHOUT_TORCH)
    assert done.returncode == 2
    assert "e.yaml, line 3, column 1: not YAML" in done.stderr


def test_wrong_usage_is_exit_code_2() -> None:
    assert graftlm("run").returncode == 2
    assert graftlm("nosuch").returncode == 2
    assert graftlm("eval", "x", "--split", "train").returncode == 2


def test_file_system_errors_are_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = graftlm("run", "mera-miniworld", "--out", str(tmp_path / "file" / "below"))
    assert done.returncode == 1
    assert "file" in done.stderr and "Check that it exists" in done.stderr
    assert "Traceback" not in done.stderr


def test_unexpected_errors_say_how_to_see_more(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    write_json(run / "summary.json", {"name": "x"})
    done = graftlm("run", "mera-miniworld", "--out", str(run))
    assert done.returncode == 1
    assert "unexpected KeyError" in done.stderr and "GRAFTLM_DEBUG=1" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in graftlm("run", "mera-miniworld", "--out", str(run), GRAFTLM_DEBUG="1").stderr


def test_finished_run_says_so_at_once_without_torch(tmp_path: Path) -> None:
    finished_run(tmp_path / "runs" / "mera-miniworld")
    done = graftlm("run", "mera-miniworld", cwd=tmp_path, code=WITHOUT_TORCH)
    assert done.returncode == 0, done.stderr
    assert "this experiment is finished" in done.stderr
    assert "report: runs/mera-miniworld/report.html" in done.stdout
    row = next(line for line in done.stdout.splitlines() if "finetune" in line)
    assert all(text in row for text in ("100.0", "55.5", "77.8 ± 31.4", "97.0"))
    row = next(line for line in done.stdout.splitlines() if "mera " in line)
    assert "99.5 ± -" in row


def test_run_folder_of_another_experiment_is_refused(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    done = graftlm("run", "mera-miniworld", "seed=1", "--out", str(run), code=WITHOUT_TORCH)
    assert done.returncode == 2
    assert "seed: 0 there, 1 here" in done.stderr and "another --out" in done.stderr


def test_changed_settings_have_their_own_default_folder() -> None:
    plain = load("mera-miniworld")
    assert default_out(plain, plain) == Path("runs/mera-miniworld")
    assert default_out(load("mera-miniworld", ["jobs=1"]), plain) == Path("runs/mera-miniworld")
    changed = {default_out(load("mera-miniworld", [f"seed={seed}"]), plain) for seed in (1, 2)}
    assert len(changed) == 2
    assert all(
        path.name.startswith("mera-miniworld-") and len(path.name) == len("mera-miniworld-") + 8 for path in changed
    )


def test_plan_counts_the_packaged_experiment(tmp_path: Path) -> None:
    done = graftlm("plan", "mera-miniworld", "data.size=smoke", GRAFTLM_CACHE=str(tmp_path), COLUMNS="160")
    assert done.returncode == 0, done.stderr
    assert "the same as expert image" in done.stdout
    assert "realign" in done.stdout and "memory: about" in done.stdout


def test_run_eval_and_report_of_a_smoke_world(tmp_path: Path) -> None:
    env = {"GRAFTLM_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    quick = [f"phases.{phase}.epochs=1" for phase in ("pretrain", "finetune", "realign")]
    command = ("run", "mera-miniworld", "data.size=smoke", "methods=[mera]", "evaluate.limit=8", *quick, "--out", "run")

    done = graftlm(*command, cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert "report: run/report.html" in done.stdout and "mera" in done.stdout
    assert "100%" in done.stderr and "Loading weights" not in done.stderr
    again = graftlm(*command, cwd=tmp_path, code=WITHOUT_TORCH, **env)
    assert again.returncode == 0 and again.stdout == done.stdout

    ask = ("eval", "run/methods/mera/4-point", "--tasks", "coco,okvqa", "--limit", "2", "--out", "asked")
    done = graftlm(*ask, cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines() if "│" in line] == ["coco", "okvqa"]
    assert graftlm(*ask, cwd=tmp_path, **env).stdout == done.stdout
    other = graftlm(*ask, "--split", "val", cwd=tmp_path, **env)
    assert other.returncode == 2 and "asked: another evaluation is in this folder (split differ)" in other.stderr
    wrong = graftlm("eval", "run/methods/mera/1-image", "--tasks", "audiocap", cwd=tmp_path, **env)
    assert wrong.returncode == 2 and "no data set 'audiocap' that this model can answer" in wrong.stderr

    assert graftlm("report", "run", "--out", "page.html", cwd=tmp_path, **env).returncode == 0
    assert graftlm("report", "run", "run", cwd=tmp_path, **env).returncode == 0
    assert (tmp_path / "page.html").is_file() and (tmp_path / "comparison.html").is_file()


def test_version_names_what_results_depend_on() -> None:
    done = graftlm("version", code=WITHOUT_TORCH)
    assert all(word in done.stdout for word in ("graftlm 0.", "torch ", "python "))


def test_public_names_are_lazy_and_all_there() -> None:
    code = (
        "import sys, graftlm\n"
        "assert 'torch' not in sys.modules and 'pydantic' not in sys.modules\n"
        "assert dir(graftlm) == sorted(graftlm.__all__)\n"
        "[getattr(graftlm, name) for name in graftlm.__all__]\n"
        "assert not isinstance(graftlm.write_report, type(sys))\n"
    )
    done = graftlm(code=code)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        import graftlm as package

        _ = package.nosuch


def test_plain_progress_says_each_cell_now_and_then() -> None:
    now = [0.0]
    console = Console(width=200, record=True, file=io.StringIO())
    lines = Lines(console, clock=lambda: now[0])
    lines.start(100)
    lines.cell("mera 1/4 image", "finetune 1/10")
    now[0] = 10
    lines.cell("mera 1/4 image", "finetune 2/10")
    lines.cell("expert [video]", "pretrain 1/10")
    lines.advance(25)
    now[0] = 40
    lines.cell("mera 1/4 image", "finetune 9/10")
    lines.advance(75)
    lines.done()
    assert console.export_text().splitlines() == [
        "  0% 0:00:00  mera 1/4 image: finetune 1/10",
        "  0% 0:00:10  expert [video]: pretrain 1/10",
        " 25% 0:00:40, about 0:02:00 left  mera 1/4 image: finetune 9/10",
        "100% 0:00:40  end",
    ]
