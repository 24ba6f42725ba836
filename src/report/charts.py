"""The charts of a report: every metric of a run as a line over its steps, as SVG by matplotlib, in the colours of the page."""

import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..config.packages import needed
from .run_files import finite_or_none

Points = Sequence[tuple[float, float | None]]  # (x, y) in order; y is None where the value was not finite: a gap

WIDTH, HEIGHT = 440, 236
LEFT, RIGHT, TOP, BOTTOM = 50, 422, 10, 200  # of the box that the lines are in
MOST_POINTS = 400  # of a line: nobody can tell more of them apart
FEW_POINTS = 40  # get a dot each
LOG_RATIO = 8.0  # of the largest value to the smallest, from which a log scale shows more
LEVEL = re.compile(r"(held_out|train)_")
TABLE = re.compile(r"evaluation_(sweep|class)_")
# What matplotlib writes, and the page does without: names that all charts share, decimals, line ends.
SHORTER = ((r' id="[\w.]+_\d+"', ""), (r'(\.\d)\d+(?=[ "\n])', r"\1"), (r"\s*\n\s*", " "))


class Group(NamedTuple):
    """Metrics that share a chart: those whose name, less held_out_ or train_, is `pattern`. `apart`, each has a chart."""

    title: str
    pattern: str
    log: bool = False
    by_images: bool = False
    apart: bool = False


GROUPS = (
    Group("loss", r"loss|l1|mse|equivariance", log=True),
    Group("quality: {}", r"frechet_.*|evaluation_.*", by_images=True, apart=True),
    Group("PSNR (dB)", r"psnr"),
    Group("SSIM", r"ssim"),
    Group("LPIPS", r"lpips", log=True),
    Group("accuracy", r"accuracy"),
    Group("straightness (0 is a straight path)", r"straightness"),
    Group("learning rate", r"(.*_)?lr"),
    Group("gradient norm", r"(.*_)?grad_norm", log=True),
    Group("images per second", r"images_per_second"),
    Group("parts of the loss", r"perceptual|alignment|kl|commitment|vb", log=True),
    Group("adversary", r"adversarial|discriminator|discriminator_accuracy"),
    Group("{}", r"adaptive_weight|alignment_weight|code_perplexity|codes_used|colour_drift", apart=True),
    Group("other", r".*", log=True),
)


class Chart(NamedTuple):
    """A chart of a page: (colour, name, latest value) of each line, and JSON for the read-out below the pointer."""

    title: str
    svg: str
    legend: list[tuple[str, str, str]]
    values: str


def short(value: float, position: Any = None) -> str:
    """A number for a legend, or for an axis (matplotlib gives the position too): 0.01234, 25.6k, 2.25M, 8e-9."""
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for size, unit, divisor in ((1e9, "G", 1e9), (1e6, "M", 1e6), (1e4, "k", 1e3)):
        if abs(value) >= size:
            return f"{value / divisor:.4g}{unit}"
    return f"{value:.4g}"


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """At most about `most` points that look the same: of each stretch the lowest, the highest, and a gap where there is one."""
    if len(points) <= most:
        return points
    stride = math.ceil(len(points) / (most // 2))
    chosen = {len(points) - 1}
    for start in range(0, len(points), stride):
        finite = [(y, i) for i, (_, y) in enumerate(points[start : start + stride], start) if y is not None]
        gaps = [i for i, (_, y) in enumerate(points[start : start + stride], start) if y is None]
        chosen.update([min(finite)[1], max(finite)[1]] if finite else [], gaps[:1])
    return [points[i] for i in sorted(chosen)]


def draw_chart(
    title: str, lines: Mapping[str, Points], *, xlabel: str = "step", log: bool = False, ramp: bool = False
) -> list[Chart]:
    """The chart of {name: points} of lines; none where there is not one finite value.

    With `log` the y axis is logarithmic where all is positive and the range is wide; with `ramp` the colours go from blue to
    red in order.
    """
    lines = {name: thinned(points) for name, points in lines.items() if any(y is not None for _, y in points)}
    if not lines:
        return []
    hues = np.linspace(250, 10, len(lines))
    colours = [f"hsl({hue:.0f} 65% 55%)" if ramp else f"var(--line-{i % 8})" for i, hue in enumerate(hues)]
    svg, (low, high) = draw_svg(list(lines.values()), colours, xlabel, log)
    latest = [short([y for _, y in points if y is not None][-1]) for points in lines.values()]
    shown = [[[round(x, 3), None if y is None else float(f"{y:.5g}")] for x, y in points] for points in lines.values()]
    values = {"box": [LEFT / WIDTH, RIGHT / WIDTH, low, high], "lines": shown}
    return [Chart(title, svg, list(zip(colours, lines, latest, strict=True)), json.dumps(values, separators=(",", ":")))]


def draw_svg(lines: Sequence[Points], colours: Sequence[str], xlabel: str, log: bool) -> tuple[str, tuple[float, float]]:
    """The SVG of lines in these colours of CSS, and the ends of its x axis."""
    with needed("drawing charts", "matplotlib"):
        from matplotlib import style
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator

    # To matplotlib a colour is a number; in the SVG the colours of the page take its place.
    palette = ["var(--edge)", "var(--soft)", *colours]
    finite = [y for line in lines for _, y in line if y is not None]
    decades = math.log10(max(finite) / min(finite)) if min(finite) > 0 else 0.0
    is_log = log and decades > math.log10(LOG_RATIO)
    options = {"svg.fonttype": "none", "svg.hashsalt": str(palette), "font.sans-serif": ["DejaVu Sans"]}
    with style.context(options, after_reset=True):  # whatever the user's matplotlibrc says
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        axes = figure.add_axes((LEFT / WIDTH, 1 - BOTTOM / HEIGHT, (RIGHT - LEFT) / WIDTH, (BOTTOM - TOP) / HEIGHT))
        for i, line in enumerate(lines):
            x, y = np.array(line, dtype=float).T
            known = np.pad(np.isfinite(y), 1)
            lonely = known[1:-1] & ~known[:-2] & ~known[2:]
            dots = np.flatnonzero(known[1:-1] if len(line) <= FEW_POINTS else lonely).tolist()
            axes.plot(x, y, color=f"#{i + 2:06x}", linewidth=1.6, clip_on=False, marker="o", markersize=4, markevery=dots)
        if is_log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades <= 2 else (1,), numticks=7))
            axes.minorticks_off()
        else:
            axes.locator_params(axis="y", nbins=6)
        axes.margins(x=0)
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(short)
        axes.yaxis.set_major_formatter(short)
        axes.tick_params(left=False, bottom=False)
        axes.grid(axis="y", color="#000000", clip_on=False)
        axes.spines[["left", "top", "right"]].set_visible(False)
        axes.spines["bottom"].set_color("#000001")
        axes.set_xlabel(f"{xlabel}, log scale" if is_log else xlabel, loc="right")
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = file.getvalue()
    svg = re.sub("#([0-9a-f]{6})", lambda match: palette[int(match[1], 16)], svg[svg.index("<svg") :])
    for pattern, replacement in SHORTER:
        svg = re.sub(pattern, replacement, svg)
    return svg, axes.get_xlim()


