"""MMER's Tables 1 to 5 and Figures 4 and 5 in the mini world: composers of four experts, several seeds, one committed page.

.venv/bin/python benchmarks/mmer_miniworld.py tune     learning rate of the experts, on validation scenes of an extra seed
.venv/bin/python benchmarks/mmer_miniworld.py run      seeds 0 1 2 (resumes)
.venv/bin/python benchmarks/mmer_miniworld.py table    write benchmarks/results/mmer-miniworld.md
"""

import argparse
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from graftlm.core.files import read_json
from graftlm.data.miniworld.combinations import COMBINATIONS
from graftlm.evaluation import bootstrap, gains
from graftlm.experiment.cells import Cell, open_stream
from graftlm.experiment.composing import ORIGINALS, ROUTED, ComposingWorker
from graftlm.experiment.progress import Silent
from graftlm.experiment.run import run, summarise
from graftlm.experiment.spec import load
from graftlm.experiment.store import RunStore
from graftlm.merging.mmer import METHODS, storage_bits

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

MASKS = "audio 2.2; the others are in a figure without numbers"
"""Figure 4 (a): percent of the parameters that a mask selects."""

TASKS: Mapping[str, tuple[str, ...]] = {
    "originals": ("23.15 / 21.27", "25.30 / 24.71", "39.79", "62.23", "–", "49.40", "51.26"),
    "composed": ("23.14 / 22.49", "25.20 / 38.51", "39.28", "62.40", "56.82", "49.28", "51.00"),
    "audio": ("22.95 / 21.87", "25.12 / 38.23", "39.17", "62.20", "56.53", "57.71", "50.94"),
    "image": ("23.05 / 22.03", "24.96 / 37.68", "38.90", "62.27", "56.44", "48.94", "57.08"),
    "both": ("22.82 / 21.56", "24.88 / 37.69", "38.53", "61.94", "55.89", "57.52", "56.72"),
}
"""Table 3, scores: point, audio, video, image, combinations; Clotho-AQA and Flickr30k, the new tasks."""

FORGETTING: Mapping[str, tuple[str, str]] = {
    "one": ("99.86 / 99.67", "96.47 / 91.69"),
    "two": ("99.63 / 99.42", "99.28 / 87.50"),
}
"""Table 4: retention of previous / new tasks with one and two new tasks, MMER and Model Tailor."""

PAIRS = (
    ("mmer", "average"),
    ("mmer", "ties"),
    ("mmer", "arithmetic+dare"),
    ("mmer+density", "mmer"),
    ("mmer+rescale", "mmer"),
    ("signs", "mmer"),
    ("damc", "mmer"),
    ("originals", "mmer"),
    ("originals", "average"),
)
"""Composers that are compared item by item."""

SYMBOLS = {"significance": "λ", "density": "K", "drop": "p"}

LARGE = {"parameters": 7e9, "specific": 0.3e9, "adapters": 0.32e9}
"""P, P′ and P* of four 7B experts, in the order of the paper's: what its formulas say of them."""


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
        phase = f"{{lr: {{connectors: 1e-3, llm: {rate}}}}}"
        experts = f"{{methods: [{{damc: {{rank: 32, alpha: 32, text_rate: {text}}}}}], phase: {phase}}}"
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


