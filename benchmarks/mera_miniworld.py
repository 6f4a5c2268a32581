"""MERA's Tables 2 and 4 in the mini world: eight methods, both orders, several seeds, one committed table.

.venv/bin/python benchmarks/mera_miniworld.py tune        settings chosen on validation scenes of an extra seed
.venv/bin/python benchmarks/mera_miniworld.py run         both orders, seeds 0 1 2 (resumes)
.venv/bin/python benchmarks/mera_miniworld.py table       write benchmarks/results/mera-miniworld.md
.venv/bin/python benchmarks/mera_miniworld.py conflict    five methods in full conflict, both orders
.venv/bin/python benchmarks/mera_miniworld.py long        five methods over eight stages
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graftlm.core.files import read_json
from graftlm.evaluation import bootstrap, gains
from graftlm.experiment.cells import Cell, Worker
from graftlm.experiment.progress import Silent
from graftlm.experiment.run import run
from graftlm.experiment.spec import ExperimentSpec, load

RESULTS = Path(__file__).parent / "results"
TUNING_SEED = 100
TUNING = (f"seed={TUNING_SEED}", "evaluate.split=val", "data.conflict=0")
"""The world of this seed is used for choosing settings only, and only its validation scenes."""

PAPER: Mapping[str, tuple[str, str]] = {
    "finetune": ("59.76 ± 27.23", "48.96 ± 35.70"),
    "replay1": ("66.09 ± 25.86", "43.95 ± 39.03"),
    "replay10": ("77.52 ± 16.32", "51.90 ± 36.34"),
    "eproj": ("89.61 ± 2.63", "70.07 ± 11.86"),
    "merge": ("90.29 ± 7.42", "70.00 ± 30.87"),
    "realign": ("87.92 ± 12.41", "71.90 ± 24.52"),
    "mera1": ("97.90 ± 6.02", "84.42 ± 12.93"),
    "mera10": ("101.00 ± 3.90", "93.42 ± 6.25"),
}
"""Table 2 and 4 of arXiv:2503.07663: mean ± sample std over stages, in percent; sequential and reverse order."""

MARK = "<!-- everything below is generated -->"

METHODS = (
    "methods={finetune: [finetune], replay10: [{replay: {repeat: 2}}], eproj: [eproj], merge: [merge], mera10: [mera]}"
)

KNOBS: Mapping[str, tuple[str, Sequence[str]]] = {
    "conflict-sequential": ("mera-miniworld", ["data.conflict=1"]),
    "conflict-reverse": ("mera-miniworld", ["data.conflict=1", "stream=miniworld-reverse"]),
    "eight-stages": ("mera-miniworld-long", []),
}
"""Title -> experiment and settings."""

TASKS = ("coco", "okvqa", "msvd", "msvd_qa", "audiocaps", "clotho_aqa", "cap3d", "cap3d_qa")

TUNED: Mapping[str, Sequence[str]] = {
    "realign": [f"methods={{realign: [{{realign: {{lr: {lr}}}}}]}}" for lr in ("5e-4", "1e-3", "2e-3")],
    "replay": [f"methods={{replay: [{{replay: {{repeat: {n}}}}}]}}" for n in (1, 2, 3)],
}
"""Three settings for every ingredient that has one of its own, the others share the schedule; MERA takes realigning's."""


RATES = (2.5e-3, 5e-3, 1e-2)
"""Learning rates of the LLM that the schedule was chosen from, by the experts alone: no method had a say."""


def tune_schedule(runs: Path) -> list[str]:
    """Validation scores of the experts for every learning rate of the LLM."""
    lines = ["| LLM learning rate | " + " | ".join(TASKS) + " |", "|---" * (len(TASKS) + 1) + "|"]
    for rate in RATES:
        phases = f"phases={{schedule: miniworld, finetune: {{lr: {{connectors: 1e-3, llm: {rate}}}}}}}"
        spec = load("mera-miniworld", [phases, *TUNING])
        worker = Worker(spec, runs / f"tune-schedule-{rate}")
        scores = {}
        for stage in worker.stream.stages:
            worker.do(Cell("expert", stage.name), Silent())
            scores |= read_json(worker.store.expert(stage.name) / "scores.json")
        lines.append(f"| {rate} | " + " | ".join(f"{scores[task]['value']:.3g}" for task in TASKS) + " |")
        print(lines[-1], flush=True)
    return lines


