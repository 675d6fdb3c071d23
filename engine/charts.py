"""Charts as small inline SVG, each a ``<figure>`` with its title and legend; how they look is ``page.STYLE``.

Bars and intervals tell their values as their ``<title>``, lines by ``data-lines``, which the page's script reads. All
numbers are the given ones to six digits. Colours are numbers, 0 to 7, of the page's palette.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .curves import Values, brief, log_ticks, smooth, spread, thinned, ticks
from .page import escaped, missing, note

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 48, 8, 8, 24  # margins around the plot
COLORS = 8
MAX_POINTS = 1000  # drawn of a line
MAX_BARS = 60
MAX_BINS = 20
LOG_LEAST = 10.0  # a logarithmic axis is for values that differ by this factor
CHAR = 6.2  # width of a character, about
ROW = 38  # height of a row of an interval chart


@dataclass(frozen=True)
class Line:
    """A series to be drawn: ``xs``, ``ys`` [N] with finite values, and the number of its colour."""

    label: str
    xs: Values
    ys: Values
    color: int = 0


@dataclass(frozen=True)
class _Axis:
    """Maps values to a coordinate."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, values: Values | float) -> Values:
        low, high, values = (np.log10(x) if self.log else np.asarray(x) for x in (self.low, self.high, values))
        share = (values - low) / (high - low) if high > low else np.full_like(values, 0.5, dtype=float)
        return self.start + share * (self.end - self.start)


def line_chart(title: str, lines: Sequence[Line], *, log: bool = False, remark: str = "") -> str:
    """Raw points and their running mean over the steps.

    Args:
        lines: those without a point are left out; without any the figure says so.
        log: the values' axis is logarithmic, where all of them are positive and far apart.
        remark: below the title.
    """
    lines = [line for line in lines if len(line.xs)]
    if not lines:
        return _figure(title, missing("not recorded"), remark=remark)
    every_x, every_y = (np.concatenate([getattr(line, name) for line in lines]) for name in ("xs", "ys"))
    log = log and bool(every_y.min() > 0 and every_y.max() > LOG_LEAST * every_y.min())
    low, high = _widened(float(every_y.min()), float(every_y.max()), log)
    x_axis = _Axis(float(every_x.min()), float(every_x.max()), LEFT + 4, WIDTH - RIGHT - 4)
    y_axis = _Axis(low, high, HEIGHT - BOTTOM, TOP, log)
    shapes, data, left_out = [], [], 0
    for line in lines:
        kept = thinned(line.ys, MAX_POINTS)
        left_out += len(line.ys) - len(kept)
        xs, means = x_axis(line.xs)[kept], y_axis(smooth(line.ys))[kept]
        dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in zip(xs, y_axis(line.ys)[kept], strict=True))
        curve = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, means, strict=True))
        shapes.append(f'<g class="c{line.color}"><path class="dots" d="{dots}"/>')
        shapes.append(f'<polyline class="line" points="{curve}"/></g>')
        points = {"x": line.xs[kept].tolist(), "y": [_short(y) for y in line.ys[kept]]}
        data.append({"label": line.label, "color": f"c{line.color}", **points})
    found = {"box": [x_axis.start, x_axis.end], "from": x_axis.low, "to": x_axis.high, "lines": data}
    marks = log_ticks(low, high) if log else ticks(low, high)
    cursor = f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    drawing = _svg(HEIGHT, _rules(y_axis, marks), *_steps(x_axis, _whole(x_axis)), *shapes, cursor, lines=found)
    remarks = [remark, f"{left_out} points between the extremes are not drawn" if left_out else ""]
    legend = {line.label: line.color for line in lines}
    return _figure(title, drawing, legend=legend, remark="; ".join(filter(None, remarks)))


def stacked_chart(
    title: str,
    columns: Sequence[str],
    parts: Mapping[str, Sequence[float]],
    *,
    kind: str = "step ",
    unit: str = "",
    remark: str = "",
) -> str:
    """Stacked bars.

    Args:
        columns: what each bar stands for, ``kind`` in front of it; at most MAX_BARS.
        parts: by label, a value >= 0 for each column; beyond the palette the smallest share the last colour.
        unit: of the values.
    """
    parts = _few({name: values for name, values in parts.items() if any(values)})
    if not parts:
        return _figure(title, missing("not recorded"), remark=remark)
    tops = np.cumsum(list(parts.values()), axis=0)  # [parts, columns]
    y_axis = _Axis(0.0, float(tops[-1].max()) * 1.05, HEIGHT - BOTTOM, TOP)
    width = (WIDTH - LEFT - RIGHT) / len(columns)
    shapes = []
    for number, (name, values) in enumerate(parts.items()):
        shapes.append(f'<g class="c{number}">')
        for place, value in enumerate(values):
            y, bottom = float(y_axis(float(tops[number][place]))), float(y_axis(float(tops[number][place] - value)))
            if value:
                tip = escaped(f"{kind}{columns[place]}: {name} {_short(value)} {unit}".rstrip())
                x, wide = LEFT + place * width + width * 0.06, min(width * 0.88, 60)
                shape = f'x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{max(bottom - y, 0.4):.1f}"'
                shapes.append(f'<rect class="bar" {shape}><title>{tip}</title></rect>')
        shapes.append("</g>")
    centre = min(width * 0.5, 30 + width * 0.06)
    shown = spread(len(columns), 5)
    room = int(width * len(columns) / len(shown) / CHAR)
    labels = {place: name if len(name := columns[place]) <= room else f"{name[: room - 1]}…" for place in shown}
    names = [_text(LEFT + place * width + centre, HEIGHT - 8, label) for place, label in labels.items()]
    drawing = _svg(HEIGHT, _rules(y_axis, ticks(0.0, y_axis.high)), *names, *shapes)
    return _figure(title, drawing, legend={name: number for number, name in enumerate(parts)}, remark=remark)


