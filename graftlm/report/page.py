"""Write the page: one run explained, or several runs side by side.

The page is one file: styles, script, figures and media are inside, and its content security policy forbids it to
ask for anything else. All text of a run is escaped, so a model that answers with markup only shows markup.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from math import isfinite
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from graftlm.core.errors import RunError
from graftlm.core.files import write_text
from graftlm.report import composing, figures, tables
from graftlm.report.comparison import Comparison, compare_runs
from graftlm.report.figures import Series
from graftlm.report.media import Budget, Shown
from graftlm.report.reading import Run, read_run
from graftlm.report.samples import TaskSamples, choose

__all__ = ["LARGEST", "compare", "render", "write"]

LARGEST = 6_000_000
"""Bytes a page may have."""

SIZES = ((4, 3_600_000), (2, 1_500_000), (1, 500_000), (0, 0))
"""Samples per task and characters of media, tried in turn until the page is small enough."""

SPECTRA = 6
"""Spectra shown per method and stage."""

ITEMS = 48
"""Samples on a page, over all tasks."""


def write(run_folder: Path, out: Path | None = None) -> Path:
    """Write the report of one run, finished or not.

    Args:
        out: the file; ``report.html`` in the run folder if not given.

    Returns:
        The file that was written.

    Raises:
        RunError: the folder is no run folder, or one of its files is damaged.
    """
    run = read_run(run_folder)
    out = out or run_folder / "report.html"
    for per_task, budget in SIZES:
        text = render(_run_page(run, per_task, budget))
        if len(text.encode()) <= LARGEST:
            break
    write_text(out, text)
    return out


def compare(run_folders: Sequence[Path], out: Path) -> Path:
    """Write one page about several runs (seeds, orders): means, spreads, and what differs between them.

    Raises:
        RunError: fewer than two runs, or one of the folders is no run folder.
    """
    if len(run_folders) < 2:
        raise RunError(f"{len(run_folders)} run to compare - two or more were expected - name their folders.")
    comparison = compare_runs([read_run(folder) for folder in run_folders])
    write_text(out, render(_comparison_page(comparison)))
    return out


def render(values: Mapping[str, Any], template: str = "page.html") -> str:
    """A whole page: the values in a template of this folder, with style and script inside."""
    here = Path(__file__).parent
    environment = Environment(
        autoescape=True, loader=FileSystemLoader(here), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = (here / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = (here / "page.css").read_text(encoding="utf-8")
    # Markup is for our own two files only; a run's text is escaped.
    parts = {"style": Markup(style), "script": Markup(script), "script_hash": digest}
    return environment.get_template(template).render(**parts, **values)


def _run_page(run: Run, per_task: int, budget: int) -> dict[str, Any]:
    indices = {method.name: i for i, method in enumerate(run.methods)}
    tasks = sum(map(len, run.tasks.values())) + len(run.probes)
    blind = tables.blind_gains(run)
    floor = tables.mean_std(blind)[0] if blind else None
    rows = [
        (Series(m.name, indices[m.name], m.backward), m.mean, m.std if m.std is not None and isfinite(m.std) else 0.0)
        for m in tables.ranked(run)
        if m.mean is not None
    ]
    chosen = choose(run, min(per_task, max(1, ITEMS // max(1, tasks))) if per_task else 0)
    page = {
        "title": run.name,
        "lead": _lead(run),
        "warning": _warning(run),
        "facts": _facts(run),
        "comparison": None,
        "composed": [],
        "run": run,
        "stages": run.order,
        "ranking": figures.ranking("Mean backward gain per method", _speak(run), rows, blind=floor) if rows else "",
        "caption": "Mean backward gain, % of the experts; the bar is the spread over stages",
        "results": tables.result_rows(run),
        "curves": [
            ("Backward gain", "What is kept of the earlier stages", _curves(run, "backward", floor)),
            ("Forward gain", "What is reached on the stage just learned", _curves(run, "forward", None)),
        ],
        "matrices": [tables.matrix(run, method) for method in run.methods if method.scores],
        "costs": tables.cost_rows(run),
        "shift": _shift(run),
        "spectra": _spectra(run),
        "samples": _with_media(chosen, Budget(budget), run.folder),
    }
    if not run.composing:
        return page
    return page | {
        "lead": composing.lead(run),
        "composed": composing.sections(run),
        "ranking": composing.ranking(run),
        "caption": "Mean retention, % of the experts; the bar is the spread over experts",
    }


def _comparison_page(comparison: Comparison) -> dict[str, Any]:
    count = len(comparison.runs)
    orders = "one order" if len(comparison.orders) == 1 else f"{len(comparison.orders)} orders"
    groups = []
    for group in comparison.groups:
        kinds = (("Backward gain", group.backward), ("Forward gain", group.forward))
        view = [v for _, lines in kinds for line in lines for v in line.values if v is not None]
        figure = [
            (kind, figures.curves(f"{kind} per stage, {group.title}", _describe(lines), group.stages, lines, view=view))
            for kind, lines in kinds
        ]
        groups.append((group.title, figure))
    return {
        "title": " / ".join(dict.fromkeys(run.name for run in comparison.runs)),
        "lead": f"{count} runs, {orders}. Numbers are means over runs ± their sample standard deviation.",
        "warning": ", ".join(run.folder.name for run in comparison.runs if not run.finished),
        "facts": [],
        "comparison": comparison,
        "composed": composing.compared(comparison.runs),
        "curve_groups": groups,
        "caption": "",
        "run": None,
        "ranking": "",
        "samples": [],
    }


def _curves(run: Run, kind: str, floor: float | None) -> Markup:
    lines = [Series(m.name, i, m.backward if kind == "backward" else m.forward) for i, m in enumerate(run.methods)]
    view = [value for m in run.methods for value in (*m.backward, *m.forward)] + list(tables.blind_gains(run))
    title = f"{kind.capitalize()} gain per stage"
    return figures.curves(title, _describe(lines), run.order, lines, blind=floor, view=view)


def _shift(run: Run) -> Markup:
    """Language shift per stage, empty where it was not measured."""
    lines = [Series(m.name, i, m.shift) for i, m in enumerate(run.methods) if m.shift]
    if not lines:
        return Markup("")
    said = "; ".join(f"{line.name}: {', '.join(tables.number(v, 3) for v in line.values)}" for line in lines)
    about = f"Distance of hidden states to the start model, stage by stage. {said}."
    return figures.curves("Language shift per stage", about, run.order, lines, unit="")


def _spectra(run: Run) -> list[tuple[str, list[tuple[str, str, Markup]]]]:
    """Per method and stage, small spectra of what was folded: (name, note, figure)."""
    found = []
    for method in run.methods:
        for stage, spectra in method.spectra.items():
            each = []
            for one in spectra[:SPECTRA]:
                name, k, reached = str(one.get("name", "")), one.get("k"), one.get("reached")
                notes = [f"k = {k}"] if isinstance(k, int) else []
                notes += [f"reached {reached:.3g}"] if isinstance(reached, int | float) else []
                svg = figures.spectrum(
                    f"{name}, {method.name} after {stage}",
                    one.get("before", ()),
                    one.get("after", ()),
                    k if isinstance(k, int) else None,
                )
                each += [(name, ", ".join(notes), svg)] if svg else []
            if each:
                found.append((f"{method.name}, {stage}", each))
    return found


def _describe(lines: Sequence[Series]) -> str:
    """The curves as a sentence, for those who do not see them."""
    said = [f"{line.name}: {', '.join(tables.number(v, 1) for v in line.values)}" for line in lines if line.values]
    return f"Percent of the experts, stage by stage. {'; '.join(said)}."


def _speak(run: Run) -> str:
    return "; ".join(f"{m.name}: {tables.number(m.mean)} ± {tables.number(m.std)} %" for m in tables.ranked(run))


def _lead(run: Run) -> str:
    methods = tables.ranked(run)
    if run.composes:
        return "Nothing is composed yet."
    if not methods:
        return "No stage of a method is finished yet."
    best, worst = methods[0], methods[-1]
    stages = f"{len(best.backward)} stages" if len(best.backward) != 1 else "1 stage"
    text = f"{best.name} keeps {tables.number(best.mean, 1)} % of what experts reach, on average over {stages}"
    return f"{text}; {worst.name} keeps {tables.number(worst.mean, 1)} %." if worst is not best else f"{text}."


def _warning(run: Run) -> str:
    if run.finished:
        return ""
    if run.composes:
        return f"{len(run.experts)} experts measured; compositions are shown when all are"
    states = [f"{m.name} {len(m.scores)} of {len(run.order)} stages" for m in run.methods]
    return "; ".join(states) or "no method has begun"


def _facts(run: Run) -> list[tuple[str, str]]:
    model = run.settings.get("model")
    device = [run.environment[key] for key in ("device", "gpu", "machine") if key in run.environment]
    cpus = run.environment.get("cpus")
    pairs = [
        ("seed", run.settings.get("seed")),
        ("LLM", model.get("llm") if isinstance(model, Mapping) else None),
        ("when", _when(run)),
        ("graftlm", run.environment.get("graftlm")),
        ("torch", run.environment.get("torch")),
        ("python", run.environment.get("python")),
        ("machine", ", ".join([*device, *([f"{cpus} CPUs"] if cpus else [])])),
    ]
    return [(name, str(value)) for name, value in pairs if value not in (None, "")]


def _when(run: Run) -> str:
    try:
        start, end = datetime.fromisoformat(run.started), datetime.fromisoformat(run.ended)
    except ValueError:
        return ""
    return f"{start:%Y-%m-%d %H:%M} UTC, {tables.duration((end - start).total_seconds())}"


def _with_media(
    samples: Sequence[TaskSamples], budget: Budget, root: Path
) -> list[tuple[TaskSamples, list[tuple[Any, list[tuple[Shown, Markup]]]]]]:
    """Every item with its media; a sound comes with its waveform."""
    pages = []
    for task in samples:
        items = []
        for item in task.items:
            shown = [budget.show(media, root) for media in item.media]
            items.append((item, [(s, figures.waveform(s.peaks, s.name) if s.peaks else Markup("")) for s in shown]))
        pages.append((task, items))
    return pages
