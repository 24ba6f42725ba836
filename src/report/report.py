"""report.html: a run on one page that needs no network, made of what lies in its directory.

python -m src.report.report runs/NAME
"""

import argparse
import base64
import io
import json
import math
import platform
import re
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from ..config import UserError, quoted, run_script
from ..runtime.failures import warn_on_failure
from ..storage.files import write_whole
from .charts import Line, chart, short
from .page import Section, page

NAME = "report.html"
STEPS = 40  # of previews on the page, spread evenly over all
CLASSES = 60  # likewise, where each has its sheet
SHEETS = 240  # at most, of all classes and steps together
SAMPLE_BYTES = 4_000_000  # of all sheets together
PICTURE_BYTES, MOVING_BYTES = 200_000, 2_000_000  # of any other picture, of a GIF
MOST_SIDE, LEAST_SIDE = 1280, 200  # pixels between which a picture that is too large is made smaller
NAMES = 50  # of files that were left out
WARNINGS, LOG_LINES, LOG_BYTES = 10, 40, 1 << 20
EVERY_SECONDS = 60.0
COST = 100  # what writing takes is at most a hundredth of the time


class Kind(NamedTuple):
    """A kind of run: the key that only its config has, and what to do when it has finished."""

    key: str
    title: str
    script: str
    next: str


KINDS = (
    Kind("stages", "autoencoder", "train_vae.py", "python train_ldm.py -cfg CONFIG --set autoencoder={run}"),
    Kind(
        "classifier",
        "classifier of noised pictures",
        "train_classifier.py",
        "python sample.py DIFFUSION_RUN --guidance-method classifier --classifier {run}",
    ),
    Kind("source", "blending between two densities", "train_iadb.py", "python sample.py {run} --frames"),
    Kind("autoencoder", "diffusion on latents", "train_ldm.py", "python sample.py {run} --frames"),
    Kind("process", "diffusion on pixels", "ddpm_accelerate.py", "python sample.py {run} --frames"),
)


class Group(NamedTuple):
    """Metrics that share a chart: those whose name, less held_out_ or train_, is `pattern`. `apart`, each has its own."""

    title: str
    pattern: str
    log: bool = False
    by_images: bool = False
    apart: bool = False


GROUPS = (
    Group("loss", r"loss|l1|mse", log=True),
    Group("quality: {}", r"frechet_.*|evaluation_.*", by_images=True, apart=True),
    Group("PSNR (dB)", r"psnr"),
    Group("SSIM", r"ssim"),
    Group("LPIPS", r"lpips", log=True),
    Group("accuracy", r"accuracy"),
    Group("straightness (0 is a straight path)", r"straightness"),
    Group("learning rate", r"(.*_)?lr"),
    Group("gradient norm", r"(.*_)?grad_norm", log=True),
    Group("images per second", r"images_per_second"),
    Group("parts of the loss", r"perceptual|kl|commitment|vb", log=True),
    Group("adversary", r"adversarial|discriminator|discriminator_accuracy"),
    Group("{}", r"adaptive_weight|code_perplexity|codes_used|colour_drift", apart=True),
)
WHERE = re.compile(r"(held_out|train)_")
TABLED = re.compile(r"evaluation_(sweep|class)_")