def histogram(title: str, samples: Mapping[str, Sequence[int]], *, remark: str = "") -> str:
    """Shares of each sample in at most 20 equal bins of whole numbers, as outlines over one another."""
    samples = {name: values for name, values in samples.items() if values}
    if not samples:
        return _figure(title, missing("not recorded"), remark=remark)
    every = np.concatenate(list(samples.values()))
    width = -(-int(every.max() - every.min() + 1) // MAX_BINS)
    edges = np.arange(every.min() - 0.5, every.max() + width, width)
    shares = {name: np.histogram(values, edges)[0] / len(values) for name, values in samples.items()}
    x_axis = _Axis(float(edges[0]), float(edges[-1]), LEFT + 4, WIDTH - RIGHT - 4)
    y_axis = _Axis(0.0, max(float(share.max()) for share in shares.values()) * 1.05, HEIGHT - BOTTOM, TOP)
    xs, shapes = x_axis(edges), []
    for number, (name, share) in enumerate(shares.items()):
        ys = y_axis(share)
        steps = "".join(f"V{y:.1f}H{x:.1f}" for y, x in zip(ys, xs[1:], strict=True))
        shapes.append(f'<path class="outline c{number}" d="M{xs[0]:.1f} {y_axis.start}{steps}V{y_axis.start}Z">')
        values = samples[name]
        mean, middle, most = (_short(float(f(values))) for f in (np.mean, np.median, np.max))
        tip = f"{name}: {len(values)} values, mean {mean}, median {middle}, at most {most}"
        shapes.append(f"<title>{escaped(tip)}</title></path>")
    drawing = _svg(HEIGHT, _rules(y_axis, ticks(0.0, y_axis.high)), *_steps(x_axis, _whole(x_axis)), *shapes)
    return _figure(title, drawing, legend={name: number for number, name in enumerate(shares)}, remark=remark)


def interval_chart(
    title: str, rows: Sequence[tuple[str, float, Sequence[float] | None, int]], *, remark: str = ""
) -> str:
    """A row of ``rows`` is (label, value, (low, high) of its interval or None, colour): a knob with a line through."""
    if not rows:
        return _figure(title, missing("not recorded"), remark=remark)
    bounds = [bound for _, value, interval, _ in rows for bound in (value, *(interval or ()))]
    x_axis = _Axis(min(0.0, *bounds), max(1.0, *bounds), LEFT, WIDTH - RIGHT - 36)
    height = TOP + ROW * len(rows) + BOTTOM
    shapes = _steps(x_axis, ticks(x_axis.low, x_axis.high), height)
    for place, (label, value, interval, color) in enumerate(rows):
        y = TOP + (place + 0.7) * ROW
        x, tip = float(x_axis(value)), f"{label}: {_short(value)}"
        shapes.append(f'<g class="c{color}">')
        if interval:
            low, high = (float(x_axis(bound)) for bound in interval)
            shapes.append(f'<line class="range" x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
            tip += f", interval {_short(interval[0])} to {_short(interval[1])}"
        shapes.append(f'<circle class="knob" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{escaped(tip)}</title></circle>')
        shapes.append(f'</g><text x="{LEFT}" y="{y - 10:.1f}">{escaped(label)}: {value:.3f}</text>')
    return _figure(title, _svg(height, *shapes), remark=remark)


def _few(parts: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """Largest first, and no more than there are colours."""
    ordered = sorted(parts, key=lambda name: -sum(parts[name]))
    if len(ordered) <= COLORS:
        return {name: parts[name] for name in ordered}
    rest = ordered[COLORS - 1 :]
    others = [sum(values) for values in zip(*(parts[name] for name in rest), strict=True)]
    return {**{name: parts[name] for name in ordered[: COLORS - 1]}, f"{len(rest)} others": others}


def _widened(low: float, high: float, log: bool) -> tuple[float, float]:
    """A range that leaves room for the dots at its ends."""
    if log:
        factor = (high / low) ** 0.04
        return low / factor, high * factor
    room = (high - low) * 0.04 or abs(high) * 0.05 or 1.0
    return low - room if low < 0 or low > room else 0.0, high + room


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _svg(height: float, *parts: str, lines: Mapping[str, object] | None = None) -> str:
    data = f' data-lines="{escaped(json.dumps(lines))}"' if lines else ""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"{data}>'
    return f"{head}{''.join(parts)}</svg>"


def _rules(axis: _Axis, marks: Sequence[float]) -> str:
    """Horizontal lines with their values."""
    found = []
    for mark in marks:
        y = float(axis(mark))
        found.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        found.append(_text(LEFT - 6, y + 4, brief(mark), "end"))
    return "".join(found)


def _whole(axis: _Axis) -> list[float]:
    return [mark for mark in ticks(axis.low, axis.high) if mark == int(mark)]


def _steps(axis: _Axis, marks: Sequence[float], height: float = HEIGHT) -> list[str]:
    """Values below a horizontal axis."""
    return [_text(float(axis(mark)), height - 8, brief(mark)) for mark in marks]


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    if anchor == "middle" and x + len(text) * CHAR / 2 > WIDTH:
        x, anchor = WIDTH, "end"
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escaped(text)}</text>'


def _figure(title: str, drawing: str, *, legend: Mapping[str, int] | None = None, remark: str = "") -> str:
    entries = "".join(
        f'<span class="c{color}"><i></i>{escaped(label)}</span>' for label, color in (legend or {}).items()
    )
    shown = f'<div class="legend">{entries}</div>' if entries else ""
    return f"<figure><figcaption>{escaped(title)}</figcaption>{note(remark) if remark else ''}{shown}{drawing}</figure>"