def table(runs: Path, seeds: Sequence[int]) -> str:
    """The committed page, from finished runs; their summaries are made anew, by this version of the code."""
    folders = [folder(runs, seed) for seed in seeds]
    stores = [RunStore(each) for each in folders]
    summaries = [summarise(store.spec, store, open_stream(store.spec)) for store in stores]
    found = [summary["composing"] for summary in summaries]
    page = ["## Expansion (the paper's Table 1)", "", "Accuracy in percent; chance is 25. In brackets the paper's.", ""]
    page += [*_expansion(found), ""]
    page += [*_pairs(folders, seeds, found, summaries, "expansion"), ""]
    said = "Percent of the experts' scores. MMER, signs and DAMC recover each expert; the others are one merged model."
    page += ["## Retention (Table 2)", "", said, "", *_retention(summaries, found), ""]
    page += [*_pairs(folders, seeds, found, summaries, "recovered"), ""]
    page += [*_pairs(folders, seeds, found, summaries, "joint"), ""]
    page += ["The experts' own scores:", "", *_experts(summaries), ""]
    page += ["## Without a step of the decoupling (Table 5)", "", *_ablation(found), ""]
    page += [
        "## Masks (Figure 4 a)",
        "",
        "Percent of the LLM's parameters that a mask selects.",
        "",
        *_shares(found),
        "",
    ]
    page += ["## Density and significance (Figure 4 b)", ""]
    page += ["Accuracy over combinations / retention, validation data, percent; one λ for all experts.", ""]
    page += [*_sweep(found), ""]
    page += ["## Number of experts, and storage (Figure 5)", "", *_counts(found), "", *_storages(found), ""]
    page += ["## New tasks (Tables 3 and 4)", "", *_forgetting(found), "", *_forgotten(found), ""]
    page += [*_tailored(folders, seeds, found, summaries), ""]
    return "\n".join(page)


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _items(home: Path, name: str, rule: str, what: str) -> dict[str, Any]:
    """Task -> item -> score of a composer."""
    place = home / "composers" / name
    if what != "recovered" or rule not in (*ROUTED, ORIGINALS):
        found: dict[str, Any] = read_json(place / "expand" / "items.json")
        return found
    parts = sorted((home / "experts").glob("[!.]*") if rule == ORIGINALS else place.glob("retain-*"))
    return {task: items for part in parts for task, items in read_json(part / "items.json").items()}


def _pairs(
    folders: Sequence[Path],
    seeds: Sequence[int],
    found: Sequence[Mapping[str, Any]],
    summaries: Sequence[Mapping[str, Any]],
    what: str,
) -> list[str]:
    """Paired differences in points, from the scores of single items."""
    rows = []
    for first, second in PAIRS:
        if first not in found[0]["composers"] or second not in found[0]["composers"]:
            continue
        cells, values = [], []
        for place, seed, each, summary in zip(folders, seeds, found, summaries, strict=True):
            one, other = (_items(place, name, each["composers"][name]["rule"], what) for name in (first, second))
            experts = {task: value for tasks in summary["experts"].values() for task, value in tasks.items() if value}
            if what == "expansion":
                experts = {f"expansion_{name}": 1.0 for name in each["composers"][first]["expansion"]}
            difference = bootstrap.paired_difference(one, other, experts, seed=seed)
            values.append(difference.value)
            cells.append(_interval(difference))
        rows.append([f"{first} − {second}", *cells, f"**{statistics.fmean(values):+.1f}**"])
    about = {
        "expansion": "the mean accuracy over combinations",
        "recovered": "the mean retention",
        "joint": "the mean retention of one model with all modalities",
    }[what]
    said = f"Paired differences of {about}, in points, per seed (95 % bootstrap interval over test items):"
    return [said, "", *_rows(["pair", *(f"seed {seed}" for seed in seeds), "mean"], rows)]


def _interval(difference: bootstrap.Difference) -> str:
    return f"{difference.value:+.1f} [{difference.low:+.1f}, {difference.high:+.1f}]"