# ---------------------------------------------------------------------------------------------- what lies there


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that are whole: the last one of a run that was killed, or is writing, may not be."""
    found = []
    with suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(ValueError):
                values = json.loads(line)
                if isinstance(values, dict) and isinstance(values.get("step"), int):
                    found.append(values)
    return found


def _document(path: Path) -> Any:
    """A JSON file, or None where it is missing or damaged: the rest of the page is shown all the same."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _number(value: Any) -> float | None:
    """A metric, or None where it is not finite (null in metrics.jsonl)."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


class Embedded(NamedTuple):
    """A picture inside a page: a data: address, and its size in the file that it came from."""

    address: str
    width: int
    height: int
    smaller: bool


class Images:
    """Pictures for a page, each read and encoded once as long as its file is the same and every page asks for it."""

    def __init__(self) -> None:
        self._known: dict[tuple[Path, int, int], Embedded | None] = {}
        self._used: dict[tuple[Path, int, int], Embedded | None] = {}
        self.damaged = 0

    def begin(self) -> None:
        """A new page: what the one before did not use is forgotten."""
        self._known, self._used, self.damaged = self._used or self._known, {}, 0

    def embed(self, path: Path, most_bytes: int) -> Embedded | None:
        """The picture in about so many bytes, or None where it cannot be read."""
        try:
            facts = path.stat()
            key = (path, facts.st_mtime_ns, facts.st_size)
            if key not in self._known:
                self._known[key] = _encode(path, most_bytes)
            found = self._used[key] = self._known[key]
        except OSError:
            found = None
        self.damaged += found is None
        return found


def _encode(path: Path, most_bytes: int) -> Embedded | None:
    """The file as it is where it is small enough, else with at most 256 colours where it has no more, else as a JPEG, smaller
    and smaller until it fits."""
    from PIL import Image

    def address(kind: str, content: bytes) -> str:
        return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"

    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=("PNG", "GIF")) as image:
            kind, size = str(image.format).lower(), image.size
            image.load()
            plain = image.convert("RGB")
    except Exception:  # whatever a damaged file makes of its decoder
        return None
    if len(content) <= most_bytes:
        return Embedded(address(kind, content), *size, smaller=False)
    if plain.getcolors(256) is not None:
        file = io.BytesIO()
        plain.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        if file.tell() <= most_bytes:
            return Embedded(address("png", file.getvalue()), *size, smaller=False)
    side = min(MOST_SIDE, max(size))
    while True:
        plain.thumbnail((side, side))
        file = io.BytesIO()
        plain.save(file, "JPEG", quality=80)
        if file.tell() <= most_bytes or side <= LEAST_SIDE:
            return Embedded(address("jpeg", file.getvalue()), *size, smaller=max(size) > side)
        side = max(LEAST_SIDE, int(0.9 * side * math.sqrt(most_bytes / file.tell())))


# ---------------------------------------------------------------------------------------------- samples


def _class_of(stem: str) -> str:
    """`circle` of sample_circle_4x4."""
    matched = re.fullmatch(r"sample_(.+)_\d+x\d+", stem)
    return matched[1] if matched else stem


def find_samples(folder: Path) -> dict[int, dict[str, Path]]:
    """{step: {class, or "" for a sheet of all: file}} of the previews, in order."""
    found: dict[int, dict[str, Path]] = {}
    for path in sorted(folder.glob("step_*")):
        matched = re.fullmatch(r"step_(\d+)(\.png)?", path.name)
        if matched is None:
            continue
        sheets = found.setdefault(int(matched[1]), {})
        if matched[2]:
            sheets[""] = path
        for file in sorted(path.glob("*.png")) if not matched[2] else ():
            name = _class_of(file.stem)
            sheets[name if name not in sheets else file.stem] = file
    return {step: sheets for step, sheets in sorted(found.items()) if sheets}


def spread(count: int, most: int) -> list[int]:
    """At most about `most` of `count` positions: every 2nd, 4th, 8th and so on, and the last. So a run that grows shows the
    same ones for long."""
    stride = 1
    while -(-count // stride) > most:
        stride *= 2
    return sorted({*range(0, count, stride), *([count - 1] if count else [])})


def _samples(run_dir: Path, pictures: Images, told_of: Callable[[int], str]) -> str:
    """The previews with a slider through time, and a chooser where there are several sheets at a step."""
    found = find_samples(run_dir / "samples")
    names = sorted({name for sheets in found.values() for name in sheets}, key=lambda name: (_by_numbers(name), name))
    shown_names = [names[i] for i in spread(len(names), CLASSES)]
    most = max(4, min(STEPS, SHEETS // max(1, len(shown_names))))
    steps = [list(found)[i] for i in spread(len(found), most)]
    budget = SAMPLE_BYTES // (most * max(1, len(shown_names)))
    frames, smaller = [], 0
    for step in steps:
        sheets = []
        for name in (name for name in shown_names if name in found[step]):
            picture = pictures.embed(found[step][name], budget)
            if picture is not None:
                smaller += picture.smaller
                sheets.append(_figure(picture, name, f"{f'{name} at ' if name else ''}step {step}"))
        if sheets:
            frames.append((f"step {step:,}{told_of(step)}", "".join(sheets)))
    if not frames:
        return ""
    last = len(frames) - 1
    inside = "".join(
        f'<div class="frame" data-told="{escape(told)}"{" hidden" * (i < last)}>{sheets}</div>'
        for i, (told, sheets) in enumerate(frames)
    )
    chooser = ""
    if len(shown_names) > 1:
        options = "".join(f'<option value="{escape(name)}">{escape(name) or "together"}</option>' for name in shown_names)
        chooser = f'<select aria-label="class"><option value="all">all classes</option>{options}</select>'
    notes = [f"{len(frames)} of {len(found)} previews"] if len(frames) < len(found) else []
    notes += [f"{len(shown_names)} of {len(names)} classes"] if len(shown_names) < len(names) else []
    notes += [f"{smaller} pictures made smaller"] if smaller else []
    told = f"Shown here: {', '.join(notes)}; all of them are in samples/." if notes else "All of them are in samples/, too."
    return (
        f'<div class="player"><div class="controls"><button type="button">Play</button>'
        f'<input type="range" min="0" max="{last}" value="{last}" aria-label="step"><output>{escape(frames[-1][0])}</output>'
        f'{chooser}</div>{inside}</div><p class="soft">Arrow keys go from preview to preview. {told}</p>'
    )


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """A key that sorts 2 before 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def _figure(picture: Embedded, name: str, told: str) -> str:
    caption = f"<figcaption>{escape(name)}</figcaption>" if name else ""
    wide = ' class="wide"' if picture.width > max(640, 2 * picture.height) else ""  # on a phone it is moved sideways
    image = f'<img{wide} src="{picture.address}" width="{picture.width}" height="{picture.height}" alt="{escape(told)}">'
    return f'<figure data-name="{escape(name)}">{image}{caption}</figure>'


