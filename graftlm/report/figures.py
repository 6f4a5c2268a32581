"""Figures as SVG text: gain curves, a ranking of methods, spectra, a waveform.

Colours are CSS variables of the page (``--c0`` ...: a colour-blind safe palette, one set for light and one for
dark), so a figure follows the page. A series is told apart by colour, marker and dash together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, isfinite, log10

from markupsafe import Markup, escape

__all__ = ["Series", "curves", "ranking", "spectrum", "waveform"]

COLOURS = 8
DASHES = ("none", "7 4", "2 4")
MARKERS = (  # drawn around (0, 0)
    '<circle r="4.4"/>',
    '<rect x="-4" y="-4" width="8" height="8"/>',
    '<path d="M0 -5.4L5 3.6H-5Z"/>',
    '<path d="M0 -5.6L5.6 0L0 5.6L-5.6 0Z"/>',
    '<path d="M0 5.4L5 -3.6H-5Z"/>',
)


@dataclass(frozen=True)
class Series:
    """One line of a figure.

    Attributes:
        index: place in the palette; a method keeps its index over all figures of a page.
        values: one per stage; None where there is nothing yet.
        low, high: the spread around each value (over runs), if any; as long as values, or empty.
    """

    name: str
    index: int
    values: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()

    @property
    def last(self) -> float:
        """The last known value; only for a series that has one."""
        return _known(self.values)[-1]


@dataclass(frozen=True)
class _Frame:
    """Where the plot sits in the drawing: stage numbers to x, percent to y."""

    left: float
    right: float
    top: float
    bottom: float
    stages: int
    ticks: Sequence[float]

    def x(self, stage: int) -> float:
        if self.stages < 2:
            return (self.left + self.right) / 2
        return self.left + stage / (self.stages - 1) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0]) * (self.bottom - self.top)


def curves(
    title: str,
    description: str,
    stages: Sequence[str],
    series: Sequence[Series],
    *,
    blind: float | None = None,
    view: Sequence[float] = (),
    numbered: bool = True,
    rule: str = "expert",
    unit: str = " %",
) -> Markup:
    """Gain per stage, one line per method, each named at its end.

    Args:
        rule: what 100 is; empty draws no line there.
        unit: of the values; one that is no percentage has no 100 to compare with.
        numbered: whether stages are counted below the axis, beside their names.
        blind: percent that a model reaches without its media; a dotted line.
        view: further values that the axis encloses, so that figures side by side have one scale.
    """
    shown = [line for line in series if _known(line.values)]
    values = [value for line in shown for value in _known([*line.values, *line.low, *line.high])]
    values += _known([*view, blind])
    room = 34 + 7.3 * max((len(_short(line.name)) for line in shown), default=0)
    percent = unit.strip() == "%"
    ticks = _ticks([*values, 100.0]) if percent else _fine_ticks([*values, 0.0])
    frame = _Frame(56, 560 - room, 18, 282, len(stages), ticks)
    parts = [_axes(frame, stages, numbered, unit)]
    if percent and rule:
        parts.append(_rule(frame, 100, rule))
    if blind is not None:
        parts.append(_rule(frame, blind, "blind"))
    ends = _spread_out([frame.y(line.last) for line in shown], frame.top, frame.bottom)
    parts += [_curve(frame, line, stages, end, unit) for line, end in zip(shown, ends, strict=True)]
    return _svg("curves", 560, 326, title, description, parts)


def ranking(
    title: str, description: str, rows: Sequence[tuple[Series, float, float]], *, blind: float | None = None
) -> Markup:
    """Mean gain per method as a dot with its spread: rows of (series, mean, spread), best first."""
    left = 26 + 7.3 * max((len(_short(line.name)) for line, _, _ in rows), default=6)
    bottom = 8 + 27.0 * len(rows)
    ticks = _ticks([0.0, 100.0, *(mean + spread for _, mean, spread in rows if isfinite(mean + spread))])

    def x(value: float) -> float:
        return left + (min(max(value, ticks[0]), ticks[-1]) - ticks[0]) / (ticks[-1] - ticks[0]) * (510 - 56 - left)

    def upright(value: float, kind: str) -> str:
        return f'<line class="{kind}" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="8" y2="{bottom}"/>'

    parts = []
    for tick in ticks:
        parts.append(upright(tick, "expert" if tick == 100 else "grid"))
        parts.append(_text(x(tick), bottom + 17, f"{tick:g}", "tick", "middle"))
    if blind is not None:
        parts.append(upright(blind, "blind"))
    for number, (line, mean, spread) in enumerate(rows):
        y = 8 + 27 * (number + 0.5)
        parts.append(
            f"{_open(line)}<title>{escape(line.name)}: {mean:.2f} ± {spread:.2f} %</title>"
            f"{_text(left - 14, y + 4.5, _short(line.name), 'name', 'end')}"
            f'<line class="spread" x1="{x(mean - spread):.1f}" x2="{x(mean + spread):.1f}" y1="{y}" y2="{y}"/>'
            f"{_marker(line, x(mean), y)}{_text(508, y + 4.5, f'{mean:.1f}', 'value', 'end')}</g>"
        )
    return _svg("ranking", 510, bottom + 24, title, description, parts)


def waveform(peaks: Sequence[float], name: str) -> Markup:
    """The loudness of a clip over time: one bar per peak (0 to 1)."""
    step = 240 / max(1, len(peaks))
    heights = [max(0.8, 28 * min(1.0, peak)) for peak in peaks]
    bars = "".join(f"M{(i + 0.5) * step:.1f} {28 - tall:.1f}V{28 + tall:.1f}" for i, tall in enumerate(heights))
    path = f'<path d="{bars}" stroke-width="{step * 0.6:.1f}"/>'
    return _svg("waveform", 240, 56, f"Waveform of {name}", "Loudness over time.", [path])


def spectrum(name: str, before: Sequence[float], after: Sequence[float], k: int | None = None) -> Markup:
    """Singular values of an update, before and after it was folded, largest first, on a logarithmic axis.

    Args:
        k: how many of them the folding took for the leading ones; an upright line.
    """
    known = [value for value in (*before, *after) if value > 0 and isfinite(value)]
    if not known:
        return Markup("")
    high, low = ceil(log10(max(known))), max(floor(log10(min(known))), ceil(log10(max(known))) - 6)
    low = min(low, high - 1)
    count = max(len(before), len(after))

    def place(index: int, value: float) -> str:
        level = min(max(log10(value), low), high) if value > 0 else low
        return f"{38 + (index + 0.5) / count * 196:.1f} {118 - (level - low) / (high - low) * 106:.1f}"

    parts = []
    for power in range(low, high + 1):
        y = 118 - (power - low) / (high - low) * 106
        parts.append(f'<line class="grid" x1="38" x2="234" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(34, y + 4, f"1e{power}", "tick", "end"))
    if k is not None and 0 < k < count:
        x = 38 + k / count * 196
        parts.append(f'<line class="blind" x1="{x:.1f}" x2="{x:.1f}" y1="12" y2="118"/>')
    for index, values in enumerate((before, after)):
        points = "L".join(place(i, value) for i, value in enumerate(values) if isfinite(value))
        if points:
            dash = DASHES[1 - index]
            parts.append(f'<path class="curve" style="--c:var(--c{index});--dash:{dash}" d="M{points}"/>')
    said = f"{count} singular values, from {max(known):.3g} down to {min(known):.3g}; dashed before, solid after."
    return _svg("spectrum", 240, 126, name, said, parts)


def _fine_ticks(values: Sequence[float]) -> list[float]:
    """Three to seven round numbers of any size that enclose all values."""
    low, high = min(values), max(values)
    size = 10.0 ** floor(log10((high - low) or 1.0))
    step = next(s * size for s in (0.1, 0.2, 0.5, 1, 2) if (high - low) / (s * size) <= 6.5)
    first, last = floor(low / step), ceil(high / step)
    return [float(f"{step * k:.6g}") for k in range(first, max(last, first + 2) + 1)]


def _svg(kind: str, width: float, height: float, title: str, description: str, parts: Sequence[str]) -> Markup:
    return Markup(  # every text in the parts went through escape()
        f'<svg class="{kind}" role="img" viewBox="0 0 {width:g} {height:g}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{''.join(parts)}</svg>"
    )


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and isfinite(value)]


def _short(name: str) -> str:
    return name if len(name) <= 22 else name[:21] + "…"


def _ticks(values: Sequence[float]) -> list[float]:
    """Three to seven round numbers that enclose all values."""
    low, high = min(values), max(values)
    step = next((s for s in (2, 5, 10, 20, 50, 100, 200, 500) if (high - low) / s <= 6.5), 1000)
    first, last = floor(low / step), ceil(high / step)
    return [float(step * k) for k in range(first, max(last, first + 2) + 1)]


def _spread_out(wanted: Sequence[float], low: float, high: float, pitch: float = 15.0) -> list[float]:
    """Places near the wanted ones, at least a line apart and inside the plot as far as they fit."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    places = list(wanted)
    for above, this in pairwise(order):
        places[this] = max(places[this], places[above] + pitch)
    limit = high
    for this in reversed(order):
        places[this] = min(places[this], limit)
        limit = places[this] - pitch
    shift = max(0.0, low - min(places, default=low))
    return [place + shift for place in places]