def metric_columns(lines: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """{name of a metric: (step, value) in order of the steps, the last value of each}. What is neither a number nor null is no
    metric, and what evaluate.py puts into tables has no chart."""
    columns: dict[str, dict[float, float | None]] = {}
    for values in lines:
        for name, value in values.items():
            if name in ("step", "epoch") or TABLE.match(name) or value is True:
                continue
            if value is None or isinstance(value, int | float):
                columns.setdefault(name, {})[values["step"]] = finite_or_none(value)
    return {name: sorted(points.items()) for name, points in columns.items()}


def plain(name: str) -> str:
    """The name of a metric in words."""
    return name.replace("held_out", "held-out").replace("_", " ")


def draw_numbered(columns: dict[str, Points]) -> list[Chart]:
    """Charts of the metrics by noise level, and of those that are numbered from 0 otherwise, as by latent channel. Takes these
    metrics out of `columns`."""
    families: dict[str, dict[int, str]] = {}
    for name in columns:
        base, _, number = name.rpartition("_")
        if number.isdecimal() and base:
            families.setdefault(base, {})[int(number)] = name
    charts = list[Chart]()
    for base, names in families.items():
        is_level = LEVEL.match(base) is not None and "latent" not in base
        if len(names) < 2 or not (is_level or set(names) == set(range(len(names)))):
            continue
        lines = {number: columns.pop(name) for number, name in sorted(names.items())}
        word = "noise level" if is_level else "channel" if "latent" in base else "number"
        notes = {min(lines): " (cleanest)", max(lines): " (noisiest)"} if is_level else {}
        named = {f"{number}{notes.get(number, '')}": points for number, points in lines.items()}
        charts += draw_chart(f"{plain(base)} by {word}", named, log=is_level, ramp=True)
        if is_level:
            finite = [(number, [y for _, y in points if y is not None] or [None]) for number, points in lines.items()]
            over_levels = {name: [(n, y[i]) for n, y in finite] for name, i in (("first", 0), ("latest", -1))}
            charts += draw_chart(f"{plain(base)}: how it lies over the levels", over_levels, xlabel="noise level", log=True)
    return charts


def draw_charts(lines: Sequence[Mapping[str, Any]], images_at: Callable[[float], float | None]) -> list[Chart]:
    """Every metric of `lines` in a chart: those that belong together in one, those that nobody knows in `other`."""
    columns = metric_columns(lines)
    numbered = draw_numbered(columns)
    charts = list[Chart]()
    for group in GROUPS:
        members = [name for name in columns if re.fullmatch(group.pattern, LEVEL.sub("", name, count=1))]
        for names in [[name] for name in members] if group.apart else [members]:
            shown, xlabel = {plain(name): columns.pop(name) for name in names}, "step"
            if group.by_images and images_at(0) is not None:
                shown = {name: [(images_at(x) or 0.0, y) for x, y in points] for name, points in shown.items()}
                xlabel = "images seen"
            title = group.title.format(plain(names[0]).removeprefix("evaluation ") if names else "")
            charts += draw_chart(title, shown, xlabel=xlabel, log=group.log)
        charts += numbered if group is GROUPS[0] else []
    return charts