# ---------------------------------------------------------------------------------------------- charts


def _columns(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float | None]]]:
    """{name of a metric: (step, value or None) in order of the steps, the last one of each}; what is neither a number nor null
    is no metric, and what evaluate.py puts into tables has no chart."""
    columns: dict[str, dict[int, float | None]] = {}
    for values in lines:
        for name, value in values.items():
            if name in ("step", "epoch") or TABLED.match(name) or value is True:
                continue
            if value is None or isinstance(value, int | float):
                columns.setdefault(name, {})[values["step"]] = _number(value)
    return {name: sorted(points.items()) for name, points in columns.items()}


def _plain(name: str) -> str:
    return name.replace("held_out", "held-out").replace("_", " ")


def _families(names: Sequence[str]) -> dict[str, list[str]]:
    """{base: names} of metrics that are numbered from 0: by noise level, by latent channel."""
    found: dict[str, list[str]] = {}
    for name in names:
        base, _, number = name.rpartition("_")
        if number.isdecimal() and base:
            found.setdefault(base, []).append(name)
    numbered = {base: [f"{base}_{i}" for i in range(len(members))] for base, members in found.items()}
    return {base: members for base, members in numbered.items() if len(members) > 1 and set(members) == set(found[base])}


def draw_charts(lines: Sequence[Mapping[str, Any]], images_at: Callable[[float], float | None]) -> str:
    """Every metric of `lines` in a chart: those that belong together in one, those that nobody knows in `other`."""
    columns = _columns(lines)
    levels, others = list[str](), list[str]()
    for base, members in _families(list(columns)).items():
        by_level = WHERE.match(base) is not None and "latent" not in base
        word = "noise level" if by_level else "channel" if "latent" in base else "number"
        ends = {0: " (cleanest)", len(members) - 1: " (noisiest)"} if by_level else {}
        own = [Line(f"{i}{ends.get(i, '')}", columns[name]) for i, name in enumerate(members)]
        made = [chart(f"{_plain(base)} by {word}", own, xlabel="step", log=by_level, ramp=True)]
        if by_level:
            known = [[y for _, y in columns[name] if y is not None] or [None] for name in members]
            ends = [("first", [y[0] for y in known]), ("latest", [y[-1] for y in known])]
            curves = [Line(name, list(enumerate(values))) for name, values in ends]
            made.append(chart(f"{_plain(base)}: how it lies over the levels", curves, xlabel="noise level", log=True))
        (levels if by_level else others).extend(made)
        for name in members:
            del columns[name]

    charts = list[str]()
    for group in GROUPS:
        own = [name for name in columns if re.fullmatch(group.pattern, WHERE.sub("", name, count=1))]
        for names in [[name] for name in own] if group.apart else [own]:
            shown, xlabel = [Line(_plain(name), columns.pop(name)) for name in names], "step"
            seen = [Line(name, _by_images(points, images_at)) for name, points in shown] if group.by_images else []
            if seen and all(points for _, points in seen):
                shown, xlabel = seen, "images seen"
            title = group.title.format(_plain(names[0]).removeprefix("evaluation ")) if names else ""
            charts.append(chart(title, shown, xlabel=xlabel, log=group.log))
        if group is GROUPS[0]:
            charts += levels
    charts.append(chart("other", [Line(_plain(name), points) for name, points in columns.items()], xlabel="step", log=True))
    drawn = "".join([*charts, *others])
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def _by_images(
    points: Sequence[tuple[float, float | None]], images_at: Callable[[float], float | None]
) -> list[tuple[float, float | None]]:
    moved = [(images_at(x), y) for x, y in points]
    return [(x, y) for x, y in moved if x is not None]