def _experts(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Scores of the experts, and of the experts that see other samples' media."""
    tasks = [(stage, task) for stage, scores in summaries[0]["experts"].items() for task in scores]
    rows = []
    for kind in ("experts", "blind"):
        means = [statistics.fmean(each[kind][stage][task] for each in summaries) for stage, task in tasks]
        kept = [
            statistics.fmean(gains.retention(each[kind][s], each["experts"][s]) for s in each["order"])
            for each in summaries
        ]
        rows.append([kind, *(f"{mean:.3g}" for mean in means), _spread(kept)])
    return _rows(["", *(task for _, task in tasks), "% of the experts"], rows)


def _forgotten(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Table 3: every modality after every scenario."""
    order = list(next(iter(found[0]["composers"].values()))["retention"])
    rows = []
    plain = [each["composers"]["mmer"] for each in found]
    scenarios = {"composed": plain} | {
        name: [each["forgetting"][name]["composed"] for each in found] for name in found[0]["forgetting"]
    }
    for name, results in scenarios.items():
        cells = [_spread([result["retention"][stage] for result in results]) for stage in order]
        cells += [_spread([100 * result["expansion_mean"] for result in results])]
        rows.append([name, *cells, "; ".join(TASKS.get(name, ()))])
    rows.append(["*the paper's originals*", *[""] * (len(order) + 1), "; ".join(TASKS["originals"])])
    head = [
        "MMER",
        *order,
        "combinations",
        "paper's scores: point; audio; video; image; combinations; new audio; new image",
    ]
    return _rows(head, rows)


def _tailored(
    folders: Sequence[Path],
    seeds: Sequence[int],
    found: Sequence[Mapping[str, Any]],
    summaries: Sequence[Mapping[str, Any]],
) -> list[str]:
    """MMER against Model Tailor, item by item, on what both are asked."""
    rows = []
    for name, row in found[0]["forgetting"].items():
        for owner in row["tailor"]:
            for kind in ("previous", "new"):
                cells, values = [], []
                for home, seed, summary in zip(folders, seeds, summaries, strict=True):
                    place = home / "forgetting" / name
                    tailored = read_json(place / f"tailor-{owner}" / "test" / "items.json")
                    experts = (
                        summary["experts"][owner]
                        if kind == "previous"
                        else _tuned(home, tailored, summary["experts"][owner])
                    )
                    routes = [owner] if kind == "previous" else list(experts)
                    mine: dict[str, Any] = {}
                    for route in routes:
                        mine |= read_json(place / f"retain-{route}" / "items.json")
                    difference = bootstrap.paired_difference(mine, tailored, experts, seed=seed)
                    values.append(difference.value)
                    cells.append(_interval(difference))
                rows.append([f"{name}, {owner}", kind, *cells, f"**{statistics.fmean(values):+.1f}**"])
    said = "MMER − Model Tailor on the same tasks, in points of retention, per seed (95 % bootstrap interval over test items):"
    return [said, "", *_rows(["scenario", "tasks", *(f"seed {seed}" for seed in seeds), "mean"], rows)]


def _tuned(home: Path, tailored: Mapping[str, Any], previous: Mapping[str, float]) -> dict[str, float]:
    """New task -> score of fine-tuning on it alone."""
    new = [task for task in tailored if task not in previous]
    return {task: float(read_json(home / "later" / task / "result.json")["new"][task]) for task in new}


def _storages(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Bits by the formulas, here and for large models; and what lies on disk."""
    storage, composers = found[0]["storage"], found[0]["composers"]
    kinds = {"average": "plain", "mmer": "mmer", "signs": "signs", "damc": "damc", "originals": "originals"}
    rows = []
    for name, kind in kinds.items():
        if name not in composers or kind not in storage["bits"]:
            continue
        bits = storage["bits"][kind]
        large = (
            f"{storage_bits(kind, 4, LARGE['parameters'], LARGE['specific'], LARGE['adapters']) / 8e9:.1f} GB"
            if kind in METHODS
            else "–"
        )
        row = [
            kind,
            f"{bits / 1e6:.1f}",
            f"{100 * bits / storage['bits']['originals']:.0f} %",
            f"{composers[name]['bytes'] / 1e6:.2f} MB",
            large,
        ]
        rows.append(row)
    head = [
        "",
        "Mbit, here",
        "of the originals",
        "on disk, without encoders and the base LLM",
        "four 7B experts, the paper's formulas",
    ]
    return _rows(head, rows)


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
        if "own" in results[0]:
            own = [r["own"] for r in results]
            cells = [_spread([r["retention"][stage] for r in own]) for stage in order]
            cells += [_spread([r[key] for r in own]) for key in ("retention_mean", "expanded_retention_mean")]
            rows.append(f"| *{name}, of its own experts* | " + " | ".join(cells) + " | | | |")
    blind = [[gains.retention(each["blind"][s], each["experts"][s]) for each in summaries] for s in order]
    means = [statistics.fmean(seed) for seed in zip(*blind, strict=True)]
    base = _spread([each["base"]["instructions"] for each in summaries], 3)
    rows.append(
        "| *experts, other samples' media* | " + " | ".join([*map(_spread, blind), _spread(means)]) + " | | | | |"
    )
    rows.append("| *base before any stage* |" + " |" * (len(order) + 2) + f" {base} | | |")
    return rows


def _settings(result: Mapping[str, Any]) -> str:
    """Chosen values, short."""
    own = [f"{value:g}" for values in result["per_model"].values() for value in values.values()]
    names = dict.fromkeys(SYMBOLS.get(key, key) for values in result["per_model"].values() for key in values)
    shared = [
        f"{SYMBOLS.get(key, key)} {value}"
        for key, value in result["settings"].items()
        if key not in ("then", "rescale")
    ]
    return " ".join([*shared, *names, "/".join(own)]).strip() or "–"


def _ablation(found: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = ["| | expansion | retention | all in one model | paper: expansion; retention |", "|---|---|---|---|---|"]
    for name, paper in ABLATION.items():
        results = [each["composers" if name == "mmer" else "ablation"][name] for each in found]
        cells = [_spread([100 * r["expansion_mean"] for r in results]), _spread([r["retention_mean"] for r in results])]
        cells += [_spread([r["expanded_retention_mean"] for r in results]), "; ".join(paper)]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return rows


def _shares(found: Sequence[Mapping[str, Any]]) -> list[str]:
    masked = [name for name, row in found[0]["composers"].items() if row.get("mask_share")]
    routes = list(found[0]["composers"][masked[0]]["mask_share"])
    rows = [
        [name, *(_spread([100 * each["composers"][name]["mask_share"][route] for each in found]) for route in routes)]
        for name in masked
    ]
    rows.append(["*paper*", MASKS, *[""] * (len(routes) - 1)])
    return _rows(["", *routes], rows)


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
    llm, own = found["storage"]["llm"], found["storage"]["own"]
    return 100 * storage_bits("mmer", count, llm, own) / storage_bits("originals", count, llm, own)


def _forgetting(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Table 4: previous tasks of the same modality, and new ones."""
    head = ["scenario", "MMER, previous / new", "Model Tailor", "fine-tuning", "expert before, new"]
    head += ["MMER, other modalities", "λ of the experts and the new tasks, per seed", "size of the patch, per seed"]
    rows = []
    for name in found[0]["forgetting"]:
        results = [each["forgetting"][name] for each in found]
        cells = [
            _both(
                [r["composed"]["previous"].values() for r in results], [r["composed"]["new"].values() for r in results]
            )
        ]
        for method in ("tailor", "finetune"):
            sides = [[[v[key] for v in r[method].values()] for r in results] for key in ("previous", "new")]
            cells.append(_both(*sides))
        cells.append(_spread([statistics.fmean(r["untouched"].values()) for r in results]))
        cells.append(_spread([r["composed"]["others_mean"] for r in results]))
        cells.append("; ".join(_settings(r["composed"]) for r in results))
        cells.append("; ".join(" ".join(f"{v['share']:g}" for v in r["tailor"].values()) for r in results))
        rows.append([f"{name} ({', '.join(results[0]['tasks'])})", *cells])
    said = "Retention in percent. Previous tasks are those of the modality that learns; new ones are in percent of fine-tuning "
    said += "on them alone. Fine-tuning learns the tasks of one modality one after the other. Model Tailor: one patched expert "
    said += "per modality; of two tasks of one modality both patches, and their mean where they overlap (the paper does not say)."
    paper = [f"{count} new: MMER {mine}, Model Tailor {other}" for count, (mine, other) in FORGETTING.items()]
    return [said, "", *_rows(head, rows), "", f"The paper's Table 4, previous / new tasks: {'; '.join(paper)}."]


def _both(previous: Sequence[Iterable[float]], new: Sequence[Iterable[float]]) -> str:
    return " / ".join(_spread([statistics.fmean(list(values)) for values in side]) for side in (previous, new))


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
        write("mmer-miniworld.md", table(arguments.runs, arguments.seeds))


if __name__ == "__main__":
    main()
