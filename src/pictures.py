"""What a person looks at: grids, labelled sheets, curves, frames, GIFs."""

import itertools
import shlex
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .config import UserError
from .packages import needed

Pixels = NDArray[np.uint8]


def to_uint8(images: Tensor) -> Pixels:
    """(B, C, H, W) in [-1, 1] -> (B, H, W, C) uint8; values outside are cut."""
    scaled = ((images.float().cpu().nan_to_num() + 1) * 127.5).round().clamp(0, 255)
    return rearrange(scaled, "b c h w -> b h w c").numpy().astype(np.uint8)


def to_image(pixels: Pixels) -> Image.Image:
    """(H, W, 1 or 3) uint8 -> a picture."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def zoom_for(size: int) -> int:
    """By how much to enlarge small pictures in a sheet, so that a person sees them: to 64 pixels or so."""
    return max(1, 64 // size)


def grid(
    pictures: Pixels, *, columns: int, labels: Sequence[str] | None = None, title: str = "", zoom: int | None = None
) -> Image.Image:
    """(N, H, W, C) uint8 -> one sheet, row by row, with a label under each picture and a title above, where given."""
    n, height, width = pictures.shape[:3]
    zoom = zoom if zoom is not None else zoom_for(min(height, width))
    columns = max(1, min(columns, n))
    rows = -(-n // columns)
    cell_w, cell_h = width * zoom, height * zoom
    font: Any = ImageFont.load_default(size=12)
    gap, caption = 4, 16 if labels else 0
    header = 22 if title else 0
    sheet = Image.new("RGB", (gap + columns * (cell_w + gap), header + gap + rows * (cell_h + caption + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((gap, 4), title, fill="black", font=font)
    for i in range(n):
        x = gap + i % columns * (cell_w + gap)
        y = header + gap + i // columns * (cell_h + caption + gap)
        picture = to_image(pictures[i]).convert("RGB")
        sheet.paste(picture.resize((cell_w, cell_h), Image.Resampling.NEAREST), (x, y))
        if labels:
            text = " ".join(labels[i].split())
            while len(text) > 1 and draw.textlength(text, font=font) > cell_w:
                text = text[:-1]
            draw.text((x, y + cell_h), text, fill="black", font=font)
    return sheet


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures side by side on white."""
    sheet = Image.new("RGB", (left.width + right.width, max(left.height, right.height)), "white")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width, 0))
    return sheet


def save(image: Image.Image, path: Path) -> None:
    """Write a picture so that it is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(path.name + ".part")
    image.save(staged, format={".jpg": "JPEG", ".gif": "GIF"}.get(path.suffix.lower(), "PNG"))
    staged.replace(path)


def curves(
    path: Path,
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    *,
    xlabel: str,
    title: str = "",
    log: Collection[str] = (),
    marker: str = "",
) -> None:
    """Panels side by side, each {label of its y axis: {name of a line: (x, y)}}, as a PNG; those in `log` on a log scale."""
    with needed("drawing curves", "matplotlib"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(panels), 4), layout="constrained")
    for i, (ylabel, series) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for name, (x, y) in series.items():
            axes.plot(x, y, label=name, linewidth=1.5, marker=marker)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(alpha=0.3)
        if ylabel in log:
            axes.set_yscale("log")
        if len(series) > 1:
            axes.legend()
    figure.suptitle(title)
    _save_figure(figure, path)


def scatter(points: NDArray[Any], *, size: int = 256, extent: float = 3.0, title: str = "") -> Image.Image:
    """Points (N, 2) as a picture of how many lie where, from -extent to extent both ways, white where there are none."""
    cells = size // 2
    counts, _, _ = np.histogram2d(points[:, 1], points[:, 0], bins=cells, range=[[-extent, extent]] * 2)
    counts = counts[::-1] / max(1.0, len(points)) * cells**2  # 1 where they were spread evenly
    shade = 1 - np.exp(-0.35 * counts)[..., None]
    low, high = np.array([255.0, 255.0, 255.0]), np.array([22.0, 52.0, 120.0])
    pixels = np.rint(low + shade * (high - low)).astype(np.uint8)
    picture = Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR)
    header = 22 if title else 0
    sheet = Image.new("RGB", (size + 8, size + header + 8), "white")
    sheet.paste(picture, (4, header + 4))
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((3, header + 3, size + 4, header + size + 4), outline=(200, 200, 200))
    if title:
        font: Any = ImageFont.load_default(size=12)
        draw.text((4, 4), title, fill="black", font=font)
    return sheet


def in_a_row(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures side by side on white."""
    row = images[0]
    for image in images[1:]:
        row = beside(row, image)
    return row