def _axes(frame: _Frame, stages: Sequence[str], numbered: bool, unit: str = " %") -> str:
    parts = []
    for tick in frame.ticks:
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{frame.left}" x2="{frame.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        text = f"{tick:g}{unit if tick == frame.ticks[-1] else ''}"
        parts.append(_text(frame.left - 8, y + 4, text, "tick", "end"))
    for number, stage in enumerate(stages):
        name = stage if len(stages) <= 5 else stage[:6]
        if numbered:
            parts.append(_text(frame.x(number), frame.bottom + 20, f"{number + 1}", "tick", "middle"))
        parts.append(_text(frame.x(number), frame.bottom + (36 if numbered else 20), name, "tick", "middle"))
    return "".join(parts)


def _rule(frame: _Frame, value: float, kind: str) -> str:
    y = frame.y(value)
    return f'<line class="{kind}" x1="{frame.left}" x2="{frame.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>' + _text(
        frame.left + 5, y - 5, kind, "tick", "start"
    )


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _open(line: Series) -> str:
    dash = DASHES[line.index // COLOURS % len(DASHES)]
    style = f"--c:var(--c{line.index % COLOURS});--dash:{dash}"
    return f'<g class="series" data-series="{escape(line.name)}" style="{style}">'


def _marker(line: Series, x: float, y: float) -> str:
    shape = MARKERS[line.index % len(MARKERS)]
    return f'<g class="marker" transform="translate({x:.1f} {y:.1f})">{shape}</g>'


def _curve(frame: _Frame, line: Series, stages: Sequence[str], end: float, unit: str = " %") -> str:
    """The spread, the line, its points with their values on hover, and its name at the height ``end``."""
    places = [(i, value) for i, value in enumerate(line.values) if value is not None and isfinite(value)]
    path = "L".join(f"{frame.x(i):.1f} {frame.y(value):.1f}" for i, value in places)
    parts = [_open(line)]
    for i, (low, high) in enumerate(zip(line.low, line.high, strict=True)):
        if low is not None and high is not None and high > low:
            across = f'x1="{frame.x(i):.1f}" x2="{frame.x(i):.1f}"'
            parts.append(f'<line class="spread" {across} y1="{frame.y(low):.1f}" y2="{frame.y(high):.1f}"/>')
    parts.append(f'<path class="curve" d="M{path}"/>')
    for i, value in places:
        tip = f"{line.name}, stage {i + 1} ({stages[i]}): {value:.2f}{unit}"
        parts.append(f'<g class="point"><title>{escape(tip)}</title>{_marker(line, frame.x(i), frame.y(value))}</g>')
    last_x, last_y = frame.x(places[-1][0]), frame.y(places[-1][1])
    key = frame.right + 18
    parts.append(
        f'<path class="leader" d="M{last_x + 7:.1f} {last_y:.1f}L{key - 8:.1f} {end:.1f}"/>{_marker(line, key, end)}'
    )
    parts.append(_text(key + 10, end + 4.5, _short(line.name), "name", "start"))
    return "".join(parts) + "</g>"
