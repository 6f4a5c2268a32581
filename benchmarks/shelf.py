"""The shelf in the mini worlds: the methods of each setting, three seeds, one committed page per setting.

.venv/bin/python benchmarks/shelf.py tune llavac     settings on validation scenes of an extra seed
.venv/bin/python benchmarks/shelf.py run llavac      the comparison (resumes); also micl and mera
.venv/bin/python benchmarks/shelf.py table llavac    write benchmarks/results/llavac-miniworld.md
"""

import argparse
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftlm.evaluation.gains import relative_gain
from graftlm.experiment.compare import compare
from graftlm.experiment.grid import make_grid
from graftlm.experiment.run import run
from graftlm.experiment.spec import load

RESULTS = Path(__file__).parent / "results"
MARK = "<!-- everything below is generated -->"
TUNING = ("seed=100", "evaluate.split=val")
"""Settings are chosen on the validation scenes of a world that no result is of."""


@dataclass(frozen=True)
class Setting:
    """One of the papers' settings.

    Attributes:
        experiment: a packaged one.
        orders: as `graftlm compare` takes them.
        methods: what is compared, with the settings that were chosen.
        tried: what was tried to choose them; nothing yet where it is empty.
        page: name of the results page.
    """

    experiment: str
    orders: tuple[str, ...]
    methods: str
    tried: str
    seeds: tuple[int, ...] = (0, 1, 2)
    page: str = ""


SETTINGS: Mapping[str, Setting] = {
    "mera": Setting(
        "mera-miniworld-table",
        ("given", "reverse"),
        "finetune: [finetune], ewc1: [ewc], ewc: [{ewc: {strength: 1e4, fraction: 0.1}}], "
        "ewc+realign: [{ewc: {strength: 1e4, fraction: 0.1}}, realign], "
        "ewc+mera: [{ewc: {strength: 1e4, fraction: 0.1, on: weights}}, mera], "
        "pathweave: [{pathweave: {rank: 32}}], pathweave+realign: [{pathweave: {rank: 32}}, realign], "
        "olora: [{olora: {strength: 0.005}}], lwf: [lwf], "
        "select+merge: [{select: {modules: [gate_proj, up_proj]}}, merge]",
        "cont: [{finetune: {continuing: true}}], "
        + ", ".join(f"ewc{n}: [{{ewc: {{strength: 1e{n}, fraction: 0.1}}}}]" for n in (2, 3, 4, 5))
        + ", "
        + ", ".join(f"ewcw{n}: [{{ewc: {{strength: 1e{n}, fraction: 0.1, on: weights}}}}]" for n in (3, 4, 5))
        + ", olora5: [{olora: {strength: 0.005}}], olora05: [{olora: {strength: 0.05}}], olora50: [{olora: {strength: 0.5}}]",
        page="mera-shelf",
    ),
    "llavac": Setting(
        "llavac-finetune",
        ("given",),
        "finetune: [finetune], joint: [joint], lwf: [lwf], ewc: [{ewc: {strength: 1e4, fraction: 0.1}}], l2p: [l2p], "
        "modalprompt: [modalprompt], olora: [{olora: {strength: 0.05}}], moelora: [{moelora: {rank: 32, alpha: 32}}], "
        "modelmix: [{merge: {rule: model_mix, alpha: 0.2}}], sac: [{merge: {rule: sac, alpha: 0.2}}], uir: [uir], "
        "llava-c: [llava-c]",
        "",
        page="llavac-miniworld",
    ),
    "micl": Setting(
        "micl-order1",
        ("micl-order1", "micl-order2"),
        "finetune: [{finetune: {continuing: true}}], lwf: [lwf], ewc: [{ewc: {strength: 1e4, fraction: 0.1}}], ewf: [ewf], "
        "moincl: [moincl], mera: [mera]",
        "",
        page="micl-miniworld",
    ),
}


def tune(name: str, work: Path, jobs: int) -> None:
    """Try settings on validation scenes, and print the mean backward and forward gain of the last stage."""
    setting = SETTINGS[name]
    spec = load(setting.experiment, [*TUNING, f"jobs={jobs}", f"methods={{{setting.tried}}}"])
    summary = run(spec, work / f"tune-{name}")
    for method, facts in summary["methods"].items():
        backward, forward = _last(facts, summary["experts"])
        probes = facts["probes"][-1]
        kept = [probes[task] / value for task, value in summary["base"].items() if task in probes and value]
        general = f"{100 * statistics.fmean(kept):6.1f}" if kept else "     –"
        print(f"{method:24} backward {backward:6.1f} forward {forward:6.1f} general {general}")


def _last(facts: Mapping[str, Any], experts: Mapping[str, Any]) -> tuple[float, float]:
    """Backward gain at the last stage, and the mean forward gain."""
    final = facts["scores"][-1]
    *old, _ = [relative_gain(final[stage], experts[stage]) for stage in final]
    return statistics.fmean(old), statistics.fmean(facts["forward"])


def measure(name: str, work: Path, jobs: int) -> None:
    """The comparison."""
    setting = SETTINGS[name]
    spec = load(setting.experiment, [f"methods={{{setting.methods}}}"])
    grid = make_grid(spec, (), setting.orders, setting.seeds, "finetune")
    failed = compare(grid, work / f"compare-{name}", jobs=jobs)["failed"]
    print(f"{len(failed)} cells failed" if failed else "done")


def table(name: str, work: Path) -> None:
    """Write the page: what a person wrote stays above the mark."""
    path = RESULTS / f"{SETTINGS[name].page}.md"
    head = path.read_text(encoding="utf-8").partition(MARK)[0] if path.is_file() else f"# {name}\n\n"
    body = (work / f"compare-{name}" / "comparison.md").read_text(encoding="utf-8")
    path.write_text(f"{head}{MARK}\n\n{body}", encoding="utf-8")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["tune", "run", "table"])
    parser.add_argument("setting", choices=list(SETTINGS))
    parser.add_argument("--work", type=Path, default=Path("runs/shelf"))
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    match arguments.verb:
        case "tune":
            tune(arguments.setting, arguments.work, arguments.jobs)
        case "run":
            measure(arguments.setting, arguments.work, arguments.jobs)
        case "table":
            table(arguments.setting, arguments.work)


if __name__ == "__main__":
    main()