def trajectories(path: Path, ways: NDArray[Any], *, extent: float = 3.0, title: str = "") -> None:
    """The ways (T, N, 2) of points as lines, from open circles to dots, as a PNG."""
    with needed("drawing curves", "matplotlib"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot()
    for i in range(ways.shape[1]):
        axes.plot(ways[:, i, 0], ways[:, i, 1], color="#6b8cc4", linewidth=0.7, alpha=0.8)
    axes.scatter(ways[0, :, 0], ways[0, :, 1], s=10, facecolors="none", edgecolors="#888888", label="source", zorder=2)
    axes.scatter(ways[-1, :, 0], ways[-1, :, 1], s=10, color="#163478", label="data", zorder=3)
    axes.legend(loc="upper right")
    _square(axes, extent, title)
    _save_figure(figure, path)


def velocity_fields(path: Path, fields: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], *, extent: float = 2.4) -> None:
    """Arrows (M, 2) at positions (M, 2), a panel for each {title: (positions, arrows)}, as a PNG."""
    with needed("drawing curves", "matplotlib"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(fields), 3.4), layout="constrained")
    for i, (title, (at, arrows)) in enumerate(fields.items()):
        axes = figure.add_subplot(1, len(fields), i + 1)
        speed = np.linalg.norm(arrows, axis=1)
        axes.quiver(at[:, 0], at[:, 1], arrows[:, 0], arrows[:, 1], speed, cmap="viridis", angles="xy", pivot="mid")
        _square(axes, extent, title)
    _save_figure(figure, path)


def _square(axes: Any, extent: float, title: str) -> None:
    axes.set_xlim(-extent, extent)
    axes.set_ylim(-extent, extent)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=10)


def _save_figure(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(path.name + ".part")
    figure.savefig(staged, format="png", dpi=100)
    staged.replace(path)


def ffmpeg() -> str | None:
    """ffmpeg from PATH, else the one that imageio-ffmpeg ships, else None."""
    found = shutil.which("ffmpeg")
    if found:
        return found
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        return None


def gif_command(pattern: str, out: str, *, fps: int, program: str = "ffmpeg") -> list[str]:
    """The ffmpeg command that makes a GIF of numbered frames, with a palette of its own."""
    palette = "split[a][b];[a]palettegen=stats_mode=full[p];[b][p]paletteuse=dither=bayer"
    return [program, "-y", "-loglevel", "error", "-framerate", str(fps), "-i", pattern, "-lavfi", palette, out]


def gif(frames: Sequence[Path], pattern: Path, out: Path, *, fps: int) -> str:
    """Make a looping GIF of frames numbered from 0, by ffmpeg or, where there is none, by Pillow.

    `pattern` is their path with %03d for the number. Returns the command that makes it again.
    """
    if not frames:
        raise UserError("there are no frames to make a GIF of")
    program = ffmpeg()
    staged = out.with_name(f".{out.name}")
    if program is not None:
        command = gif_command(str(pattern), str(staged), fps=fps, program=program)
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600)
        if done.returncode != 0:
            raise RuntimeError(f"ffmpeg failed: {done.stderr.strip().splitlines()[-1:]}")
    else:
        pictures = [Image.open(frame).convert("RGB") for frame in frames]
        ends = [10 * round(100 * i / fps) for i in range(len(frames) + 1)]  # a GIF counts in hundredths of a second
        lasting = [end - start for start, end in itertools.pairwise(ends)]
        pictures[0].save(staged, save_all=True, append_images=pictures[1:], duration=lasting, loop=0)
    staged.replace(out)
    return shlex.join(gif_command(str(pattern), str(out), fps=fps))


def mp4_command(pattern: str, out: str, *, fps: int, program: str = "ffmpeg") -> list[str]:
    """The ffmpeg command that makes an MP4 of numbered frames: H.264 in yuv420p, which every player knows.

    It wants even sides: of odd ones a row or column is repeated. Colours are BT.709's, and said to be.
    """
    even = "scale=ceil(iw/2)*2:ceil(ih/2)*2:flags=neighbor,format=gbrp"
    said = "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709"
    filters = f"{even},scale=flags=area:out_color_matrix=bt709:out_range=tv,format=yuv420p,{said}"
    start = [program, "-y", "-loglevel", "error", "-framerate", str(fps), "-i", pattern]
    return [*start, "-vf", filters, "-c:v", "libx264", "-crf", "18", "-preset", "slow", "-movflags", "+faststart", out]


def mp4(pattern: Path, out: Path, *, fps: int) -> str:
    """Make an MP4 of frames numbered from 0, by ffmpeg. `pattern` is their path with %05d or so for the number.

    Returns the command that makes it again. A UserError where there is no ffmpeg, or one that cannot.
    """
    program = ffmpeg()
    if program is None:
        raise UserError("there is no ffmpeg, so no MP4 is made: pip install imageio-ffmpeg, or put ffmpeg on PATH")
    staged = out.with_name(f".{out.name}")
    try:
        command = mp4_command(str(pattern), str(staged), fps=fps, program=program)
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if "Unknown encoder" in done.stderr:
            raise UserError(f"{program} was built without libx264, so no MP4 is made: take it off PATH, or install another")
        if done.returncode != 0:
            raise RuntimeError(f"ffmpeg failed: {done.stderr.strip().splitlines()[-1:]}")
        staged.replace(out)
    finally:
        staged.unlink(missing_ok=True)
    return shlex.join(mp4_command(str(pattern), str(out), fps=fps))
