"""What a person looks at: grids, labelled sheets, curves, frames, GIFs."""

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
) -> None:
    """Panels side by side, each {label of its y axis: {name of a line: (x, y)}}, as a PNG; those in `log` on a log scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(panels), 4), layout="constrained")
    for i, (ylabel, series) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for name, (x, y) in series.items():
            axes.plot(x, y, label=name, linewidth=1.5)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(alpha=0.3)
        if ylabel in log:
            axes.set_yscale("log")
        if len(series) > 1:
            axes.legend()
    figure.suptitle(title)
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
        pictures[0].save(staged, save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0)
    staged.replace(out)
    return shlex.join(gif_command(str(pattern), str(out), fps=fps))
