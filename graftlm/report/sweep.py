"""Draw a sweep: what a fine-tune keeps of its own at every value of a setting, and what of its base.

``sweep.svg`` stands alone; ``sweep.html`` holds it with the numbers. Both are drawn from ``sweep.json`` alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from graftlm.core.files import read_json, write_text

__all__ = ["draw", "write_sweep"]

WIDTH, HEIGHT = 980, 410
TOP, BOTTOM = 58, 340

STYLE = """
.sweep { --ink: #16202a; --soft: #5a6772; --line: #dde2e5; --paper: #ffffff; --new: #d55e00; --keep: #0072b2; --ideal: #008a63;
  font: 13px "Inter", "Segoe UI", system-ui, "Helvetica Neue", "Liberation Sans", Arial, sans-serif; background: var(--paper); }
@media (prefers-color-scheme: dark) { .sweep { --ink: #e6ebef; --soft: #9aa7b2; --line: #2c363f; --paper: #192027;
  --new: #f0813a; --keep: #4ba3e3; --ideal: #2fbf92; } }
.sweep text { fill: var(--soft); } .sweep .name { fill: var(--ink); font-weight: 600; } .sweep .strong { fill: var(--ink); }
.sweep .grid { stroke: var(--line); } .sweep .bound { stroke: var(--soft); stroke-dasharray: 2 4; }
.sweep .ideal { fill: var(--ideal); fill-opacity: .15; } .sweep .ideal-name { fill: var(--ideal); font-weight: 600; }
.sweep .picked { stroke: var(--ink); fill: none; } .sweep .upright { stroke: var(--ink); stroke-dasharray: 5 4; }
.sweep .curve { fill: none; stroke-width: 2.2; } .sweep .path { fill: none; stroke: var(--soft); stroke-width: 1.4; }
.sweep .new { stroke: var(--new); } .sweep .new .mark, .sweep .mark.new { fill: var(--new); stroke: none; }
.sweep .keep { stroke: var(--keep); stroke-dasharray: 7 4; } .sweep .mark.keep { fill: var(--keep); stroke: none; }
.sweep .end { fill: var(--paper); stroke-width: 2; } .sweep .end.new { stroke: var(--new); }
.sweep .end.keep { stroke: var(--keep); stroke-dasharray: none; }
.sweep .dot { fill: var(--ink); } .sweep .dot.end { fill: var(--paper); stroke: var(--ink); }
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ title }}</title><style>{{ style }}
main { padding-top: 32px; } figure.card svg { width: 100%; height: auto; display: block; } tr.picked > * { font-weight: 700; }
tr.ideal > * { background: var(--right-bg); } tr.end > * { color: var(--soft); } .about { max-width: 84ch; }
</style></head><body><main>
<h1>{{ title }}</h1>
<p class="lead">{{ lead }}</p>
<figure class="card">{{ figure }}</figure>
<section><h2>Numbers</h2>
<p class="about">{{ about }}</p>
<div class="wide"><table><thead><tr><th scope="col" class="left">{{ setting }}</th><th>new, %</th>
<th>kept, %</th><th>{{ score }}</th>{% for name in tasks %}<th>{{ name }}</th>{% endfor %}
{% if spectrum %}<th>k / r, median</th><th>g₁ / σ₁, median</th>
<th>out of reach</th>{% endif %}</tr></thead><tbody>
{% for row in rows %}<tr class="{{ row.kind }}"><th scope="row">{{ row.name }}</th>
{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
</section>
<section><h2>How it was measured</h2>
<dl class="facts">{% for name, value in facts %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>{% endfor %}</dl>
</section></main></body></html>
"""


@dataclass(frozen=True)
class Scale:
    """Numbers to places."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        if self.high == self.low:
            return (self.start + self.end) / 2
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def write_sweep(folder: Path) -> tuple[Path, Path]:
    """Draw the sweep of a folder.

    Args:
        folder: with ``sweep.json``; ``sweep.svg`` and ``sweep.html`` go beside it.

    Returns:
        The two files.

    Raises:
        RunError: the file is damaged.
    """
    result = read_json(folder / "sweep.json")
    figure = draw(result)
    write_text(folder / "sweep.svg", figure + "\n")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    style = Markup((Path(__file__).parent / "page.css").read_text(encoding="utf-8"))
    page = environment.from_string(PAGE).render(style=style, figure=figure, **_page(result))
    write_text(folder / "sweep.html", page + "\n")
    return folder / "sweep.svg", folder / "sweep.html"


def draw(result: Mapping[str, Any]) -> Markup:
    """Both views of a sweep: new and kept over the setting, and new against kept."""
    title = f"{result['rule']}: {result['setting']} from the base to the fine-tune"
    return Markup(  # every text in the parts went through escape()
        f'<svg xmlns="http://www.w3.org/2000/svg" class="sweep" role="img" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f"<style>{STYLE}</style><title>{escape(title)}</title><desc>{escape(_lead(result))}</desc>"
        f"{_curves(result)}{_against(result)}</svg>"
    )


def _curves(result: Mapping[str, Any]) -> str:
    """Figure 4 of the paper: both abilities over the setting, the ideal region shaded; end points in columns of their own."""
    lines, criteria = result["values"], result["criteria"]
    numbers = [line["value"] for line in lines]
    x = Scale(numbers[0], numbers[-1], 112, 490)  # the first is nearest to the base, whichever way the setting runs
    ticks = _ticks(
        [line[side] for line in [*lines, result["base"], result["tuned"]] for side in ("new", "keep")] + [100.0]
    )
    y = Scale(ticks[0], ticks[-1], BOTTOM, TOP)
    parts = [_text(52, 20, "Ability over the setting", "name", "start")]
    parts.append(
        f'<path class="curve new" d="M52 36H78"/>{_text(84, 40, "new, % of the fine-tune", "strong", "start")}'
    )
    parts.append(
        f'<path class="curve keep" d="M262 36H288"/>{_text(294, 40, "kept, % of the base", "strong", "start")}'
    )
    if result["ideal_region"]:
        left, right = (x(value) for value in result["ideal_region"])
        left, right = min(left, right) - 5, max(left, right) + 5
        parts.append(
            f'<rect class="ideal" x="{left:.1f}" width="{right - left:.1f}" y="{TOP}" height="{BOTTOM - TOP}"/>'
        )
        parts.append(_text((left + right) / 2, TOP + 15, "ideal region", "ideal-name", "middle"))
    parts += [_level(y(tick), 52, 560, "grid") + _text(46, y(tick) + 4, f"{tick:g}", "", "end") for tick in ticks]
    for bound in dict.fromkeys((criteria["least_new"], criteria["least_keep"])):
        if ticks[0] <= bound <= ticks[-1]:
            parts.append(_level(y(bound), 52, 560, "bound"))
    for value in _marked(numbers):
        parts.append(_text(x(value), BOTTOM + 20, f"{value:g}", "", "middle"))
    for end, place in (("base", 72), ("tuned", 542)):
        parts.append(_text(place, BOTTOM + 20, "base" if end == "base" else "fine-tune", "", "middle"))
    parts.append(_text(x((numbers[0] + numbers[-1]) / 2), BOTTOM + 42, result["setting"], "strong", "middle"))
    picked = x(result["picked"]["value"])
    parts.append(f'<line class="upright" x1="{picked:.1f}" x2="{picked:.1f}" y1="{TOP}" y2="{BOTTOM}"/>')
    parts.append(_text(picked, BOTTOM + 60, f"picked {result['picked']['value']:g}", "name", "middle"))
    for side in ("keep", "new"):
        path = "L".join(f"{x(line['value']):.1f} {y(line[side]):.1f}" for line in lines)
        parts.append(f'<path class="curve {side}" d="M{path}"/>')
        for line in lines:
            tip = f"{result['setting']} {line['value']:g}: {side} {line[side]:.1f} %"
            parts.append(_mark(x(line["value"]), y(line[side]), 3.2, f"mark {side}", tip))
        for end, place in (("base", 72), ("tuned", 542)):
            parts.append(
                _mark(place, y(result[end][side]), 4.5, f"end {side}", f"{end}: {side} {result[end][side]:.1f} %")
            )
    return "".join(parts)


def _against(result: Mapping[str, Any]) -> str:
    """New against kept: upwards the fine-tune's ability, to the right the base's."""
    lines, criteria = result["values"], result["criteria"]
    every = [*lines, result["base"], result["tuned"]]
    across = _ticks([line["keep"] for line in every] + [100.0])
    up = _ticks([line["new"] for line in every] + [100.0])
    x, y = Scale(across[0], across[-1], 650, 950), Scale(up[0], up[-1], BOTTOM, TOP)
    parts = [_text(650, 20, "New against kept", "name", "start")]
    left, top = x(max(criteria["least_keep"], across[0])), y(max(criteria["least_new"], up[0]))
    parts.append(
        f'<rect class="ideal" x="{left:.1f}" width="{max(0.0, 950 - left):.1f}" y="{TOP}" height="{max(0.0, top - TOP):.1f}"/>'
    )
    for tick in up:
        parts.append(_level(y(tick), 650, 950, "grid") + _text(644, y(tick) + 4, f"{tick:g}", "", "end"))
    for tick in across:
        place = x(tick)
        parts.append(f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{BOTTOM}"/>')
        parts.append(_text(place, BOTTOM + 20, f"{tick:g}", "", "middle"))
    parts.append(_text(800, BOTTOM + 42, "kept, % of the base", "strong", "middle"))
    parts.append(_text(650, 40, "new, % of the fine-tune", "strong", "start"))
    path = "L".join(f"{x(line['keep']):.1f} {y(line['new']):.1f}" for line in lines)
    parts.append(f'<path class="path" d="M{path}"/>')
    for line in lines:
        tip = f"{result['setting']} {line['value']:g}: new {line['new']:.1f} %, kept {line['keep']:.1f} %"
        parts.append(_mark(x(line["keep"]), y(line["new"]), 3, "dot", tip))
    for end, name in (("base", "base"), ("tuned", "fine-tune")):
        place, height = x(result[end]["keep"]), y(result[end]["new"])
        parts.append(_mark(place, height, 4.5, "dot end", f"{name}: new {result[end]['new']:.1f} %"))
        side, gap = ("end", 4) if place > 880 else ("start", -4)
        parts.append(_text(place + gap, height + (20 if height < 200 else -10), name, "strong", side))
    picked = result["picked"]
    parts.append(_mark(x(picked["keep"]), y(picked["new"]), 8, "picked", f"picked {picked['value']:g}"))
    return "".join(parts)


def _ticks(values: Sequence[float]) -> list[float]:
    """Three to seven round numbers that enclose all values."""
    low, high = min(values), max(values)
    step = next((s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500) if (high - low) / s <= 6), 1000)
    first, last = floor(low / step), ceil(high / step)
    return [float(step * k) for k in range(first, max(last, first + 2) + 1)]


def _marked(values: Sequence[float]) -> list[float]:
    """The values that are written below the axis: at most about seven, the first and the last among them."""
    step = max(1, ceil((len(values) - 1) / 6))
    shown = list(values[: len(values) - 1 : step])
    far = len(values) - 1 - (len(shown) - 1) * step if shown else 0
    if shown and len(shown) > 1 and far < (step + 1) / 2:
        shown.pop()  # too near to the last one
    return [*shown, values[-1]]


def _level(y: float, left: float, right: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _mark(x: float, y: float, radius: float, kind: str, tip: str) -> str:
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escape(tip)}</title></circle>'


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _lead(result: Mapping[str, Any]) -> str:
    picked, setting, region = result["picked"], result["setting"], result["ideal_region"]
    criteria = result["criteria"]
    said = (
        f"{setting} {picked['value']:g} has {picked['new']:.1f} % of what the fine-tune learned and keeps "
        f"{picked['keep']:.1f} % of what the base could; the fine-tune itself keeps {result['tuned']['keep']:.1f} %."
    )
    if region is None:
        return (
            f"{said} No value has both {criteria['least_new']:g} % of the new and {criteria['least_keep']:g} % of the old: there "
            f"is no ideal region, and the best {_score(result)} is picked."
        )
    where = f"at {region[0]:g} alone" if region[0] == region[1] else f"from {region[0]:g} to {region[1]:g}"
    return f"{said} The ideal region is {where}."


def _score(result: Mapping[str, Any]) -> str:
    return "harmonic mean" if result["criteria"]["score"] == "harmonic" else "sum"


def _page(result: Mapping[str, Any]) -> dict[str, Any]:
    criteria, region = result["criteria"], result["ideal_region"]
    tasks = [*result["sets"]["new"], *result["sets"]["keep"]]
    spectrum = any(line["spectrum"] for line in result["values"])
    inside = sorted(region) if region else None
    rows = []
    for name, line in (
        ("base", result["base"]),
        *((None, each) for each in result["values"]),
        ("fine-tune", result["tuned"]),
    ):
        kind = "end" if name else ""
        if name is None and inside and inside[0] <= line["value"] <= inside[1]:
            kind = "ideal"
        if name is None and line["value"] == result["picked"]["value"]:
            kind += " picked"
        cells = [f"{line[key]:.1f}" for key in ("new", "keep", "score")]
        cells += [f"{line['scores'][task]['value']:.4f}" for task in tasks]
        if spectrum:
            found = line["spectrum"]
            reached = found and found["reached"]
            cells += [f"{found['window_share'][1]:.3f}", f"{reached[1]:.3f}"] if reached else ["", ""]
            cells.append(f"{found['out_of_reach']} of {found['tensors']}" if reached else "")
        rows.append({"name": name or f"{line['value']:g}", "kind": kind, "cells": cells})
    about = (
        f"The ideal region is [α2, α1]: up to α1 ({_or_none(result['general_stable_to'])}) every value keeps at least "
        f"{criteria['least_keep']:g} % of the base's score, and from α2 ({_or_none(result['task_stable_from'])}) on every value "
        f"has at least {criteria['least_new']:g} % of the fine-tune's; edges are values of the grid. The paper's figure draws "
        f"the regions without saying when an ability counts as stable."
    )
    settings = ", ".join(f"{key} {value}" for key, value in result["settings"].items())
    facts = [
        ("rule", f"{result['rule']}{f', {settings}' if settings else ''}"),
        ("base", result["inputs"]["base"]),
        ("fine-tune", result["inputs"]["tuned"]),
        *(
            (
                side,
                "; ".join(
                    f"{name}: {each['items']} items, {each['metric']}" for name, each in result["sets"][side].items()
                ),
            )
            for side in ("new", "keep")
        ),
        ("picked by", f"the best {_score(result)}{' inside the ideal region' if region else ''}"),
    ]
    return {
        "title": f"{result['rule']}: {result['setting']}",
        "lead": _lead(result),
        "about": about,
        "setting": result["setting"],
        "score": _score(result),
        "tasks": tasks,
        "spectrum": spectrum,
        "rows": rows,
        "facts": facts,
    }


def _or_none(value: float | None) -> str:
    return "no value" if value is None else f"{value:g}"
