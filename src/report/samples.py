"""Images on the page of a run: previews through time, and what lies beside them, each as a data: address."""

import base64
import functools
import io
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

STEPS = 40  # of previews on the page, spread evenly over all
CLASSES = 60  # likewise, where each has its sheet
SHEETS = 240  # at most, of all classes and steps together
SAMPLE_BYTES = 4_000_000  # of all sheets together
IMAGE_BYTES, GIF_BYTES = 200_000, 2_000_000  # of any other image, of a GIF
MOST_SIDE, LEAST_SIDE = 1280, 200  # pixels between which an image that is too large is made smaller


class PageImage(NamedTuple):
    """An image inside a page: its caption, its text for who cannot see it, a data: address, and the size of its file."""

    name: str
    alt: str
    address: str
    width: int
    height: int
    is_smaller: bool  # than in its file


class Samples(NamedTuple):
    """The previews on a page: (step, sheets) in order, names of the classes, and what was left out."""

    frames: list[tuple[int, list[PageImage]]]
    names: list[str]
    notes: list[str]
    unreadable: int


def load_image(path: Path, most_bytes: int, name: str, alt: str) -> PageImage | None:
    """The image in about so many bytes, or None where it cannot be read."""
    try:
        stat = path.stat()
        return PageImage(name, alt, *encode(path, most_bytes, stat.st_mtime_ns, stat.st_size))
    except Exception:  # whatever a damaged file makes of its decoder
        return None


@functools.lru_cache(maxsize=400)  # a run writes its page often; `mtime` and `size` tell when a file has changed
def encode(path: Path, most_bytes: int, mtime: int, size: int) -> tuple[str, int, int, bool]:
    """(data: address, width, height, whether it was made smaller) of the file as it is where it is small enough, else with at
    most 256 colours where it has no more, else as a JPEG, smaller and smaller until it fits."""
    from PIL import Image

    content = path.read_bytes()
    with Image.open(io.BytesIO(content), formats=("PNG", "GIF")) as image:
        kind, (width, height) = str(image.format).lower(), image.size
        plain = image.convert("RGB")
    if len(content) > most_bytes and plain.getcolors(256) is not None:
        file = io.BytesIO()
        plain.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        kind, content = "png", file.getvalue()
    side = MOST_SIDE
    while len(content) > most_bytes and (kind != "jpeg" or side > LEAST_SIDE):
        if kind == "jpeg":
            side = max(LEAST_SIDE, int(0.9 * max(plain.size) * math.sqrt(most_bytes / len(content))))
        plain.thumbnail((side, side))
        file = io.BytesIO()
        plain.save(file, "JPEG", quality=80)
        kind, content = "jpeg", file.getvalue()
    address = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return address, width, height, max(plain.size) < max(width, height)


def find_samples(folder: Path) -> dict[int, dict[str, Path]]:
    """{step: {class, or "" for a sheet of all: file}} of the previews, in order."""
    samples: dict[int, dict[str, Path]] = {}
    for path in sorted(folder.glob("step_*")):
        matched = re.fullmatch(r"step_(\d+)(\.png)?", path.name)
        if matched is None:
            continue
        for file in [path] if matched[2] else sorted(path.glob("*.png")):
            sheets = samples.setdefault(int(matched[1]), {})
            name = "" if matched[2] else re.sub(r"^sample_(.+)_\d+x\d+$", r"\1", file.stem)  # circle of sample_circle_4x4
            sheets[name if name not in sheets else file.stem] = file
    return dict(sorted(samples.items()))


def spread(count: int, most: int) -> list[int]:
    """At most about `most` of `count` positions: every 2nd, 4th, 8th and so on, and the last. So a run that grows shows the
    same ones for long."""
    stride = 1
    while -(-count // stride) > most:
        stride *= 2
    return sorted({*range(0, count, stride), *([count - 1] if count else [])})


def load_samples(folder: Path) -> Samples:
    """The previews in samples/, spread over steps and classes so that the page stays small."""
    samples = find_samples(folder)
    names = sorted({name for sheets in samples.values() for name in sheets}, key=_by_numbers)
    shown_names = [names[i] for i in spread(len(names), CLASSES)]
    most = max(4, min(STEPS, SHEETS // max(1, len(shown_names))))
    budget = SAMPLE_BYTES // (most * max(1, len(shown_names)))
    frames, unreadable = list[tuple[int, list[PageImage]]](), 0
    for step in [list(samples)[i] for i in spread(len(samples), most)]:
        paths = {name: samples[step][name] for name in shown_names if name in samples[step]}
        sheets = [load_image(path, budget, name, f"{name} at step {step}".removeprefix(" at ")) for name, path in paths.items()]
        unreadable += sheets.count(None)
        if any(sheets):
            frames.append((step, [sheet for sheet in sheets if sheet is not None]))
    smaller = sum(sheet.is_smaller for _, sheets in frames for sheet in sheets)
    notes = [f"{len(frames)} of {len(samples)} previews"] if len(frames) < len(samples) else []
    notes += [f"{len(shown_names)} of {len(names)} classes"] if len(shown_names) < len(names) else []
    notes += [f"{smaller} images made smaller"] if smaller else []
    return Samples(frames, shown_names, notes, unreadable)


def _by_numbers(name: str) -> list[Any]:
    """A key that sorts 2 before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def load_other_images(run_dir: Path) -> Iterator[PageImage | None]:
    """What lies beside samples/: the contact sheet and its like, and where 2-D points went; None for what cannot be read."""
    sheets = [path for path in sorted(run_dir.glob("*.png")) if path.name not in ("loss.png", "contact_sheet.png")]
    points = [path for suffix in ("png", "gif") for path in sorted(run_dir.glob(f"points/*.{suffix}"))]
    for path in [*run_dir.glob("contact_sheet.png"), *sheets, *points]:
        name = path.relative_to(run_dir).as_posix()
        yield load_image(path, GIF_BYTES if path.suffix == ".gif" else IMAGE_BYTES, name, name)
