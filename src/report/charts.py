"""Charts of a report as SVG inside HTML: lines over steps or images, drawn here so that a page needs nothing else."""

import json
import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

WIDTH, HEIGHT = 440, 236
LEFT, RIGHT, TOP, BOTTOM = 50, 430, 10, 200  # of the box that the lines are in
MOST_POINTS = 400  # of a line: more cannot be told apart
FEW_POINTS = 40  # get a dot each
LOG_RATIO = 8.0  # of the largest value to the smallest, from which a log scale shows more


class Line(NamedTuple):
    """Points (x, y) in order; y is None where something was logged that is no number: a gap."""

    name: str
    points: Sequence[tuple[float, float | None]]


def short(value: float) -> str:
    """A number for an axis or a legend: 0.01234, 1.5k, 2.25M, 8e-9."""
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for size, unit, by in ((1e9, "G", 1e9), (1e6, "M", 1e6), (1e4, "k", 1e3)):
        if abs(value) >= size:
            return f"{value / by:.4g}{unit}"
    return f"{value:.4g}"


def thinned(points: Sequence[tuple[float, float | None]], most: int = MOST_POINTS) -> list[tuple[float, float | None]]:
    """At most about `most` points that look the same: of each stretch the lowest, the highest, and a gap where there is one."""
    if len(points) <= most:
        return list(points)
    each = math.ceil(len(points) / (most // 2))
    kept = []
    for start in range(0, len(points), each):
        part = points[start : start + each]
        known = [i for i, (_, y) in enumerate(part) if y is not None]
        chosen = {min(known, key=lambda i: part[i][1] or 0.0), max(known, key=lambda i: part[i][1] or 0.0)} if known else set()
        chosen |= set([i for i, (_, y) in enumerate(part) if y is None][:1])
        kept += [part[i] for i in sorted(chosen)]
    if kept[-1] != points[-1]:
        kept.append(points[-1])
    return kept


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, at most so many."""
    rough = (high - low) / max(1, most - 1)
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 times them where there are few, every other one where there are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = range(first, last + 1, max(1, math.ceil((last - first) / 6)))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    return [10.0**d * f for d in decades for f in factors if low * 0.999 <= 10.0**d * f <= high * 1.001]


def _range(values: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return low / 1.08, high * 1.08
    room = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return low - room, high + room


def chart(title: str, lines: Sequence[Line], *, xlabel: str, log: bool = False, ramp: bool = False) -> str:
    """A figure of lines with axes, a legend with their latest values, and the values for the read-out below the pointer.

    With `log` the y axis is logarithmic where all is positive and the range is wide; with `ramp` the colours go from blue to
    red in order. "" where there is not one number.
    """
    lines = [Line(name, thinned(points)) for name, points in lines]
    lines = [line for line in lines if any(y is not None for _, y in line.points)]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points if y is not None]
    log = log and min(ys) > 0 and max(ys) / min(ys) > LOG_RATIO
    x0, x1 = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 1, max(xs) + 1)
    y0, y1 = _range(ys, log)

    def at_x(x: float) -> float:
        return LEFT + (RIGHT - LEFT) * (x - x0) / (x1 - x0)

    def at_y(y: float) -> float:
        share = math.log(y / y0) / math.log(y1 / y0) if log else (y - y0) / (y1 - y0)
        return BOTTOM - (BOTTOM - TOP) * share

    drawn = [
        f'<line class="rule" x1="{LEFT}" x2="{RIGHT}" y1="{at_y(y):.1f}" y2="{at_y(y):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{at_y(y) + 4:.1f}" text-anchor="end">{short(y)}</text>'
        for y in (log_ticks(y0, y1) if log else ticks(y0, y1))
    ]
    for x in ticks(x0, x1, 5) if max(xs) > min(xs) else xs[:1]:
        anchor = "middle" if at_x(x) < RIGHT - 20 else "end"
        drawn.append(f'<text x="{at_x(x):.1f}" y="{BOTTOM + 16}" text-anchor="{anchor}">{short(x)}</text>')
    drawn.append(f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>')
    scale = f"{xlabel}{', log scale' if log else ''}"
    drawn.append(f'<text x="{RIGHT}" y="{BOTTOM + 32}" text-anchor="end">{escape(scale)}</text>')
    legend = []
    for i, line in enumerate(lines):
        colour = f"hsl({250 - 240 * i / max(1, len(lines) - 1):.0f} 65% 55%)" if ramp else f"var(--line-{i % 8})"
        known = [(at_x(x), at_y(y)) if y is not None else None for x, y in line.points]
        drawn.append(f'<g style="color:{colour}">{_path(known)}</g>')
        latest = next(y for _, y in reversed(line.points) if y is not None)
        legend.append(f'<li><i style="background:{colour}"></i>{escape(line.name)} <b>{short(latest)}</b></li>')
    box = {"left": LEFT, "right": RIGHT, "width": WIDTH, "low": x0, "high": x1}
    values = {**box, "lines": [[[x, y if y is None else float(f"{y:.5g}")] for x, y in points] for _, points in lines]}
    told = f"{title}: {', '.join(line.name for line in lines)}"
    return (
        f'<figure class="chart"><figcaption>{escape(title)} <output></output></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(told)}">{"".join(drawn)}'
        f'<line class="pointer" x1="0" x2="0" y1="{TOP}" y2="{BOTTOM}" visibility="hidden"/></svg>'
        f'<ul class="legend">{"".join(legend)}</ul>'
        f'<script type="application/json">{json.dumps(values, separators=(",", ":"))}</script></figure>'
    )


def _path(points: Sequence[tuple[float, float] | None]) -> str:
    """One path with a gap at each None; dots where there are few points, and for one that stands alone."""
    words, dots = list[str](), list[str]()
    few = len(points) <= FEW_POINTS
    for i, (before, here) in enumerate(pairwise([None, *points])):
        if here is None:
            continue
        words.append(f"{'M' if before is None else 'L'}{here[0]:.1f} {here[1]:.1f}")
        alone = before is None and (i + 1 == len(points) or points[i + 1] is None)
        if few or alone:
            dots.append(f'<circle cx="{here[0]:.1f}" cy="{here[1]:.1f}" r="2"/>')
    return f'<path d="{"".join(words)}"/>{"".join(dots)}'