def tune(runs: Path) -> None:
    """Score every candidate on validation scenes of the tuning seed, sequential order."""
    page = ["# Settings, chosen on validation scenes of one extra seed", ""]
    page += ["The schedule, by the experts alone:", "", *tune_schedule(runs), ""]
    page += ["Three settings for every method that has one of its own, sequential order:", "", *tune_methods(runs), ""]
    (RESULTS / "mera-miniworld-tuning.md").write_text("\n".join(page))


def tune_methods(runs: Path) -> list[str]:
    """Validation gains of every candidate setting."""
    lines = [
        "| method | setting | backward, mean of stages | backward, last | forward, mean |",
        "|---|---|---|---|---|",
    ]
    for method, candidates in TUNED.items():
        for i, override in enumerate(candidates):
            spec = load("mera-miniworld", [override, *TUNING])
            result = run(spec, runs / f"tune-{method}-{i}")["methods"][method]
            row = [result["backward_mean"], result["backward"][-1], statistics.mean(result["forward"])]
            setting = json.dumps(result["ingredients"])
            lines.append(f"| {method} | `{setting}` | " + " | ".join(f"{x:.1f}" for x in row) + " |")
            print(lines[-1], flush=True)
    return lines


def specs(seeds: Sequence[int]) -> dict[tuple[str, int], ExperimentSpec]:
    """The table's runs: order and seed."""
    return {
        (order, seed): load("mera-miniworld-table", [f"stream=miniworld-{order}", f"seed={seed}"])
        for seed in seeds
        for order in ("sequential", "reverse")
    }


def folder(runs: Path, order: str, seed: int) -> Path:
    """Where a run of the table lives."""
    return runs / f"table-{order}-{seed}"


def table(runs: Path, seeds: Sequence[int]) -> str:
    """The committed page, from finished runs only."""
    summaries = {
        (order, seed): json.loads((folder(runs, order, seed) / "summary.json").read_text())
        for order in ("sequential", "reverse")
        for seed in seeds
    }
    page = []
    for order in ("sequential", "reverse"):
        page += [f"## {order.capitalize()} order", "", *_order_table(order, [summaries[order, s] for s in seeds]), ""]
        page += ["Backward gain per stage and forward gain at stages 2 to 4, mean over seeds:", ""]
        page += [*_stage_table([summaries[order, s] for s in seeds]), ""]
        page += [
            "Paired differences of the mean relative gain of all modalities at the last stage, in percent points, from"
        ]
        page += ["per-sample scores (95 % bootstrap interval over test items), per seed:", ""]
        page += [*_pairs(runs, order, seeds, summaries), ""]
    return "\n".join(page)


def write(name: str, tables: str) -> None:
    """Replace what stands below the mark of a page; what people wrote above it stays."""
    page = RESULTS / name
    text = page.read_text() if page.is_file() else f"# {name.removesuffix('.md')}\n\n{MARK}\n"
    page.write_text(f"{text.partition(MARK)[0]}{MARK}\n\n{tables}\n")


def knobs(runs: Path, names: Sequence[str], seeds: Sequence[int]) -> str:
    """Fewer methods where there is more to forget: modalities that contradict each other, or a longer stream."""
    page = []
    for title in names:
        name, settings = KNOBS[title]
        specs = [load(name, [METHODS, *settings, f"seed={seed}"]) for seed in seeds]
        folders = [runs / f"knob-{title}-{seed}" for seed in seeds]
        summaries = [run(spec, folder) for spec, folder in zip(specs, folders, strict=True)]
        page += [
            f"## {title}",
            "",
            f"`graftlm run {name} '{METHODS}' {' '.join(settings)}`, seeds {list(seeds)}, mean.",
            "",
        ]
        page += [*_knob_table(summaries), ""]
    return "\n".join(page)


