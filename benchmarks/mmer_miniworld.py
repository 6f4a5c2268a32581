"""MMER's Tables 1 to 5 and Figures 4 and 5 in the mini world: composers of four experts, several seeds, one committed page.

.venv/bin/python benchmarks/mmer_miniworld.py tune     learning rate of the experts, on validation scenes of an extra seed
.venv/bin/python benchmarks/mmer_miniworld.py run      seeds 0 1 2 (resumes)
.venv/bin/python benchmarks/mmer_miniworld.py table    write benchmarks/results/mmer-miniworld.md
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftlm.core.files import read_json
from graftlm.data.miniworld.combinations import COMBINATIONS
from graftlm.experiment.cells import Cell
from graftlm.experiment.composing import ComposingWorker
from graftlm.experiment.progress import Silent
from graftlm.experiment.run import run
from graftlm.experiment.spec import load

NAME = "mmer-miniworld"
RESULTS = Path(__file__).parent / "results"
MARK = "<!-- everything below is generated -->"

TUNING = ("seed=100", "evaluate.split=val")
"""The world of this seed is used for choosing settings only, and only its validation scenes."""

RATES = (5e-4, 1e-3, 2e-3)
"""Learning rates of the LLM that the schedule was chosen from, by the experts alone: no composer had a say."""

DAMC = ((1e-3, 0.05), (2e-3, 0.05), (5e-3, 0.05), (1e-2, 0.05), (2e-3, 1.0))
"""Learning rates of the LLM's LoRAs, and text's share of them, that DAMC's experts were chosen from."""

EXPANSION: Mapping[str, tuple[float, ...]] = {
    "average": (60.53, 39.31, 47.65, 47.40, 53.64, 56.28, 60.53, 54.60, 59.16, 53.23),
    "arithmetic": (62.04, 40.22, 47.97, 46.70, 53.44, 56.28, 63.36, 55.40, 59.72, 53.90),
    "ties": (61.74, 43.27, 49.27, 48.60, 53.64, 55.47, 61.74, 54.60, 58.55, 54.10),
    "average+dare": (60.32, 39.78, 47.98, 47.67, 53.64, 56.68, 60.73, 54.80, 59.53, 53.46),
    "arithmetic+dare": (62.75, 40.46, 47.98, 46.92, 54.25, 56.48, 64.17, 55.40, 60.08, 54.27),
    "ties+dare": (61.96, 43.78, 49.54, 48.98, 54.25, 55.87, 62.55, 55.20, 59.06, 54.57),
    "mmer": (62.15, 47.25, 51.27, 51.77, 56.48, 59.31, 65.59, 56.00, 61.63, 56.82),
}
"""Table 1 of arXiv:2505.17110: accuracy in percent over `COMBINATIONS`, and their average."""

RETENTION: Mapping[str, tuple[str, ...]] = {
    "average": ("83.6", "93.0", "97.2 / 124.8", "97.8 / 96.3", "97.5 / 88.3"),
    "arithmetic": ("87.5", "94.5", "97.5 / 129.8", "99.2 / 98.8", "98.3 / 91.0"),
    "ties": ("86.2", "95.1", "98.0 / 130.9", "98.6 / 97.9", "98.3 / 90.6"),
    "average+dare": ("85.3", "94.4", "97.7 / 128.8", "98.6 / 97.6", "98.1 / 89.8"),
    "arithmetic+dare": ("88.4", "94.4", "98.1 / 132.0", "99.5 / 99.9", "98.8 / 91.4"),
    "ties+dare": ("87.2", "95.6", "98.5 / 134.4", "98.3 / 98.6", "98.4 / 91.4"),
    "mmer": ("100.3", "98.5", "99.6 / 155.6", "99.9 / 105.7", "99.8 / 99.4"),
}
"""Table 2: retention in percent for image, video, audio, point (captions / accuracy), and the trimmed average."""

ABLATION: Mapping[str, tuple[str, str]] = {
    "mmer": ("56.82", "99.8 / 99.4"),
    "no-congruence": ("7.20", "41.6 / 16.7"),
    "no-significance": ("33.87", "60.5 / 57.1"),
    "no-calibration": ("54.02", "95.6 / 93.9"),
}
"""Table 5: average accuracy over combinations, and retention."""

FORGETTING: Mapping[str, tuple[str, str]] = {
    "one": ("99.86 / 99.67", "96.47 / 91.69"),
    "two": ("99.63 / 99.42", "99.28 / 87.50"),
}
"""Table 4: retention of previous / new tasks with one and two new tasks, MMER and Model Tailor."""


def folder(runs: Path, seed: int) -> Path:
    """Where a run of the table lives."""
    return runs / f"mmer-{seed}"


