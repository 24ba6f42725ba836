"""Grids of images, labelled sheets, curves, GIFs and MP4s. The file is long because all drawing is here."""

import functools
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .config import UserError
from .config.packages import needed
from .data.colour import Pixels, to_image

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

LINE = 14  # pixels from one line of text to the next
MAX_LINES = 16  # under an image: a label may be a whole paragraph
GAP = 4  # pixels between images
EXTENT = 3.0  # 2-D points are drawn from -EXTENT to EXTENT both ways


def to_uint8(images: Tensor) -> Pixels:
    """(B, C, H, W) in [-1, 1] -> (B, H, W, C) uint8; values outside are cut."""
    scaled = ((images.float().cpu().nan_to_num() + 1) * 127.5).round().clamp(0, 255)
    return scaled.permute(0, 2, 3, 1).numpy().astype(np.uint8)


def zoom_for(size: int) -> int:
    """By how much small images are enlarged in a sheet, so that a person sees them: to 64 pixels or so."""
    return max(1, 64 // size)


@functools.cache
def lettering() -> tuple[Any, Collection[int]]:
    """The font of captions and titles, and the characters (code points) that it can draw: DejaVu Sans, which comes with
    matplotlib; where that is missing, Pillow's own font and ASCII alone."""
    from PIL import ImageFont

    try:
        import matplotlib
        from matplotlib.ft2font import FT2Font

        path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
        return ImageFont.truetype(path, size=11), frozenset(FT2Font(str(path)).get_charmap())
    except (ImportError, OSError, RuntimeError):
        return ImageFont.load_default(size=12), range(0x20, 0x7F)


def readable(text: str) -> str:
    """The text in one line, each character that the font cannot draw written as its code, such as \\u4e2d."""
    known, words = lettering()[1], " ".join(unicodedata.normalize("NFC", text).split())

    def code(point: int) -> str:
        return f"\\u{point:04x}" if point < 0x10000 else f"\\U{point:08x}"

    return "".join(c if ord(c) in known and c.isprintable() else code(ord(c)) for c in words)


def wrapped(text: str, width: float) -> list[str]:
    """The readable text in lines that are at most `width` pixels wide. A line ends after a space, a mark of punctuation or the
    code of a character where it can, else anywhere."""
    measure: Callable[[str], float] = lettering()[0].getlength
    lines, line = list[str](), ""
    for word in re.findall(r"\\u[0-9a-f]{4}|\\U[0-9a-f]{8}|[^\s\\_/.,:;-]*[\s\\_/.,:;-]|[^\s\\_/.,:;-]+", readable(text)):
        if measure((line + word).rstrip()) <= width:
            line += word
            continue
        lines, line = [*lines, line.rstrip()] if line else lines, word
        while len(line.rstrip()) > 1 and measure(line.rstrip()) > width:
            fits = next(n for n in range(len(line) - 1, 0, -1) if n == 1 or measure(line[:n]) <= width)
            lines, line = [*lines, line[:fits]], line[fits:]
    return [*lines, line.rstrip()]


def _write_lines(draw: "ImageDraw.ImageDraw", x: int, y: int, lines: Sequence[str]) -> None:
    for i, line in enumerate(lines):
        draw.text((x, y + LINE * i), line, fill="black", font=lettering()[0])


def grid(
    images: Pixels, *, columns: int, labels: Sequence[str] | None = None, title: str = "", zoom: int | None = None
) -> "Image.Image":
    """(N, H, W, C) uint8 -> one sheet, row by row, with a label under each image and a title above, where given. Labels and
    titles that are too long for one line continue in the next."""
    from PIL import Image

    n, height, width = images.shape[:3]
    zoom = zoom if zoom is not None else zoom_for(min(height, width))
    columns = max(1, min(columns, n))
    cell_w, cell_h = width * zoom, height * zoom
    captions = [wrapped(label, cell_w) for label in labels or [""] * n]
    captions = [lines if len(lines) <= MAX_LINES else [*lines[: MAX_LINES - 1], "..."] for lines in captions]
    rows = [range(start, min(start + columns, n)) for start in range(0, n, columns)]
    below = [2 + LINE * max(len(captions[i]) for i in row) if labels else 0 for row in rows]
    sheet, draw, y = _sheet(GAP + columns * (cell_w + GAP), sum(cell_h + caption + GAP for caption in below), title)
    for row, caption in zip(rows, below, strict=True):
        for i in row:
            x = GAP + (i - row.start) * (cell_w + GAP)
            image = to_image(images[i]).convert("RGB").resize((cell_w, cell_h), Image.Resampling.NEAREST)
            sheet.paste(image, (x, y))
            _write_lines(draw, x, y + cell_h, captions[i])
        y += cell_h + caption + GAP
    return sheet


def on_white(images: Sequence[Pixels]) -> Pixels:
    """Images (H, W, C) of several shapes in the middle of white that holds all of them: (N, H, W, C)."""
    height, width = max(len(image) for image in images), max(image.shape[1] for image in images)
    space = [(height - len(image), width - image.shape[1]) for image in images]
    around = [[(rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2), (0, 0)] for rows, columns in space]
    return np.stack([np.pad(image, pad, constant_values=255) for image, pad in zip(images, around, strict=True)])


def _sheet(width: int, height: int, title: str) -> tuple["Image.Image", "ImageDraw.ImageDraw", int]:
    """A white sheet with the title and `height` pixels below it, what draws on it, and where those pixels begin."""
    from PIL import Image, ImageDraw

    heading = wrapped(title, width - 2 * GAP) if title else []
    top = GAP + (8 + LINE * len(heading) if title else 0)
    sheet = Image.new("RGB", (width, top + height), "white")
    draw = ImageDraw.Draw(sheet)
    _write_lines(draw, GAP, GAP, heading)
    return sheet, draw, top


def in_a_row(images: Sequence["Image.Image"]) -> "Image.Image":
    """Images side by side on white."""
    height = max(image.height for image in images)
    arrays = [np.asarray(image.convert("RGB")) for image in images]
    return to_image(np.hstack([np.pad(x, ((0, height - len(x)), (0, 0), (0, 0)), constant_values=255) for x in arrays]))


def in_a_column(images: Sequence["Image.Image"]) -> "Image.Image":
    """Images one below the other on white."""
    width = max(image.width for image in images)
    arrays = [np.asarray(image.convert("RGB")) for image in images]
    return to_image(np.vstack([np.pad(x, ((0, 0), (0, width - x.shape[1]), (0, 0)), constant_values=255) for x in arrays]))


@contextmanager
def _staged(path: Path, name: str | None = None) -> Iterator[Path]:
    """The path of a file beside `path` to write to; it is moved to its place when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(name or f"{path.name}.part")
    try:
        yield staged
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def save(image: "Image.Image", path: Path) -> None:
    """Write an image so that its file is whole or absent."""
    with _staged(path) as staged:
        image.save(staged, format={".jpg": "JPEG", ".gif": "GIF"}.get(path.suffix.lower(), "PNG"))


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """A figure of matplotlib, in inches, to draw on. When the block ends it is written as a PNG, whole or not at all."""
    with needed("drawing curves", "matplotlib"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    with _staged(path) as staged:
        figure.savefig(staged, format="png", dpi=100)


def curves(
    path: Path,
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    *,
    xlabel: str,
    title: str = "",
    log: Collection[str] = (),
    marker: str = "",
) -> None:
    """Panels side by side, each {label of its y axis: {name of a line: (x, y)}}, as a PNG; those in `log`, and all x where
    `xlabel` is in it, on a log scale."""
    with _figure(path, 6 * len(panels), 4) as figure:
        for i, (ylabel, series) in enumerate(panels.items()):
            axes = figure.add_subplot(1, len(panels), i + 1)
            for name, (x, y) in series.items():
                axes.plot(x, y, label=_plain(name), linewidth=1.5, marker=marker)
            axes.set(xlabel=_plain(xlabel), ylabel=_plain(ylabel), yscale="log" if ylabel in log else "linear")
            axes.set_xscale("log" if xlabel in log else "linear")
            axes.grid(alpha=0.3)
            if len(series) > 1:
                axes.legend()
        figure.suptitle("\n".join(textwrap.wrap(_plain(title), 60 * len(panels))))


def _plain(text: str) -> str:
    """The text as matplotlib takes it: a dollar is a dollar and begins no formula."""
    return readable(text).replace("$", r"\$")


def scatter(points: NDArray[Any], *, size: int = 256, title: str = "") -> "Image.Image":
    """An image of how many points (N, 2) lie where, white where there are none."""
    from PIL import Image

    cells = size // 2
    counts, _, _ = np.histogram2d(points[:, 1], points[:, 0], bins=cells, range=[[-EXTENT, EXTENT]] * 2)
    counts = counts[::-1] / max(1.0, len(points)) * cells**2  # 1 where they were spread evenly
    shade = 1 - np.exp(-0.35 * counts)[..., None]
    low, high = np.array([255.0, 255.0, 255.0]), np.array([22.0, 52.0, 120.0])
    pixels = np.rint(low + shade * (high - low)).astype(np.uint8)
    sheet, draw, top = _sheet(size + 2 * GAP, size + GAP, title)
    sheet.paste(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR), (GAP, top))
    draw.rectangle((GAP - 1, top - 1, GAP + size, top + size), outline=(200, 200, 200))
    return sheet


def trajectories(path: Path, ways: NDArray[Any], *, title: str = "") -> None:
    """The ways (T, N, 2) of points as lines, from open circles to dots, as a PNG."""
    with _figure(path, 5, 5) as figure:
        axes = figure.add_subplot()
        axes.plot(ways[..., 0], ways[..., 1], color="#6b8cc4", linewidth=0.7, alpha=0.8)
        axes.scatter(*ways[0].T, s=10, facecolors="none", edgecolors="#888888", label="source", zorder=2)
        axes.scatter(*ways[-1].T, s=10, color="#163478", label="data", zorder=3)
        axes.legend(loc="upper right")
        _square(axes, EXTENT, title)


def velocity_fields(path: Path, fields: Mapping[str, tuple[NDArray[Any], NDArray[Any]]]) -> None:
    """Arrows (M, 2) at positions (M, 2), a panel for each {title: (positions, arrows)}, as a PNG."""
    with _figure(path, 3.2 * len(fields), 3.4) as figure:
        for i, (title, (positions, arrows)) in enumerate(fields.items()):
            axes = figure.add_subplot(1, len(fields), i + 1)
            speed = np.linalg.norm(arrows, axis=1)
            axes.quiver(*positions.T, *arrows.T, speed, cmap="viridis", angles="xy", pivot="mid")
            _square(axes, 2.4, title)


def _square(axes: Any, extent: float, title: str) -> None:
    axes.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal", xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)


# ---------------------------------------------------------------------------------------------- GIF and MP4

NO_ENCODER = "was built without libx264"


def _programs() -> list[str]:
    """Each ffmpeg that there is: the one on PATH, then the one that imageio-ffmpeg ships."""
    programs = [shutil.which("ffmpeg")]
    with suppress(ImportError, RuntimeError, OSError):
        import imageio_ffmpeg

        programs.append(imageio_ffmpeg.get_ffmpeg_exe())
    return list(filter(None, dict.fromkeys(programs)))


def _run(command: Sequence[str], seconds: float | None) -> str | None:
    """Why the program failed, in one line, or None."""
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not start ({error.strerror})" if isinstance(error, OSError) else f"took more than {seconds:g} s"
    lines = done.stderr.decode("utf-8", errors="replace").strip().splitlines()
    if "Unknown encoder" in " ".join(lines):
        return NO_ENCODER
    why = f": {lines[-1].strip()}" if lines else ""
    if done.returncode in (126, 127) or done.returncode < 0:  # status of a shell, of the loader of libraries; a signal
        return f"does not start (status {done.returncode}{why})"
    return f"failed (status {done.returncode}{why})" if done.returncode else None


@functools.cache
def _warn(line: str) -> None:
    """Print a warning, each one once."""
    print(f"warning: {line}", file=sys.stderr, flush=True)


def ffmpeg() -> str | None:
    """The first ffmpeg that starts: that on PATH, else the one that imageio-ffmpeg ships, else None. A warning names one that
    does not start, once."""
    for program in _programs():
        reason = _run([program, "-version"], 20)
        if reason is None or not reason.startswith(("does not start", "took more")):
            return program  # another fault will show when the GIF or the MP4 is made
        _warn(f"{program} {reason}; another way is taken")
    return None


def _run_ffmpeg(
    make: Callable[..., list[str]], pattern: Path, out: Path, fps: int, seconds: float | None, programs: Sequence[str] | None
) -> str | None:
    """Try one ffmpeg after the other until one has written `out`. Gives why the first of them failed, None where one of them
    succeeded, and "" where there is no ffmpeg."""
    first = ffmpeg()
    if first is None:
        return ""
    reasons = list[str]()
    for program in programs or dict.fromkeys([first, *_programs()]):
        out.unlink(missing_ok=True)
        reason = _run(make(pattern, out, fps=fps, program=program), seconds)
        if reason is None and not (out.is_file() and out.stat().st_size):
            reason = "wrote nothing"
        if reason is None:
            for line in reasons:
                _warn(f"{line}; {program} was taken")
            return None
        reasons.append(f"{program} {reason}")
    return reasons[0]


def _argument(path: Path) -> str:
    """A path as a program takes it for one: no option, and no address such as http:."""
    text = str(path)
    return f"./{text}" if text.startswith("-") or ":" in text.partition("/")[0] else text


def _input(program: str, pattern: Path, fps: int) -> list[str]:
    """The beginning of a command that reads frames numbered from 0; ffmpeg counts with a single %, so folders have it twice."""
    quiet, numbers = ["-y", "-loglevel", "error"], ["-pattern_type", "sequence", "-start_number", "0"]
    frames = f"{_argument(pattern.parent).replace('%', '%%')}/{pattern.name}"
    return [program, *quiet, "-framerate", str(fps), *numbers, "-i", frames]


def gif_command(pattern: Path, out: Path, *, fps: int, program: str = "ffmpeg") -> list[str]:
    """The ffmpeg command that makes a GIF of numbered frames, with a palette of its own."""
    palette = "split[a][b];[a]palettegen=stats_mode=full[p];[b][p]paletteuse=dither=bayer"
    return [*_input(program, pattern, fps), "-lavfi", palette, _argument(out)]


def gif(frames: Sequence[Path], pattern: Path, out: Path, *, fps: int) -> str:
    """Make a looping GIF of frames numbered from 0, by ffmpeg or, where none does it, by Pillow.

    `pattern` is their path with %03d for the number. Returns the command that makes it again.
    """
    if not frames:
        raise UserError("there are no frames to make a GIF of")
    from PIL import Image

    with _staged(out, f".{out.name}") as staged:
        reason = _run_ffmpeg(gif_command, pattern, staged, fps, 600, None)
        if reason:
            _warn(f"{reason}; Pillow makes the GIF")
        if reason is not None:
            images = [Image.open(frame).convert("RGB") for frame in frames]
            times = [10 * round(100 * i / fps) for i in range(len(frames) + 1)]  # a GIF counts in hundredths of a second
            durations = np.diff(times).tolist()
            images[0].save(staged, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)
    return shlex.join(gif_command(pattern, out, fps=fps))


def mp4_command(pattern: Path, out: Path, *, fps: int, program: str = "ffmpeg") -> list[str]:
    """The ffmpeg command that makes an MP4 of numbered frames: H.264 in yuv420p, which every player knows.

    H.264 wants even sides: of odd ones a row or column is repeated. Colours are those of BT.709, and marked so.
    """
    even = "scale=ceil(iw/2)*2:ceil(ih/2)*2:flags=neighbor,format=gbrp"
    marks = "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709"
    filters = f"{even},scale=flags=area:out_color_matrix=bt709:out_range=tv,format=yuv420p,{marks}"
    encoding = ["-vf", filters, "-c:v", "libx264", "-crf", "18", "-preset", "slow", "-movflags", "+faststart"]
    return [*_input(program, pattern, fps), *encoding, _argument(out)]


def mp4(pattern: Path, out: Path, *, fps: int, programs: Sequence[str] | None = None) -> str:
    """Make an MP4 of frames numbered from 0, by ffmpeg (one of `programs`, where given). `pattern` is their path with %05d or
    so for the number.

    Returns the command that makes it again. A UserError where there is no ffmpeg, or one that cannot encode H.264.
    """
    with _staged(out, f".{out.name}") as staged:
        reason = _run_ffmpeg(mp4_command, pattern, staged, fps, None, programs)
        if reason == "":
            raise UserError("there is no ffmpeg, so no MP4 is made: pip install imageio-ffmpeg, or put ffmpeg on PATH")
        if reason is not None and reason.endswith(NO_ENCODER):
            raise UserError(f"{reason}, so no MP4 is made: take it off PATH, or install another")
        if reason is not None:
            raise RuntimeError(f"ffmpeg failed, so no MP4 is made: {reason}")
    return shlex.join(mp4_command(pattern, out, fps=fps))
