"""The gallery: a card for each run with its last preview, its state, its curve and its latest numbers, made of its files."""

import functools
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from ..config.packages import MissingPackage
from ..report.charts import draw_chart, metric_columns, plain, short
from ..report.report import NAME as REPORT
from ..report.report import duration
from ..report.run_files import KINDS, finite_or_none, read_document, read_lines
from ..report.samples import PageImage, find_samples, load_image
from .places import Places, file_stamp

PREVIEW_BYTES = 60_000
NUMBERS = (r"held_out_loss", r"held_out_l1", r"held_out_psnr", r"held_out_accuracy", r"frechet", r"evaluation_frechet")
SILENT_SECONDS = 600  # a run that has not said anything for so long is named


class Card(NamedTuple):
    """What the gallery shows of a run: its name, its kind and its state in words, its last preview, the SVG of its losses
    with (colour, name, value) of each line, and (name, value) of its latest numbers."""

    name: str
    kind: str
    state: str
    is_running: bool
    preview: PageImage | None
    curve: str
    legend: list[tuple[str, str, str]]
    numbers: list[tuple[str, str]]
    has_report: bool


def is_inside(run: Path, file: Path) -> bool:
    """Whether a file of a run is in its folder, too, and no link to somewhere else."""
    return file.resolve().is_relative_to(run.resolve())


def last_preview(run: Path) -> Path | None:
    """The newest preview of a run, or else the plot of where its points went, or what it was trained on."""
    samples = find_samples(run / "samples")
    if samples and is_inside(run, newest := next(iter(samples[max(samples)].values()))):
        return newest
    others = [run / "points" / "x1.png", run / "contact_sheet.png"]
    return next((path for path in others if path.is_file() and is_inside(run, path)), None)


def read_card(name: str) -> Card:
    """The card of a run; it is read anew only where its files have changed."""
    run = Path(name)
    preview = last_preview(run)
    files = [run / "metrics.jsonl", run / "status.json", run / "config.json", run / "final" / "config.json"]
    stamps = [file_stamp(path) for path in (*files, *([preview] if preview is not None else []))]
    card = _read_card(name, preview, tuple(stamps))
    state, is_running = describe_state(read_document(run / "status.json", dict) or {}, time.time())
    return card._replace(state=state, is_running=is_running, has_report=(run / REPORT).is_file())


@functools.lru_cache(maxsize=200)
def _read_card(name: str, preview: Path | None, stamps: tuple[Any, ...]) -> Card:
    run = Path(name)
    config = read_document(run / "config.json", dict) or read_document(run / "final" / "config.json", dict) or {}
    kind = next((kind.title for kind in KINDS if kind.key in config), "exported weights")
    columns = metric_columns(read_lines(run / "metrics.jsonl") if run.is_dir() else [])
    lines = {plain(key): columns[key] for key in ("loss", "held_out_loss") if key in columns}
    try:
        charts = draw_chart("loss", lines, log=True) if lines else []
    except MissingPackage:
        charts = []
    latest = {key: next((y for _, y in reversed(points) if y is not None), None) for key, points in columns.items()}
    keys = [
        key for start in NUMBERS for key in columns if key == start or (start.endswith("frechet") and key.startswith(start))
    ]
    numbers = [(plain(key), short(value)) for key in dict.fromkeys(keys) if (value := latest[key]) is not None][:3]
    image = load_image(preview, PREVIEW_BYTES, "", f"the last preview of {name}") if preview is not None else None
    return Card(name, kind, "", False, image, *(charts[0][1:3] if charts else ("", [])), numbers, False)


def describe_state(status: dict[str, Any], now: float) -> tuple[str, bool]:
    """The state of a run in words, by its status.json, and whether it trains at the time `now`."""
    state, written = status.get("state"), finite_or_none(status.get("time"))
    step, steps = (finite_or_none(status.get(key)) for key in ("step", "steps"))
    if not isinstance(state, str):
        return "ready to draw", False
    where = f", step {step:,.0f} of {steps:,.0f}" if step is not None and steps is not None else ""
    silent = now - written if written is not None else 0.0
    is_running = state == "running"
    if is_running and silent > SILENT_SECONDS:
        return f"running{where}, and silent for {duration(silent)}", False
    return f"{state}{where}", is_running


def read_cards(places: Places) -> list[Card]:
    """Those of all runs of the page; a run that vanishes meanwhile is left out."""
    cards = list[Card]()
    for name in places.names():
        try:
            cards.append(read_card(name))
        except OSError:
            continue
    return cards


def render_cards(cards: Sequence[Card]) -> str:
    """The gallery as HTML, which names nothing outside of the page but the reports of runs."""
    if not cards:
        return '<p class="empty">There is no run yet. Train one, and it appears here: python train_ldm.py -cfg CONFIG</p>'
    return f'<div class="cards">{"".join(map(_render, cards))}</div>'


def report_address(name: str) -> str:
    """Where the page has the report of a run."""
    return f"report/{quote(name)}"


def _render(card: Card) -> str:
    name, parts = escape(card.name), list[str]()
    if card.preview is not None:
        image = card.preview
        size = f'width="{image.width}" height="{image.height}"'
        parts.append(f'<img src="{image.address}" {size} alt="{escape(image.alt)}" loading="lazy">')
    else:
        parts.append('<div class="no-preview">no preview</div>')
    mark = ' class="running"' if card.is_running else ""
    parts.append(f"<h3>{name}</h3><p>{escape(card.kind)}<br><span{mark}>{escape(card.state)}</span></p>")
    if card.numbers:
        rows = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in card.numbers)
        parts.append(f"<dl>{rows}</dl>")
    if card.curve:
        marks = "".join(f'<i style="background:{colour}"></i>{escape(line)}' for colour, line, _ in card.legend)
        parts.append(f'<div class="curve" role="img" aria-label="the loss of {name} over its steps">{card.curve}</div>')
        parts.append(f'<p class="legend">{marks}</p>')
    if card.has_report:
        link = f'href="{report_address(card.name)}" target="_blank" rel="noopener"'
        parts.append(f'<p><a {link}>Report<span class="for-readers"> of {name}, in a new tab</span></a></p>')
    return f'<article class="card">{"".join(parts)}</article>'