def tune(runs: Path) -> str:
    """Validation scores of the experts for every learning rate of the LLM, and of DAMC's own."""
    rows: list[tuple[str, dict[str, Any]]] = []
    for rate in RATES:
        phases = f"phases={{schedule: miniworld, finetune: {{lr: {{connectors: 1e-3, llm: {rate}}}}}}}"
        worker = ComposingWorker(load(NAME, [phases, *TUNING]), runs / f"mmer-tune-{rate}")
        scores: dict[str, Any] = {}
        for stage in worker.stream.stages:
            worker.do(Cell("expert", stage.name), Silent())
            found = read_json(worker.store.expert(stage.name) / "scores.json")
            scores |= {task: score["value"] for task, score in found.items()}
        rows.append((f"all weights, {rate}", scores))
        print(*rows[-1], flush=True)
    for rate, text in DAMC:
        experts = f"{{methods: [{{damc: {{rank: 32, alpha: 32, text_rate: {text}}}}}], phase: {{lr: {{connectors: 1e-3, llm: {rate}}}}}}}"
        alone = [f"composers={{damc: {{rule: damc, experts: {experts}}}}}", "study=null"]
        worker = ComposingWorker(load(NAME, [*alone, *TUNING]), runs / f"mmer-tune-damc-{rate}-{text}")
        scores = {}
        for stage in worker.stream.stages:
            worker.do(Cell("own", f"damc/{stage.name}"), Silent())
            scores |= read_json(worker.out / "own/damc" / stage.name / "result.json")["scores"]
        rows.append((f"DAMC, {rate}, text {rate * text:g}", scores))
        print(*rows[-1], flush=True)
    lines = ["| learning rate of the LLM | " + " | ".join(rows[0][1]) + " |", "|---" * (len(rows[0][1]) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{value:.3g}" for value in scores.values()) + " |" for name, scores in rows]
    return "\n".join(["The schedules, by the experts alone:", "", *lines])


def table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """The committed page, from the summaries of finished runs."""
    found = [summary["composing"] for summary in summaries]
    page = [
        "## Expansion",
        "",
        "Accuracy in percent; chance is 25. In brackets the paper's.",
        "",
        *_expansion(found),
        "",
    ]
    page += ["## Retention", "", "Percent of the experts' scores; MMER and signs recover each expert.", ""]
    page += [*_retention(summaries, found), ""]
    page += ["## Without a step of the decoupling", "", *_ablation(found), ""]
    page += ["## Share of the parameters that a mask selects", "", *_shares(found), ""]
    page += ["## Density and significance", "", "Accuracy over combinations / retention, validation data, percent.", ""]
    page += [*_sweep(found), ""]
    page += ["## Number of experts", "", *_counts(found), ""]
    page += ["## New tasks", "", *_forgetting(found), ""]
    return "\n".join(page)


def _expansion(found: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = ["| composer | " + " | ".join(name.upper() for name in COMBINATIONS) + " | mean |", "|---" * 11 + "|"]
    for name in found[0]["composers"]:
        results = [each["composers"][name] for each in found]
        paper = [f" ({x:.1f})" for x in EXPANSION[name]] if name in EXPANSION else [""] * 10
        accuracy = {c: 100 * statistics.fmean(r["expansion"][c] for r in results) for c in COMBINATIONS}
        cells = [f"{value:.1f}{printed}" for value, printed in zip(accuracy.values(), paper, strict=False)]
        cells.append(f"**{_spread([100 * r['expansion_mean'] for r in results])}**{paper[-1]}")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
        if "blind" in results[0]:
            blind = [f"{100 * statistics.fmean(r['blind'][c] for r in results):.1f}" for c in COMBINATIONS]
            means = [100 * statistics.fmean(r["blind"].values()) for r in results]
            rows.append(f"| *{name}, other samples' media* | " + " | ".join(blind) + f" | {_spread(means)} |")
    return rows


def _retention(summaries: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> list[str]:
    order = summaries[0]["order"]
    head = [
        *order,
        "mean",
        "all in one model",
        "text instructions",
        "settings, per seed",
        "paper: image, video, audio, point; average",
    ]
    rows = ["| composer | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for name in found[0]["composers"]:
        results = [each["composers"][name] for each in found]
        cells = [_spread([r["retention"][stage] for r in results]) for stage in order]
        cells += [f"**{_spread([r['retention_mean'] for r in results])}**"]
        cells += [_spread([r["expanded_retention_mean"] for r in results])]
        cells += [_spread([r["probes"]["instructions"] for r in results], 3)]
        cells += ["; ".join(_settings(r) for r in results), ", ".join(RETENTION.get(name, ()))]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return rows


def _settings(result: Mapping[str, Any]) -> str:
    """Chosen values, short."""
    own = [f"{key[0]}{value}" for values in result["per_model"].values() for key, value in values.items()]
    return " ".join([*(f"{key} {value}" for key, value in result["settings"].items()), *own])


def _ablation(found: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = ["| | expansion | retention | all in one model | paper: expansion; retention |", "|---|---|---|---|---|"]
    for name, paper in ABLATION.items():
        results = [each["composers" if name == "mmer" else "ablation"][name] for each in found]
        cells = [_spread([100 * r["expansion_mean"] for r in results]), _spread([r["retention_mean"] for r in results])]
        cells += [_spread([r["expanded_retention_mean"] for r in results]), "; ".join(paper)]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return rows


def _shares(found: Sequence[Mapping[str, Any]]) -> list[str]:
    shares = [each["composers"]["mmer"]["mask_share"] for each in found]
    cells = [_spread([100 * share[name] for share in shares]) for name in shares[0]]
    return ["| " + " | ".join(shares[0]) + " |", "|---" * len(cells) + "|", "| " + " | ".join(cells) + " |"]


def _sweep(found: Sequence[Mapping[str, Any]]) -> list[str]:
    significances = list(dict.fromkeys(row["significance"] for row in found[0]["sweep"]))
    densities = list(dict.fromkeys(row["density"] for row in found[0]["sweep"]))
    rows = [
        "| K | " + " | ".join(f"λ = {value}" for value in significances) + " |",
        "|---" * (len(significances) + 1) + "|",
    ]
    for density in densities:
        cells = []
        for significance in significances:
            picked = [
                r
                for each in found
                for r in each["sweep"]
                if (r["density"], r["significance"]) == (density, significance)
            ]
            expansion, kept = (statistics.fmean(r[key] for r in picked) for key in ("expansion", "retention"))
            cells.append(f"{100 * expansion:.1f} / {kept:.1f}")
        rows.append(f"| {100 * density:.0f} % | " + " | ".join(cells) + " |")
    return rows


def _counts(found: Sequence[Mapping[str, Any]]) -> list[str]:
    by_count: dict[int, list[str]] = {}
    for names in found[0]["counts"]:
        by_count.setdefault(len(names.split("+")), []).append(names)
    composers = list(next(iter(found[0]["counts"].values())))
    models = found[0]["storage"]["models"]
    rows = [
        "| experts | " + " | ".join(composers) + " | storage of mmer, share of the originals |",
        "|---" * (len(composers) + 2) + "|",
    ]
    for count, sets in sorted(by_count.items()):
        cells = [
            _spread([statistics.fmean(_kept(each, names, name) for names in sets) for each in found])
            for name in composers
        ]
        rows.append(f"| {count} | " + " | ".join(cells) + f" | {_storage(found[0], count):.0f} % |")
    cells = [_spread([each["composers"][name]["retention_mean"] for each in found]) for name in composers]
    return [*rows, f"| {models} | " + " | ".join(cells) + f" | {_storage(found[0], models):.0f} % |"]


def _kept(found: Mapping[str, Any], names: str, composer: str) -> float:
    return statistics.fmean(found["counts"][names][composer]["retention"].values())


def _storage(found: Mapping[str, Any], count: int) -> float:
    """MMER's bits in percent of the originals', by the paper's formula."""
    from graftlm.merging.mmer import storage_bits

    llm, own = found["storage"]["llm"], found["storage"]["own"]
    return 100 * storage_bits("mmer", count, llm, own) / storage_bits("originals", count, llm, own)


def _forgetting(found: Sequence[Mapping[str, Any]]) -> list[str]:
    head = "| scenario | all previous tasks | combinations | new tasks | expert before them "
    head += "| Model Tailor, previous / new | fine-tuning, previous / new |"
    rows = [head, "|---" * 7 + "|"]
    for name in found[0]["forgetting"]:
        results = [each["forgetting"][name] for each in found]
        cells = [_spread([r["composed"]["retention_mean"] for r in results])]
        cells += [_spread([100 * r["composed"]["expansion_mean"] for r in results])]
        cells += [_spread([statistics.fmean(r["composed"]["new"].values()) for r in results])]
        cells += [_spread([statistics.fmean(r["untouched"].values()) for r in results])]
        for method in ("tailor", "finetune"):
            both = [
                _spread([statistics.fmean(v[key] for v in r[method].values()) for r in results])
                for key in ("previous", "new")
            ]
            cells.append(" / ".join(both))
        rows.append(f"| {name} ({', '.join(results[0]['tasks'])}) | " + " | ".join(cells) + " |")
    said = [f"{count} new: MMER {mine}, Model Tailor {other}" for count, (mine, other) in FORGETTING.items()]
    return [*rows, "", f"The paper's Table 4, previous / new tasks: {'; '.join(said)}."]


def _spread(values: Sequence[float], digits: int = 1) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def write(name: str, tables: str) -> None:
    """Replace what stands below the mark of a page; what people wrote above it stays."""
    page = RESULTS / name
    text = page.read_text() if page.is_file() else f"# {name.removesuffix('.md')}\n\n{MARK}\n"
    page.write_text(f"{text.partition(MARK)[0]}{MARK}\n\n{tables}\n")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["tune", "run", "table"])
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    if arguments.step == "tune":
        write("mmer-miniworld-tuning.md", tune(arguments.runs))
    elif arguments.step == "run":
        for seed in arguments.seeds:
            composed = run(load(NAME, [f"seed={seed}"]), folder(arguments.runs, seed))["composing"]["composers"]
            kept = {
                name: (round(r["retention_mean"], 1), round(100 * r["expansion_mean"], 1))
                for name, r in composed.items()
            }
            print(seed, kept, flush=True)
    else:
        pages = [json.loads((folder(arguments.runs, seed) / "summary.json").read_text()) for seed in arguments.seeds]
        write("mmer-miniworld.md", table(pages))


if __name__ == "__main__":
    main()