def _knob_table(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    stages = summaries[0]["order"]
    head = [f"after {stage}" for stage in stages[1:]]
    columns = ["method", *head, "backward, mean per seed", "last stage", "forward", "joint test", "text instructions"]
    rows = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for method in summaries[0]["methods"]:
        results = [summary["methods"][method] for summary in summaries]
        cells = [f"{x:.1f}" for x in np.mean([r["backward"] for r in results], axis=0)[1:]]
        cells += [" / ".join(f"{r['backward_mean']:.1f}" for r in results)]
        cells += [_spread([r["backward"][-1] for r in results])]
        cells += [_spread([statistics.mean(r["forward"][1:]) for r in results])]
        cells += [_spread([r["probes"][-1][probe] for r in results], 3) for probe in ("mcub", "instructions")]
        rows.append(f"| {method} | {' | '.join(cells)} |")
    return rows


def _order_table(order: str, summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    paper = 0 if order == "sequential" else 1
    rows = [
        "| method | mean over stages, per seed | mean ± spread over seeds | std over stages | last stage | forward (stages 2-4) "
        "| joint test (accuracy) | text instructions (accuracy) | paper, mean ± std over stages |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in PAPER:
        results = [s["methods"][name] for s in summaries]
        means = [r["backward_mean"] for r in results]
        forward = [statistics.mean(r["forward"][1:]) for r in results]
        joint, text = ([r["probes"][-1][probe] for r in results] for probe in ("mcub", "instructions"))
        rows.append(
            f"| {name} | {' / '.join(f'{x:.1f}' for x in means)} | **{_spread(means)}** "
            f"| {statistics.mean(r['backward_std'] for r in results):.1f} | {_spread([r['backward'][-1] for r in results])} "
            f"| {_spread(forward)} | {_spread(joint, 3)} | {_spread(text, 3)} | {PAPER[name][paper]} |"
        )
    floors = [statistics.mean(_relative(s["blind"], s["experts"])) for s in summaries]
    rows.append(f"| *blind floor* | | {_spread(floors)} | | | | | | |")
    before = [s["base"]["instructions"] for s in summaries]
    rows.append(f"| *base before any stage* | | | | | | | {_spread(before, 3)} | |")
    return rows


def _stage_table(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = ["| method | backward 1 | 2 | 3 | 4 | forward 2 | 3 | 4 |", "|---|---|---|---|---|---|---|---|"]
    for name in PAPER:
        backward = np.mean([s["methods"][name]["backward"] for s in summaries], axis=0)
        forward = np.mean([s["methods"][name]["forward"] for s in summaries], axis=0)[1:]
        rows.append(f"| {name} | " + " | ".join(f"{x:.1f}" for x in [*backward, *forward]) + " |")
    return rows


def _pairs(runs: Path, order: str, seeds: Sequence[int], summaries: Mapping[tuple[str, int], Any]) -> list[str]:
    pairs = [
        ("mera10", "finetune"),
        ("mera10", "merge"),
        ("mera10", "realign"),
        ("mera10", "replay10"),
        ("mera1", "merge"),
    ]
    rows = ["| pair | " + " | ".join(f"seed {s}" for s in seeds) + " |", "|---" * (len(seeds) + 1) + "|"]
    for a, b in pairs:
        cells = []
        for seed in seeds:
            summary = summaries[order, seed]
            last = f"{len(summary['order'])}-{summary['order'][-1]}"
            where = folder(runs, order, seed) / "methods"
            experts = {task: value for tasks in summary["experts"].values() for task, value in tasks.items()}
            difference = bootstrap.paired_gain(where / a / last, where / b / last, experts, seed=seed)
            cells.append(f"{difference.value:+.1f} [{difference.low:+.1f}, {difference.high:+.1f}]")
        rows.append(f"| {a} − {b} | " + " | ".join(cells) + " |")
    return rows


def _relative(scores: Mapping[str, Any], experts: Mapping[str, Any]) -> list[float]:
    return [gains.relative_gain(scores[stage], experts[stage]) for stage in experts]


def _spread(values: Sequence[float], digits: int = 1) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["tune", "run", "table", "conflict", "long"])
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    if arguments.step == "tune":
        tune(arguments.runs)
    elif arguments.step == "run":
        for (order, seed), spec in specs(arguments.seeds).items():
            result = run(spec, folder(arguments.runs, order, seed))
            row = {name: round(m["backward_mean"], 1) for name, m in result["methods"].items()}
            print(order, seed, row, flush=True)
    elif arguments.step == "table":
        write("mera-miniworld.md", table(arguments.runs, arguments.seeds))
    elif arguments.step == "conflict":
        titles = ("conflict-sequential", "conflict-reverse")
        write("mera-miniworld-conflict.md", knobs(arguments.runs, titles, arguments.seeds))
    else:
        write("mera-miniworld-long.md", knobs(arguments.runs, ("eight-stages",), arguments.seeds))


if __name__ == "__main__":
    main()