# ---------------------------------------------------------------------------------------------- words


class _Pace(NamedTuple):
    """How many images a run had seen at which steps, and how fast it is, by its log."""

    steps: list[int]
    images: list[float]
    speed: float | None

    @classmethod
    def of(cls, lines: Sequence[Mapping[str, Any]], images_per_epoch: Any) -> "_Pace":
        per_epoch, steps, images = _number(images_per_epoch), [0], [0.0]
        recent = list[tuple[float, float]]()  # images between two lines, and seconds
        for line in lines:
            epoch, speed = _number(line.get("epoch")), _number(line.get("images_per_second"))
            if epoch is None or per_epoch is None or line["step"] <= steps[-1]:
                continue
            steps.append(line["step"])
            images.append(epoch * per_epoch)
            if speed:
                recent.append((images[-1] - images[-2], (images[-1] - images[-2]) / speed))
        counts, seconds = (sum(column) for column in zip((0.0, 0.0), *recent[-10:], strict=True))
        return cls(steps, images, counts / seconds if seconds else None)

    def images_at(self, step: float) -> float | None:
        """Between two lines of the log in proportion; None where there is no log, beyond its end as it went last."""
        if len(self.steps) < 2:
            return None
        i = min(max(1, bisect_left(self.steps, step)), len(self.steps) - 1)
        (a, b), (x, y) = self.steps[i - 1 : i + 1], self.images[i - 1 : i + 1]
        return x + (y - x) * (step - a) / (b - a) if b > a else y


def _duration(seconds: float) -> str:
    for size, unit in ((172800, "days"), (5400, "h"), (90, "min")):
        if seconds > size:
            return f"{seconds / {'days': 86400, 'h': 3600, 'min': 60}[unit]:.1f} {unit}"
    return f"{seconds:.0f} s"


def _time(seconds: float) -> str:
    local = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    return f'<time data-seconds="{seconds:.0f}">{local}</time>'


