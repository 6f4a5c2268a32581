"""The page about a comparison: methods x orders x seeds, from ``comparison.json`` alone, as HTML and as Markdown.

Both say the same. What an interval cannot tell from 0 is not called a difference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from graftlm.core.errors import RunError
from graftlm.core.files import read_json, write_text
from graftlm.report import figures
from graftlm.report.figures import Series
from graftlm.report.page import render
from graftlm.report.tables import DASH, Cell, duration, memory, number, spread

__all__ = ["Sheet", "lead", "sheets", "write"]

MINUS = "−"

FEW = 5
"""Seeds below which an interval over them says too little."""

CURVES = {
    "backward": ("Backward gain", "What is kept of the earlier stages", " %", "expert"),
    "forward": ("Forward gain", "What is reached on the stage just learned", " %", "expert"),
    "ability": ("General ability", "Probes, percent of the start model's scores", " %", "start"),
    "shift": ("Language shift", "Mean L2 distance of plain text's hidden states to the start model", "", ""),
}
"""Kind -> title, what it shows, unit, and what 100 is."""


@dataclass(frozen=True)
class Sheet:
    """One table: a row is its name, a note, and cells."""

    key: str
    title: str
    about: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, str, tuple[Cell, ...]], ...]
    heat: bool = False
    folded: bool = False
    charts: tuple[tuple[str, str, Markup], ...] = field(default=())


def write(folder: Path) -> tuple[Path, Path]:
    """Write ``comparison.html`` and ``comparison.md`` beside ``comparison.json``.

    Raises:
        RunError: the folder holds no comparison, or the file is damaged.
    """
    path = folder / "comparison.json"
    if not path.is_file():
        raise RunError(f"{path}: missing; a folder of `graftlm compare --out` that came to its end is expected.")
    facts = read_json(path)
    html, markdown = folder / "comparison.html", folder / "comparison.md"
    write_text(html, render(_page(facts), "grid.html"))
    write_text(markdown, _markdown(facts))
    return html, markdown


def lead(facts: Mapping[str, Any]) -> str:
    """What the differences say, in sentences; what is not told apart is said to be so."""
    against, label = facts["against"], _overall(facts)
    found = facts["differences"][label]
    many = f"{_count(len(facts['orders']), 'order')} × {_count(len(facts['seeds']), 'seed')}"
    if not found:
        return f"{many}. Nothing is compared with {against} yet."
    better = [_gap(name, each) for name, each in found.items() if each["told_apart"] and each["value"] > 0]
    worse = [_gap(name, each) for name, each in found.items() if each["told_apart"] and each["value"] < 0]
    even = [name for name, each in found.items() if not each["told_apart"]]
    parts = [f"better: {', '.join(better)}"] if better else []
    parts += [f"worse: {', '.join(worse)}"] if worse else []
    parts += [f"not told apart: {', '.join(even)}"] if even else []
    text = (
        f"{many}. In percent of the experts over all stages after the last one, against {against}: {'; '.join(parts)}."
    )
    if len(facts["seeds"]) == 1:
        text += " One seed: intervals speak of the test items, not of how much training varies."
    elif len(facts["seeds"]) < FEW:
        text += " With so few seeds intervals are rather too narrow: training varies more than they can know."
    return text


def _gap(name: str, each: Mapping[str, Any]) -> str:
    return f"{name} by {abs(each['value']):.1f} points"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _overall(facts: Mapping[str, Any]) -> str:
    return "all" if "all" in facts["table"] else next(iter(facts["table"]))


def _title(facts: Mapping[str, Any], label: str) -> str:
    if label == "all":
        return "All orders"
    order = facts["orders"].get(label)
    return f"Order {label}: {' → '.join(order['stages'])}" if order else f"Order {label}"


def sheets(facts: Mapping[str, Any]) -> list[Sheet]:
    """All tables, in the order of reading."""
    labels = [label for label in ("all", *facts["orders"]) if label in facts["table"]]
    made = [_results(facts, label) for label in labels]
    made.append(_differences(facts, labels))
    made += [_raw(facts, label) for label in facts["raw"] if facts["raw"][label]]
    made.append(_costs(facts))
    for label, raw in facts["raw"].items():
        made += [_matrix(facts, label, name, raw["matrix"][name]) for name in raw.get("matrix", {})]
    if facts.get("tuning"):
        made.append(_tuning(facts["tuning"]))
    return [sheet for sheet in made if sheet.rows]


def _results(facts: Mapping[str, Any], label: str) -> Sheet:
    table = facts["table"][label]
    keys = [key for key in facts["metrics"] if any(row[key] for row in table.values())]
    best = {key: _best([row[key]["mean"] for row in table.values() if row[key]], facts["metrics"][key]) for key in keys}
    failed = {each["name"] for each in facts["failed"] if each["kind"] == "method"}
    ranks = facts["ranks"] if label == _overall(facts) else {}
    rows = []
    for name, row in table.items():
        cells = [_mean(row[key], best[key]) for key in keys]
        if ranks:
            rank = ranks.get(name)
            cells.append(Cell(number(rank["mean"] if rank else None), title=f"{rank['blocks']} runs" if rank else ""))
        note = _mix(facts["methods"][name], name)
        if row["runs"] < row["of"]:
            state = "failed" if name in failed else "not run"
            note = f"{row['runs']} of {row['of']} runs, the rest {state}" + (f"; {note}" if note else "")
        rows.append((name, note, tuple(cells)))
    columns = [facts["metrics"][key]["title"] for key in keys] + (["rank"] if ranks else [])
    about = ""
    if label == _overall(facts):
        said = " ".join(f"{facts['metrics'][key]['title']}: {facts['metrics'][key]['about']}." for key in keys)
        about = f"Percent of the experts: mean over runs ± sample standard deviation. {said}"
        about += f" FM counts from the {facts['fm']}." if "fm" in keys else ""
        about += " Rank: by ACC, mean over the runs that all of them finished." if ranks else ""
        about += " The best mean is marked; whether it is better is for the intervals below to say."
    key = f"result-{label}"
    return Sheet(key, _title(facts, label), about, tuple(columns), tuple(rows))


def _best(means: Sequence[float], metric: Mapping[str, Any]) -> float | None:
    """The best of several; equal ones have no best."""
    return None if len(set(means)) < 2 else (max if metric["large"] else min)(means)


def _mean(entry: Mapping[str, Any] | None, best: float | None = None, digits: int = 1) -> Cell:
    if entry is None:
        return Cell(DASH)
    about = f"{_count(entry['n'], 'run')}, from {entry['low']:.{digits}f} to {entry['high']:.{digits}f}"
    text = number(entry["mean"], digits).replace("-", MINUS)
    return Cell(text, below=spread(entry["std"], digits), title=about, best=best is not None and entry["mean"] == best)


def _mix(entries: Sequence[Any], name: str) -> str:
    parts = []
    for entry in entries:
        if isinstance(entry, Mapping):
            for ingredient, settings in entry.items():
                pairs = ", ".join(f"{key}={value}" for key, value in (settings or {}).items())
                parts.append(f"{ingredient}({pairs})" if pairs else str(ingredient))
        else:
            parts.append(str(entry))
    text = " + ".join(parts)
    return "" if text.replace(" ", "") == name else text


def _differences(facts: Mapping[str, Any], labels: Sequence[str]) -> Sheet:
    rows = []
    names = [name for name in facts["methods"] if any(name in facts["differences"][label] for label in labels)]
    for name in names:
        cells = []
        for label in labels:
            each = facts["differences"][label].get(name)
            cells.append(_difference(each) if each else Cell(DASH))
        rows.append((name, "", tuple(cells)))
    about = (
        f"ACC minus that of {facts['against']}, in percent points, paired item by item in the runs that both finished, with "
        "95 % bootstrap intervals over test items"
        + (" and seeds" if len(facts["seeds"]) > 1 else "; one seed, so they say nothing about training")
        + ". Where the interval contains 0 the two are not told apart, whatever the difference."
    )
    columns = tuple("all orders" if label == "all" else label for label in labels)
    return Sheet("differences", f"Against {facts['against']}", about, columns, tuple(rows))


def _difference(each: Mapping[str, Any]) -> Cell:
    verdict = ("better" if each["value"] > 0 else "worse") if each["told_apart"] else "not told apart"
    interval = f"{each['low']:+.1f} to {each['high']:+.1f}".replace("-", MINUS)
    about = f"{_count(each['runs'], 'run')}, {_count(each['seeds'], 'seed')}"
    return Cell(f"{each['value']:+.1f}".replace("-", MINUS), below=f"{interval}, {verdict}", title=about)


def _raw(facts: Mapping[str, Any], label: str) -> Sheet:
    raw = facts["raw"][label]
    names = [task for tasks in raw["tasks"].values() for task in tasks] + list(raw["probes"])
    said = {"start": "before all stages (zero-shot)", "blind": "the expert, shown other samples' media", "expert": ""}

    def cells(row: Mapping[str, Any]) -> tuple[Cell, ...]:
        return tuple(_mean(row.get(task), None, _digits(row.get(task))) for task in names)

    rows = [(name, said[name], cells(row)) for name, row in raw["bounds"].items()]
    rows += [(name, "", cells(row)) for name, row in raw["methods"].items()]
    columns = tuple(f"{task} ({raw['units'][task]})" if task in raw["units"] else task for task in names)
    about = (
        "Scores as they are, after the last stage, mean over seeds ± sample standard deviation. Metrics in brackets."
    )
    return Sheet(f"raw-{label}", f"Raw scores, order {label}", about, columns, tuple(rows))


def _digits(entry: Mapping[str, Any] | None) -> int:
    return 1 if entry is not None and abs(entry["mean"]) >= 2 else 3


def _matrix(facts: Mapping[str, Any], label: str, name: str, matrix: Sequence[Sequence[float | None]]) -> Sheet:
    stages = facts["orders"][label]["stages"]
    labels = [f"{i} {stage}" for i, stage in enumerate(stages, 1)] if len(matrix) == len(stages) else ["all at once"]
    rows = [(after, "", tuple(map(_shaded, row))) for after, row in zip(labels, matrix, strict=True)]
    about = "Rows: after which stage; columns: of which stage's tasks. Percent of the expert, mean over seeds."
    title = f"{name}, order {label}"
    return Sheet(f"matrix-{label}-{name}", title, about, tuple(stages), tuple(rows), heat=True, folded=True)


def _shaded(value: float | None) -> Cell:
    if value is None:
        return Cell(DASH)
    ratio = value / 100
    return Cell(number(value, 1), shade=max(-1.0, ratio - 1) if ratio < 1 else min(1.0, 2 * (ratio - 1)))


def _costs(facts: Mapping[str, Any]) -> Sheet:
    rows = []
    for name, cost in facts["cost"].items():
        relative = cost["relative"]
        acc = facts["table"][_overall(facts)][name]["acc"]
        cells = (
            Cell(number(acc["mean"] if acc else None, 1)),
            Cell(duration(cost["seconds"])),
            Cell(duration(cost["cpu_seconds"])),
            Cell(DASH if relative is None else f"{relative:.2f} ×"),
            Cell(memory(cost["peak_memory_bytes"])),
            Cell(f"{cost['parameters']:,.0f}".replace(",", "\u202f") if cost["parameters"] else DASH),
            Cell(memory(cost["checkpoint_bytes"])),
        )
        rows.append((name, "", cells))
    columns = ("ACC", "time", "processor time", "of fine-tuning", "peak memory", "trained parameters", "checkpoint")
    about = (
        "Training only, over all stages, mean over runs. A stage that several share was learned once and counts for each. "
        "Relative cost is of processor time, where plain fine-tuning is compared too. Trained parameters: the most that move in "
        "any phase. Checkpoint: all files of the last one."
    )
    return Sheet("cost", "Cost beside quality", about, columns, tuple(rows))


def _tuning(tuning: Mapping[str, Any]) -> Sheet:
    rows = []
    for method, found in tuning["methods"].items():
        for index, trial in enumerate(found["trials"]):
            chosen = index == found["chosen"] and trial["score"] is not None
            settings = ", ".join(f"{key}={value}" for key, value in trial["settings"].items()) or "nothing to tune"
            values = [trial[key] for key in ("score", "backward", "forward")]
            note = "failed" if trial["failed"] else "chosen" if chosen else ""
            cells = (Cell(settings), *(Cell(number(value, 1)) for value in values), Cell(note, best=chosen))
            rows.append((method if index == 0 else "", "", cells))
    about = (
        f"At most {tuning['budget']} candidates per method, the same number for each that has something to tune; seed "
        f"{tuning['seed']}, order {tuning['order']}, split {tuning['split']}. Score: {tuning['objective']}."
    )
    return Sheet("tuning", "Chosen settings", about, ("settings", "score", "backward", "forward", ""), tuple(rows))


def _page(facts: Mapping[str, Any]) -> dict[str, Any]:
    groups = []
    for label, kinds in facts["curves"].items():
        charts = [(CURVES[kind][0], CURVES[kind][1], _curve(facts, label, kind)) for kind in kinds]
        groups.append((_title(facts, label), charts))
    table = facts["table"][_overall(facts)]
    ranked = sorted(
        (
            (Series(name, index, ()), table[name]["acc"]["mean"], table[name]["acc"]["std"] or 0.0)
            for index, name in enumerate(facts["methods"])
            if table[name]["acc"]
        ),
        key=lambda row: -row[1],
    )
    spoken = "; ".join(f"{line.name}: {mean:.1f} ± {std:.1f} %" for line, mean, std in ranked)
    every = sheets(facts)
    return {
        "title": facts["name"],
        "lead": lead(facts),
        "facts": _facts(facts),
        "failed": facts["failed"],
        "code": facts.get("code", []),
        "ranking": figures.ranking("Mean of all stages after the last one", spoken, ranked) if ranked else "",
        "results": [sheet for sheet in every if sheet.key.startswith("result-")],
        "others": [sheet for sheet in every if not sheet.key.startswith(("result-", "matrix-"))],
        "matrices": [sheet for sheet in every if sheet.key.startswith("matrix-")],
        "curves": groups,
        "runs": facts["runs"],
        "methods": [(name, _mix(entries, name) or name) for name, entries in facts["methods"].items()],
    }


def _curve(facts: Mapping[str, Any], label: str, kind: str) -> Markup:
    title, about, unit, rule = CURVES[kind]
    lines = []
    for index, name in enumerate(facts["methods"]):
        at = facts["curves"][label][kind].get(name)
        if at:
            pick = [[None if each is None else each[key] for each in at] for key in ("mean", "low", "high")]
            lines.append(Series(name, index, *pick))
    said = "; ".join(f"{line.name}: {', '.join(number(value, 2) for value in line.values)}" for line in lines)
    stages = facts["orders"][label]["stages"]
    return figures.curves(f"{title}, order {label}", f"{about}. {said}.", stages, lines, rule=rule, unit=unit)


def _facts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    limit = f", at most {facts['limit']} items per task" if facts["limit"] else ""
    return [
        ("methods", str(len(facts["methods"]))),
        ("orders", ", ".join(facts["orders"])),
        ("seeds", ", ".join(map(str, facts["seeds"]))),
        *facts.get("settings", {}).items(),
        ("measured on", f"{facts['split']}{limit}"),
        ("against", facts["against"]),
    ]


def _markdown(facts: Mapping[str, Any]) -> str:
    lines = [f"# {facts['name']}: {_count(len(facts['methods']), 'method')}", "", lead(facts), ""]
    lines += [f"- {name}: {value}" for name, value in _facts(facts)]
    lines += [f"- `{name}`: {_mix(entries, name) or name}" for name, entries in facts["methods"].items()]
    if facts["failed"]:
        lines += ["", f"**{_count(len(facts['failed']), 'cell')} failed:**", ""]
        lines += [
            f"- {each['run']}, {each['kind']} {each['name']}: {_line(each['message'])}" for each in facts["failed"]
        ]
    if len(facts.get("code", [])) > 1:
        lines += ["", f"Cells were learned by {len(facts['code'])} versions of the code."]
    for sheet in sheets(facts):
        lines += ["", f"## {sheet.title}", "", *([sheet.about, ""] if sheet.about else [])]
        lines.append("| | " + " | ".join(sheet.columns) + " |")
        lines.append("|---" + "|---:" * len(sheet.columns) + "|")
        for name, note, cells in sheet.rows:
            first = f"{name} ({note})" if note and sheet.key.startswith(("result", "raw")) and "runs" in note else name
            lines.append(f"| {_line(first)} | " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines) + "\n"


def _cell(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.best else cell.text
    if cell.below.startswith("±"):
        return f"{text} {cell.below}"
    return f"{text} ({cell.below})" if cell.below else text


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
