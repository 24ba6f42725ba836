"""From a file to the square of uint8 pixels that a network sees."""

import io
import struct
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin

from ..config import config
from .colour import read_stated_bits, stated_white, to_srgb
from .formats import open_image

Pixels = NDArray[np.uint8]
# The version of what `decode` makes of a file. It goes up when the pixels of some files change; `scan.measure` says of which
# files. Caches remember it. 2: colour profiles are converted, and grey is scaled by the range that the file states.
DECODER = 2
Image.MAX_IMAGE_PIXELS = None  # the scan holds images to `max_pixels` by their header, before anything is decoded
# A PNG may carry a workflow or a profile that is far larger than what Pillow takes by itself, and is a whole image.
PngImagePlugin.MAX_TEXT_CHUNK = 64 << 20  # bytes of one chunk of text, or of a profile, when it is unpacked
PngImagePlugin.MAX_TEXT_MEMORY = 256 << 20  # of all of them together


@config
class ImageConfig:
    """What the network sees: the shorter side resized to `size`, then a square cut from the middle or at random.

    `flip` mirrors half of the images left to right.
    """

    size: int = pydantic.Field(ge=2, le=4096)
    channels: Literal[1, 3] = 3
    crop: Literal["center", "random"] = "center"
    flip: bool = False


def _to_8_bits(image: Image.Image, top: float | None) -> Image.Image:
    """16-bit and wider greyscale by its range: 0..`top` where the file states it, 0..65535 where the values fit, else
    smallest..largest."""
    values = np.asarray(image, dtype=np.float64)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if image.mode != "F" and low >= 0 and high <= 65535:
        low, high = 0.0, top or 65535.0
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    scaled = (values - low) / max(high - low, 1e-12) * 255
    return Image.fromarray(np.rint(scaled).clip(0, 255).astype(np.uint8))


def normalise(image: Image.Image, channels: int) -> Image.Image:
    """An opened image as it is meant to be seen: turned by its EXIF tag, in sRGB, transparency over white, mode L or RGB."""
    deep = image.mode.startswith(("I", "F"))
    top = stated_white(image, np.asarray(image)) if deep else None
    profile = image.info.get("icc_profile")
    with suppress(SyntaxError, ValueError, struct.error):  # notes (EXIF) that cannot be read turn nothing
        image = ImageOps.exif_transpose(image)
    if deep:
        image = _to_8_bits(image, top)
        image.info["icc_profile"] = profile
    image = to_srgb(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if channels == 3 else "L")


def decode(file: Path | bytes, *, channels: int = 3, at_least: int | None = None) -> Image.Image:
    """The first frame of an image file, normalised. A JPEG far larger than `at_least` is decoded at a fraction of its size."""
    with open_image(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        if at_least is not None and image.format in ("JPEG", "MPO"):
            image.draft(None, (2 * at_least, 2 * at_least))
        read_stated_bits(image)
        image.load()
        return normalise(image, channels)


def to_array(image: Image.Image) -> Pixels:
    """(H, W, 1 or 3) uint8 of an image in mode L or RGB."""
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def to_image(pixels: Pixels) -> Image.Image:
    """(H, W, 1 or 3) uint8 -> an image in mode L or RGB."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def square(image: Image.Image | Pixels, spec: ImageConfig, u: NDArray[np.float64]) -> Pixels:
    """(size, size, channels) uint8. `u` are three numbers in [0, 1): where to cut across and down, and whether to flip."""
    width, height = image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])
    side = min(width, height)
    across, down = (u[0], u[1]) if spec.crop == "random" else (0.5, 0.5)
    left, top = across * (width - side), down * (height - side)
    if side == spec.size:
        x, y = int(left), int(top)
        pixels = to_array(image) if isinstance(image, Image.Image) else image
        pixels = pixels[y : y + side, x : x + side]
    else:
        whole = image if isinstance(image, Image.Image) else to_image(image)
        box = (left, top, left + side, top + side)  # cut before resizing, so a long thin image costs nothing
        pixels = to_array(whole.resize((spec.size, spec.size), Image.Resampling.BICUBIC, box=box))
    if pixels.shape[2] != spec.channels:
        pixels = to_array(to_image(pixels).convert("RGB" if spec.channels == 3 else "L"))
    return pixels[:, ::-1] if spec.flip and u[2] < 0.5 else pixels


def resize_shorter_side(image: Image.Image, size: int) -> Pixels:
    """The whole image with its shorter side at `size`, (H, W, C) uint8."""
    side = min(image.size)
    width, height = (max(size, round(length * size / side)) for length in image.size)
    return to_array(image if side == size else image.resize((width, height), Image.Resampling.BICUBIC))


def position_uniforms(seed: int, positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """Three numbers in [0, 1) for each position of the stream, a function of (seed, position): (N, 3).

    SplitMix64 (Steele et al. 2014) of a counter: no generator is made per image.
    """
    counter = np.array([[seed]], dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + positions.astype(np.uint64)[
        :, None
    ] * np.uint64(4)
    z = (counter + np.arange(3, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2.0**53