def _head(name: str, shown: str, kind: Kind | None, status: Mapping[str, Any], facts: Mapping[str, Any], pace: _Pace) -> str:
    state = str(status.get("state", "starting"))
    step, steps = _number(status.get("step")), _number(status.get("steps"))
    rows = []
    if step is not None:
        rows.append(("step", f"{step:,.0f}" + (f" of {steps:,.0f}" if steps else ", without end")))
    seen = pace.images_at(step) if step is not None else None
    if seen is not None:
        rows += [("images seen", f"{seen:,.0f}"), ("epochs", f"{seen / facts['images']:.1f}")]
    if pace.speed is not None:
        rows.append(("images per second", short(pace.speed)))
        if state == "running" and steps and step is not None and seen:
            left = (pace.images_at(steps) or seen) - seen
            rows.append(("time left, at this speed", _duration(max(0.0, left / pace.speed))))
    if "images" in facts:
        rows.append(("pictures", f"{facts['images']:,}"))
        rows.append(("held out", f"{facts.get('held_out_images', 0):,}"))
        if facts.get("class_names"):
            rows.append(("classes", f"{len(facts['class_names']):,}"))
    for entry in facts.get("continued") or ():
        rows.append(("continued from", f"{entry['run']}, step {entry['step']:,}"))
    told = "".join(f"<div><dt>{escape(row)}</dt><dd>{escape(value)}</dd></div>" for row, value in rows)
    when = _time(status["time"]) if _number(status.get("time")) is not None else ""
    bar = f'<progress max="{steps:.0f}" value="{step:.0f}"></progress>' if steps and step is not None else ""
    quiet = ""
    if state == "running":
        quiet = '<p class="quiet" hidden>It has been quiet for long: was it killed? The command to go on is at the end.</p>'
    return (
        f'<h1>{escape(name)}</h1><p class="soft">{escape(kind.title if kind else "a run")}, in {escape(shown)}</p>'
        f'<div class="head"><span class="state {escape(state)}">{escape(state)}</span><span class="soft">{when}</span></div>'
        f'{quiet}<dl class="facts">{told}</dl>{bar}'
    )


def _other_pictures(run_dir: Path, pictures: Images) -> str:
    """What lies beside samples/: the contact sheet and its like, and where 2-D points went."""
    paths = [path for path in sorted(run_dir.glob("*.png")) if path.name not in ("loss.png", "contact_sheet.png")]
    paths = [*run_dir.glob("contact_sheet.png"), *paths]
    paths += [path for ending in ("png", "gif") for path in sorted((run_dir / "points").glob(f"*.{ending}"))]
    made = []
    for path in paths:
        picture = pictures.embed(path, MOVING_BYTES if path.suffix == ".gif" else PICTURE_BYTES)
        if picture is not None:
            name = path.relative_to(run_dir).as_posix()
            made.append(_figure(picture, name, name))
    return f'<div class="pictures">{"".join(made)}</div>' if made else ""


def _folded(title: str, content: str, *, opened: bool = False) -> str:
    return f"<details{' open' * opened}><summary>{escape(title)}</summary>{content}</details>"


def _data(facts: Mapping[str, Any], skipped: Any, shown_pictures: str) -> str:
    parts = [shown_pictures]
    counts = facts.get("counts")
    if isinstance(counts, dict) and counts:
        rows = "".join(f"<li>{escape(str(name))}: {count}</li>" for name, count in counts.items())
        parts.append(_folded(f"{len(counts)} classes, pictures of each", f'<ul class="names">{rows}</ul>'))
    entries = [entry for entry in skipped if isinstance(entry, dict)] if isinstance(skipped, list) else None
    if entries:
        reasons = Counter(str(entry.get("reason")) for entry in entries).most_common()
        rows = "".join(f"<li>{count:,}: {escape(reason)}</li>" for reason, count in reasons)
        parts.append(f'<h3>{len(entries):,} files left out</h3><ul class="names">{rows}</ul>')
        names = "".join(
            f"<li>{escape(str(entry.get('name')))}: {escape(str(entry.get('reason')))}</li>" for entry in entries[:NAMES]
        )
        title = f"the first {NAMES} of them; all are in skipped.json" if len(entries) > NAMES else "which"
        parts.append(_folded(title, f'<ul class="names">{names}</ul>'))
    elif entries is not None:
        parts.append('<p class="soft">No file was left out.</p>')
    return "".join(parts)


def _log(run_dir: Path) -> str:
    """Warnings, and the last lines."""
    try:
        with open(run_dir / "log.txt", "rb") as file:
            file.seek(max(0, file.seek(0, io.SEEK_END) - LOG_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    warned = [line for line in lines if " warning: " in line]
    told = f"<p>Warnings:</p>{_lines(warned[-WARNINGS:])}" if warned else ""
    return told + _folded(f"the last {min(len(lines), LOG_LINES)} lines", _lines(lines[-LOG_LINES:]))


def _lines(lines: Sequence[str]) -> str:
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def _shown(run_dir: Path) -> str:
    """The path as a person types it here."""
    path = run_dir.resolve()
    return (path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path).as_posix()


def _go_on(kind: Kind | None, run: str, state: str) -> str:
    """The command with which the run goes on, or, when it has finished, what to do with it."""
    same = "the same command as before goes on, under a launcher, too"
    if kind is None:
        return f"<p>{same.capitalize()}.</p>"
    word = quoted(run)
    if state == "finished":
        told, line = "The run is finished. Next:", kind.next.format(run=word)
    else:
        told = f"In the folder of the scripts ({same}):"
        line = f"python {kind.script} -cfg {quoted(f'{run}/config.json')} --run-dir {word}"
    return f'<p>{escape(told)}</p><pre class="command">{escape(line)}</pre>'


# ---------------------------------------------------------------------------------------------- the page


def make_report(run_dir: Path, pictures: Images | None = None) -> bytes:
    """The page of a run, as HTML. What is missing or damaged there is missing on the page."""
    pictures = pictures or Images()
    pictures.begin()
    config, facts, status = (_document(run_dir / f"{name}.json") for name in ("config", "data", "status"))
    config, facts, status = (found if isinstance(found, dict) else {} for found in (config, facts, status))
    lines = read_lines(run_dir / "metrics.jsonl")
    pace = _Pace.of(lines, facts.get("images"))
    kind = next((kind for kind in KINDS if kind.key in config), None)
    name, run = str(config.get("name", run_dir.resolve().name)), _shown(run_dir)

    def told_of(step: int) -> str:
        seen = pace.images_at(step)
        return f", {short(seen)} images" if seen is not None else ""

    shown_config = json.dumps(config, indent=1, ensure_ascii=False).splitlines()
    data = _data(facts, _document(run_dir / "skipped.json"), _other_pictures(run_dir, pictures))
    sections = [
        Section("samples", "Samples through time", _samples(run_dir, pictures, told_of)),
        Section("charts", "Charts", draw_charts(lines, pace.images_at)),
        Section("data", "Pictures and data", data),
        Section("log", "Log", _log(run_dir)),
        Section("config", "Config", _folded("all of its keys", _lines(shown_config)) if config else ""),
        Section("go_on", "Go on", _go_on(kind, run, str(status.get("state", "")))),
    ]
    versions = f"Python {platform.python_version()}, torch {version('torch')}, accelerate {version('accelerate')}"
    damaged = f" Pictures that could not be read: {pictures.damaged}." if pictures.damaged else ""
    foot = f"Written {_time(time.time())}, with {escape(versions)}. Charts show at most a few hundred points a line.{damaged}"
    return page(name, _head(name, run, kind, status, facts, pace), sections, foot).encode("utf-8", errors="replace")


def write_report(run_dir: Path, pictures: Images | None = None) -> None:
    """report.html of a run, whole or not at all."""
    write_whole(run_dir / NAME, make_report(run_dir, pictures))


class Reporter:
    """Writes the report of a run while it trains. Where that fails it says so once, and the run goes on."""

    def __init__(self, run_dir: Path, say: Callable[[str], None]) -> None:
        self._run_dir, self._say, self._pictures = run_dir, say, Images()
        self._next, self._failed = 0.0, False

    def write(self, *, now: bool) -> None:
        """At once, or, not `now`, when the last one is a minute old, and more where writing takes long."""
        began = time.monotonic()
        if not now and began < self._next:
            return
        with warn_on_failure(NAME, self._warn):
            write_report(self._run_dir, self._pictures)
        ended = time.monotonic()
        self._next = ended + max(EVERY_SECONDS, COST * (ended - began))

    def _warn(self, what: str, reason: str) -> None:
        if not self._failed:
            self._say(f"warning: {what} is not written ({reason}); training goes on")
        self._failed = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run")
    run_dir = parser.parse_args().run
    if not (run_dir / "config.json").is_file() or not (run_dir / "log.txt").is_file():
        raise UserError(f"{run_dir} is no run: there is no config.json and log.txt in it; give a folder such as runs/NAME")
    staged = run_dir / f".{NAME}.by_hand.part"  # a live run may be writing its own meanwhile
    write_whole(staged, make_report(run_dir))
    staged.replace(run_dir / NAME)
    print(run_dir / NAME)


if __name__ == "__main__":
    run_script(main)
